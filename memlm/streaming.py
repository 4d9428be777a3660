"""From a model's files to a packed folder, tensor by tensor: memory holds the largest tensor, never
the model.

Finished tensors are small files in ``DST/.partial``; what a killed run has finished is found there by
the next one.  At the end they are joined into one file, which takes its place in the folder
when it is complete.  While one tensor is rounded the one before is written and those behind are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import memlm
from memlm.convert import QuantConfig, spec_of
from memlm.errors import FormatError
from memlm.formats import Format
from memlm.io import pages, safetensors
from memlm.io.checkpoint import Checkpoint, PackedTensor, open_checkpoint
from memlm.io.files import replacing
from memlm.io.packed_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_target,
    copy_others,
    file_sizes,
    file_tensors,
    in_file_order,
    metadata,
    neighbours,
    replacing_model,
    write_config,
)  # fmt: skip
from memlm.layers import Embedding, linear_of
from memlm.models.decoder import Decoder
from memlm.models.load import (
    FLOATS, build_for, check_embedding, check_names, other_tensors, read_tensor,
)  # fmt: skip
from memlm.ops import mode_for
from memlm.quantize import lacks_zeros, pack_weight
from memlm.sparse_formats import SparseFormat

_PARTIAL = ".partial"
_PART = (
    1 << 22
)  # weights in one of its files, or one tensor: fewer files than tensors, a few MB each


@dataclass(frozen=True)
class _Job:
    """One tensor of the result: ``module`` is Hugging Face's name of the layer that it is the weight
    of, or None where it is stored as it is; ``shape`` as the config wants it."""

    name: str
    shape: tuple[int, ...]
    module: str | None
    kind: type[nn.Module]
    format: Format | SparseFormat | None
    bias: bool


def quantize_files(
    src: str | Path,
    dst: str | Path,
    config: QuantConfig | str | Format | SparseFormat = QuantConfig(embedding="int8"),
    requantize: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, int]:
    """Quantises the model at ``src`` (anything that :func:`memlm.load` reads) into the packed folder
    ``dst``.  Returns file name -> bytes of what was written.

    config: as for :func:`memlm.quantize_`; its patterns match Hugging Face's names of layers.
    requantize: round what the file holds in codes anew; otherwise such matrices keep them, to the
        bit, wherever a format of memlm holds them exactly (``memlm.io``), and ``config`` concerns
        the rest.
    progress: called with (done, total, name) after each tensor.

    A run that was killed is taken up where it stopped by the next one with the same arguments and
    unchanged files; another one starts afresh.

    Raises what :func:`memlm.load` raises, FileExistsError for a ``dst`` that holds something else
    than a packed model, ValueError naming the tensor for weights with NaN or Inf.
    """
    src, dst = Path(src), Path(dst)
    if isinstance(config, (str, Format, SparseFormat)):
        config = QuantConfig(config)
    if src.resolve() in dst.resolve().parents:
        raise ValueError(f"dst: {dst} lies inside src, {src}")
    check_target(dst)
    checkpoint = open_checkpoint(src)
    jobs, tied = _plan(checkpoint, config)
    existed = dst.exists()
    dst.mkdir(parents=True, exist_ok=True)
    partial = _Partial(dst / _PARTIAL, _fingerprint(src, config, requantize))
    try:
        specs, dtypes, anew, whole = {}, set(), [], []
        for i, (job, known) in enumerate(_results(checkpoint, jobs, config, requantize, partial)):
            if known["spec"]:
                specs[job.module] = known["spec"]
            else:
                dtypes.add(known["dtype"])
            if known["anew"]:
                anew.append(job.name)
            if known["whole"]:
                whole.append(job.name)
            if progress:
                progress(i + 1, len(jobs), job.name)
        if anew:
            warnings.warn(
                f"{len(anew)} tensors, {anew[0]} the first, are stored in codes that no format of "
                "memlm holds exactly: they were dequantised, and rounded as the config says"
            )
        if whole:
            warnings.warn(
                f"{len(whole)} matrices, {whole[0]} the first, have no zeros that their sparse "
                "format leaves out: they stay floats"
            )
        # As memlm.load has it: f32 where a file mixes several.
        dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
        dtype = dtype if dtype in _NAMES else "float32"
        for spec in specs.values():
            spec["dtype"] = dtype
        if tied in specs:
            mode = mode_for(Format.parse(specs[tied]["format"]), config.mode)
            head = {**specs[tied], "type": "Linear", "bias": False, "mode": mode, "tied_to": tied}
            specs["lm_head"] = head
        with replacing_model(dst) as temporary:
            safetensors.join(
                temporary / WEIGHTS_FILE,
                partial.files(),
                lambda names: in_file_order(names, specs),
                metadata(),
                lambda names: neighbours(names, specs),
            )
            copy_others(checkpoint, temporary)
            plain = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
            write_config(temporary / CONFIG_FILE, plain, specs, _NAMES[dtype])
            files = file_sizes(temporary)
        partial.remove()
        return files
    except (ValueError, TypeError):  # what another run would meet again
        partial.remove()
        if not existed:
            shutil.rmtree(dst, ignore_errors=True)
        raise


_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def _plan(checkpoint: Checkpoint, config: QuantConfig) -> tuple[list[_Job], str | None]:
    """What to write, and the module of an embedding that the head is tied to."""
    model = build_for(checkpoint)
    prefix = check_names(model, checkpoint)
    jobs, layers, tied = [], [], None
    for name, sources in model.hf_tensors().items():
        own, _, leaf = name.rpartition(".")
        layer, columns = model.get_submodule(own), tuple(model.get_parameter(name).shape[1:])
        packable = leaf == "weight" and isinstance(layer, (nn.Linear, nn.Embedding))
        role = "head" if own == "lm_head" else "linear"
        if isinstance(layer, nn.Embedding):
            role = "embedding"
        for source, rows in sources.items():
            source = prefix + source
            module, format = source.removesuffix(".weight") if packable else None, None
            if packable:
                layers.append((module, type(layer).__name__))
                format = config.format_of(module, type(layer).__name__, role)
            bias = packable and getattr(layer, "bias", None) is not None
            jobs.append(_Job(source, (rows, *columns), module, type(layer), format, bias))
            if own == "embed_tokens" and isinstance(model, Decoder) and model.config.tied:
                tied = module
    if tied is not None:
        layers.append(("lm_head", "Linear"))
    config.check_patterns(layers)
    for name, shape in other_tensors(model, checkpoint, prefix).items():
        jobs.append(_Job(name, shape, None, nn.Module, None, False))
    return jobs, tied


def _parts(jobs: list[_Job]) -> list[range]:
    """Consecutive jobs, _PART weights or one job at a time."""
    parts, start, size = [], 0, 0
    for i, job in enumerate(jobs):
        size += math.prod(job.shape)
        if size >= _PART or i == len(jobs) - 1:
            parts.append(range(start, i + 1))
            start, size = i + 1, 0
    return parts


def _results(
    checkpoint: Checkpoint,
    jobs: list[_Job],
    config: QuantConfig,
    requantize: bool,
    partial: _Partial,
) -> Iterator[tuple[_Job, dict]]:
    """Makes every job's tensors and writes them to ``partial``; yields what is known of each once it
    is there.  One part is written while the next is rounded, and what follows is read."""
    ahead, waiting = _ReadAhead(checkpoint, jobs), deque()

    def written() -> Iterator[tuple[_Job, dict]]:
        while waiting:
            part, known, future = waiting.popleft()
            future.result()
            for i in part:
                checkpoint.release(jobs[i].name)
            yield from zip((jobs[i] for i in part), known)

    with ThreadPoolExecutor(max_workers=1) as writer:
        for number, part in enumerate(_parts(jobs)):
            known, tensors = partial.take(number, len(part)), {}
            if known is not None:
                yield from written()
                yield from zip((jobs[i] for i in part), known)
                continue
            known = []
            for i in part:
                ahead.before(i)
                made = _make(checkpoint, jobs[i], config, requantize)
                tensors |= made[0]
                known.append(made[1])
                if made[1]["spec"]:  # floats are written from where they are mapped
                    checkpoint.release(jobs[i].name)
            yield from written()  # one part at most: it is in memory
            waiting.append((part, known, writer.submit(partial.put, number, tensors, known)))
        yield from written()


class _ReadAhead:
    """Has the kernel read the jobs' sources some way ahead of the one at work."""

    BYTES = 64 << 20  # a tenth of a second of a fast disk

    def __init__(self, checkpoint: Checkpoint, jobs: list[_Job]):
        self._checkpoint, self._jobs = checkpoint, jobs
        self._asked, self._bytes = 0, 0  # jobs asked for so far; their bytes beyond the one at work

    def before(self, i: int) -> None:
        """To be called before job ``i`` is made."""
        while self._asked < len(self._jobs) and (self._asked <= i or self._bytes < self.BYTES):
            self._checkpoint.read_ahead(self._jobs[self._asked].name)
            self._bytes += self._size(self._asked)
            self._asked += 1
        self._bytes -= self._size(i)

    def _size(self, i: int) -> int:
        return 4 * math.prod(self._jobs[i].shape)


