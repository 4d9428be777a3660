"""memlm: language models in little memory, and fast.

The public names and modules load on first use, so that ``import memlm`` stays quick.
"""

from importlib import import_module

from memlm._on_import import join_others

__version__ = "0.1.0"

_PUBLIC = {
    "FormatError": "memlm.errors",
    "OutOfBlocks": "memlm.errors",
    "PagedKVCache": "memlm.kv_cache",
    "Format": "memlm._format",
    "Packed": "memlm.formats",
    "SparseFormat": "memlm._format",
    "SparsePacked": "memlm.sparse_formats",
    "quantize_weight": "memlm.quantize",
    "QuantConfig": "memlm.convert",
    "quantize_": "memlm.convert",
    "sparsify_": "memlm.convert",
    "quantize_files": "memlm.streaming",
    "dequantize_": "memlm.convert",
    "PruneConfig": "memlm.prune",
    "prune_": "memlm.prune",
    "layer_specs": "memlm.convert",
    "build_layers_": "memlm.convert",
    "explain": "memlm.explanation",
    "load": "memlm.models.load",
    "save": "memlm.models.load",
    "isa": "memlm.cpu",
    "isas": "memlm.cpu",
    "set_isa": "memlm.cpu",
}
_MODULES = ("arrays", "cpu", "data", "formats", "hf", "io", "layers", "limits", "memory", "models", "ops", "optim", "prune")
__all__ = sorted([*_PUBLIC, *_MODULES])


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return import_module(f"memlm.{name}")
    raise AttributeError(f"module 'memlm' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])


join_others()
