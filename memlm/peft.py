"""LoRA adapters (arXiv:2106.09685) of PEFT around packed layers.

Imported by itself as soon as PEFT's LoRA is.  From then on ``get_peft_model(model, LoraConfig(...))``
wraps memlm's layers as it does torch's: gradients flow through them to the adapters, which train and
are saved as always; the packed weights stay as they are.

``target_modules`` names layers: PEFT's ``"all-linear"`` looks for torch's own classes only.
"""

from __future__ import annotations

import peft
import torch
import torch.nn.functional as F
from packaging.version import Version
from peft.tuners.lora import layer as lora
from peft.tuners.lora.config import LoraConfig

from memlm.layers import Embedding, Linear, PackedModule

if Version(peft.__version__) < Version("0.20"):  # earlier ones pass an adapter's settings otherwise
    raise ImportError(f"peft>=0.20 is needed, found {peft.__version__}")

# Values of LoraConfig.init_lora_weights that leave the base layer's weight as it is.
INITS = (True, False, "gaussian", "orthogonal", "eva")


class _Around:
    """What differs for an adapter whose base layer is packed: nobody can write to its weight."""

    def _get_in_out_features(self, module):
        if isinstance(module, Embedding):
            return module.num_embeddings, module.embedding_dim
        return module.in_features, module.out_features

    @property
    def lora_variants(self):
        return {(): None}

    def update_layer(self, adapter_name, r, lora_alpha, config, **kwargs):
        """Raises ValueError for a LoraConfig that would change or read the base layer's weight."""
        if config.init_lora_weights not in INITS:
            raise ValueError(
                f"init_lora_weights: got {config.init_lora_weights!r}, accepted for packed layers are "
                f"{INITS}"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, once :func:`memlm.dequantize_` made the base layer one of floats.  Raises
        ValueError before: in packed weights much of what was learnt would be rounded away."""
        base = self.get_base_layer()
        if isinstance(base, PackedModule):
            raise ValueError(
                f"merge: the base layer is packed in {base.format}, which would round the adapter "
                "away; memlm.dequantize_(model) first, then merge (and memlm.quantize_ again)"
            )
        super().merge(safe_merge, adapter_names)


class LoraLinear(_Around, lora.Linear):
    """A LoRA adapter around a :class:`memlm.layers.Linear`."""


class LoraEmbedding(_Around, lora.Embedding):
    """A LoRA adapter around a :class:`memlm.layers.Embedding`."""

    def _embed(self, input: torch.Tensor, weight: torch.Tensor, **kwargs) -> torch.Tensor:
        return F.embedding(input, weight, self.get_base_layer().padding_idx)


_post_init = LoraConfig.__post_init__


def _know_packed_layers(config: LoraConfig) -> None:
    """Each new LoraConfig knows our layers by PEFT's own way for custom layers, which is per config
    and not saved with it."""
    _post_init(config)
    config._register_custom_module({Linear: LoraLinear, Embedding: LoraEmbedding})


LoraConfig.__post_init__ = _know_packed_layers