def _packs(source: torch.Tensor, format: Format | SparseFormat | None) -> bool:
    """Whether the tensor is to be packed: for sparse formats one that has zeros to leave out."""
    sparse = isinstance(format, SparseFormat)
    return format is not None and not (sparse and lacks_zeros(source, format))


def _make(
    checkpoint: Checkpoint, job: _Job, config: QuantConfig, requantize: bool
) -> tuple[dict[str, torch.Tensor], dict]:
    """One job's tensors as the file names them, and what is to be known of them."""
    source = read_tensor(checkpoint, job.name, job.shape, dequantize=requantize)
    stored = source if isinstance(source, PackedTensor) else None
    if stored is None and _packs(source, job.format):
        done = pages.release if checkpoint.maps(job.name) else None
        try:
            stored = PackedTensor(pack_weight(source, job.format, done))
        except ValueError as error:
            raise ValueError(f"{job.name}: {error}") from None
    if stored is None:
        tensors = {job.name: source}
        spec = None
    else:
        mode = config.mode or stored.mode
        if issubclass(job.kind, nn.Embedding):
            check_embedding(job.name, stored)
            spec = spec_of(Embedding(stored.packed))
        else:
            layer = linear_of(stored.packed, mode=mode, order=stored.order)
            spec = spec_of(layer) | {"bias": job.bias}
        tensors = file_tensors(job.module, stored.packed, stored.order)
    dtype = None if stored is not None else str(source.dtype).removeprefix("torch.")
    anew = not requantize and isinstance(source, torch.Tensor) and checkpoint.coded(job.name)
    whole = stored is None and job.format is not None
    return tensors, {"spec": spec, "dtype": dtype, "anew": anew, "whole": whole}


