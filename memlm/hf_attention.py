"""memlm's attention as one that Hugging Face models select by name:
``from_pretrained(..., attn_implementation="memlm")``, ``model.set_attn_implementation("memlm")``.

Imported by itself as soon as transformers' models are.  Causal masks and sliding windows are limits
of the kernel and padding is a row of the mask, so that no matrix is made of them; other masks are
matrices, as for transformers' "sdpa".
"""

from __future__ import annotations

import torch
from transformers.integrations.sdpa_attention import create_position_bias_mask
from transformers.masking_utils import AttentionMaskInterface, prepare_padding_mask, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from memlm.hf_cache import PAGED
from memlm.ops import attention

NAME = "memlm"
# The attribute of a mask [batch or 1, 1, 1, keys] that says what stands beside it: whether later
# keys are unseen, and the window or None.
LIMITS = "memlm_limits"


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config=None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> torch.Tensor | None:
    """transformers' mask function (see ``sdpa_mask``): what :func:`forward` takes as its mask."""
    causal = allow_is_causal_skip and _at_the_end(q_length, kv_length, q_offset, kv_offset)
    # The mask functions of chunks have a size too, and are no windows.
    windowed = local_size is not None and local_size == getattr(config, "sliding_window", None)
    plain = causal and (local_size is None or windowed) and q_length > 1
    plain = plain or (
        allow_is_bidirectional_skip and not allow_is_causal_skip and local_size is None
    )
    if not plain or torch.compiler.is_compiling():
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask,
            local_size=local_size, allow_is_causal_skip=causal and q_length == 1,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip, config=config, device=device,
            **kwargs,
        )  # fmt: skip
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        padding = None if padding.all() else padding[:, None, None]
    window = local_size if local_size is not None and local_size < kv_length else None
    if padding is None and window is None:
        return None
    if padding is None:
        padding = torch.ones(1, 1, 1, kv_length, dtype=torch.bool, device=device)
    setattr(padding, LIMITS, (causal, window))
    return padding


def _at_the_end(q_length, kv_length, q_offset, kv_offset) -> bool:
    """Whether the last query stands at the last key."""
    if any(isinstance(offset, torch.Tensor) for offset in (q_offset, kv_offset)):
        return False
    return q_offset + q_length == kv_offset + kv_length


def forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: query ``[B, H, L, E]``, key ``[B, Hk, S, E]``, value
    ``[B, Hk, S, Ev]`` -> ``[B, L, H, Ev]``; no probabilities beside it.

    Raises ValueError for a mask of one row, not made by :func:`mask`, where the model is causal: it
    does not say whether later keys are seen.
    """
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: memlm's attention makes no matrix; 'eager' does")
    paged = getattr(key, PAGED, None)
    if paged is not None:
        return paged.attend(query, key, value, attention_mask, scaling, softcap, s_aux), None
    q_len = query.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = None
    if hasattr(attention_mask, LIMITS):
        is_causal, window = getattr(attention_mask, LIMITS)
    elif attention_mask is not None:
        if is_causal and attention_mask.shape[-2] != q_len:
            raise ValueError(
                f"attention_mask: got shape {list(attention_mask.shape)}, expected {q_len} rows"
            )
        is_causal = False
    if position_bias is not None:
        attention_mask = create_position_bias_mask(position_bias, attention_mask, False, query, key)
    sinks = None if s_aux is None else s_aux.float()
    out = attention(
        query, key, value, attention_mask, dropout, is_causal, scale=scaling, enable_gqa=True,
        window=window, to_end=True, softcap=softcap or 0.0, sinks=sinks,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, mask)