class _Partial:
    """The finished tensors of a run, on disk; those of a run with another ``fingerprint`` are
    thrown away."""

    def __init__(self, folder: Path, fingerprint: str):
        self._folder = folder
        job = folder / "job"
        if not job.is_file() or job.read_text() != fingerprint:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            with replacing(job, sync=False) as file:
                file.write(fingerprint.encode())

    def file(self, i: int) -> Path:
        return self._folder / f"{i:05}.safetensors"

    def files(self) -> list[Path]:
        return sorted(self._folder.glob("*.safetensors"))

    def take(self, i: int, count: int) -> list[dict] | None:
        """What is known of the ``count`` jobs of a part that is there, or None."""
        try:
            safetensors.verify(self.file(i))
            known = json.loads(safetensors.read_header(self.file(i))[1]["memlm"])
            return known if len(known) == count else None
        except (FileNotFoundError, FormatError, KeyError):
            return None

    def put(self, i: int, tensors: dict[str, torch.Tensor], known: list[dict]) -> None:
        # Not synced: a kill loses nothing that was written, and what a loss of power leaves
        # incomplete its checksum tells.
        safetensors.write(self.file(i), tensors, {"memlm": json.dumps(known)}, sync=False)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _fingerprint(src: Path, config: QuantConfig, requantize: bool) -> str:
    """Of everything that the result depends on."""
    files = sorted(src.rglob("*")) if src.is_dir() else [src]
    stats = [
        (str(f.relative_to(src.parent)), f.stat().st_size, f.stat().st_mtime_ns) for f in files
    ]
    return hashlib.sha256(repr((memlm.__version__, stats, config, requantize)).encode()).hexdigest()
