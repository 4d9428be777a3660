"""The paged cache as one of transformers'::

    cache = memlm.hf.PagedCache(model.config, dtype="int4")
    model.generate(**inputs, cache=cache)

With ``attn_implementation="memlm"`` the stored blocks are read as they are, and padding is not
stored.  With others all of a layer is dequantised for them at every step, padding included.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from memlm.kv_cache import PagedKVCache, Step

# The attribute of new keys that says which layer of a PagedCache they are to be stored in.
PAGED = "memlm_paged"
LAYER_TYPES = ("full_attention", "sliding_attention")


class PagedLayer(CacheLayerMixin):
    """A layer of a :class:`PagedCache`, which does what concerns all of them."""

    def __init__(self, cache: PagedCache, index: int, window: int | None):
        super().__init__()
        self.cache, self.index, self.window = cache, index, window
        self.is_initialized = True  # there is nothing to prepare
        self.is_croppable = cache.pages.window is None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """New keys and values ``[B, kv_heads, L, head_dim]`` -> all there are, for the attention that
        comes next: for memlm's the new ones, marked."""
        if self.cache.reads_blocks:
            setattr(key_states, PAGED, self)
            return key_states, value_states
        return self.cache.dense(self, key_states, value_states)

    def attend(self, query, key, value, attention_mask, scaling, softcap, sinks) -> torch.Tensor:
        """``[B, L, H, head_dim]``, zeros for padding: see :meth:`PagedCache.attend`."""
        return self.cache.attend(self, query, key, value, attention_mask, scaling, softcap, sinks)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.seen

    def get_max_length(self) -> int:
        return -1


class PagedCache(Cache):
    """Keys and values of a batch in blocks: ``pages`` is the :class:`memlm.kv_cache.PagedKVCache`,
    ``sequences`` the handles of the batch's rows in it, and ``seen`` the tokens of each row, padding
    included.  Beams and repeated rows share their blocks.

    config: the model's.  dtype, block_tokens, blocks: as PagedKVCache takes them.

    Raises ValueError for models with layers of other attention than full and sliding windows.
    """

    def __init__(self, config, dtype: str = "bf16", block_tokens: int = 64, blocks: int | None = None):
        self.config = config.get_text_config(decoder=True)
        types, settings = get_layer_types_and_kwargs(self.config)
        if unknown := set(types) - set(LAYER_TYPES):
            raise ValueError(f"config: has layers of {sorted(unknown)}, accepted are {LAYER_TYPES}")
        windows = [given.get("sliding_window") for given in settings]
        heads = self.config.num_attention_heads
        kv_heads = getattr(self.config, "num_key_value_heads", None) or heads
        dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        widest = None if None in windows else max(windows)
        self.pages = PagedKVCache(len(types), kv_heads, dim, dtype, block_tokens, blocks, widest)
        self.sequences: list[int] = []
        self._valid = torch.empty(0, 0, dtype=torch.bool)  # [B, seen]: what is stored
        self._stores_padding: bool | None = None
        self._step: Step | None = None
        self._new: torch.Tensor | None = None  # [B, L]: of the step, what is stored
        self._angles: tuple | None = None  # those given to run, and the same for the library
        super().__init__(layers=[PagedLayer(self, i, w) for i, w in enumerate(windows)])

    @property
    def seen(self) -> int:
        return self._valid.shape[1]

    @property
    def reads_blocks(self) -> bool:
        return self.config._attn_implementation == "memlm"

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, filled or not."""
        return self.pages.nbytes

    # Steps of the model.

    def _begin(self, new: torch.Tensor, stores_padding: bool) -> None:
        """Opens a step for tokens ``new [B, L]``, of which False ones are not stored."""
        batch = new.shape[0]
        if self.seen == 0:
            self._forget()
            self.sequences = [self.pages.add() for _ in range(batch)]
            self._valid = torch.empty(batch, 0, dtype=torch.bool)
            self._stores_padding = stores_padding
        if batch != len(self.sequences):
            raise ValueError(f"keys: a batch of {batch}, the cache holds {len(self.sequences)}")
        if stores_padding != self._stores_padding:
            raise ValueError("attn_implementation: has changed since the cache was filled")
        counts = zip(self.sequences, new.sum(1).tolist())
        self._step = self.pages.begin_step({s: count for s, count in counts if count})
        self._new = new

    def _end(self, layer: PagedLayer) -> None:
        """After the last layer the step's tokens count."""
        if layer.index == len(self.layers) - 1:
            self.pages.commit(self._step)
            self._valid = torch.cat((self._valid, self._new), dim=1)
            self._step = self._new = self._angles = None

    def dense(self, layer: PagedLayer, key: torch.Tensor, value: torch.Tensor):
        """Stores new keys and values, padding too; returns all ``[B, kv_heads, seen + L, head_dim]``,
        as they are stored, in their dtype."""
        if layer.index == 0:
            everything = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
            self._begin(everything, stores_padding=True)
        flat = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
        self.pages.append(self._step, layer.index, *flat)
        read = [self.pages.read(s, layer.index, key.dtype, self._step) for s in self.sequences]
        self._end(layer)
        return tuple(torch.stack(both) for both in zip(*read))

    def attend(self, layer: PagedLayer, query, key, value, mask, scale, softcap, sinks) -> torch.Tensor:
        """Stores new keys and values, but for padding, and attends to all that is stored.

        query ``[B, H, L, D]``, key and value ``[B, kv_heads, L, D]``; mask as transformers makes it,
        causal beside padding and the layer's window; other masks raise ValueError.
        """
        stored = self._stored(layer, mask, query.shape[0], query.shape[2])
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        whole = bool(stored.all())
        q, k, v = (x.flatten(0, 1) if whole else x[stored] for x in (q, k, v))
        sinks = None if sinks is None else sinks.float()
        y = self.pages.attend(
            self._step, layer.index, q, k, v, scale, layer.window, softcap or 0.0, sinks=sinks
        )
        self._end(layer)
        if whole:
            return y.unflatten(0, stored.shape)
        out = y.new_zeros(*stored.shape, *y.shape[1:])
        out[stored] = y
        return out

    def run(self, native, index: int, x: torch.Tensor, angles, mask) -> torch.Tensor:
        """Layer ``index`` as one call (:class:`memlm.layers.native.NativeLayers`) of ``x [B, L, hidden]``;
        what it makes of padding is zeros.  ``angles``: transformers' cosines and sines, each
        ``[B or 1, L, head_dim]``; mask as :meth:`attend` takes it."""
        layer = self.layers[index]
        stored = self._stored(layer, mask, *x.shape[:2])
        if self._angles is None or self._angles[0] is not angles:
            cos, sin = (t.float()[..., : t.shape[-1] // 2].expand(*stored.shape, -1) for t in angles)
            self._angles = angles, torch.stack((-sin, sin, cos), dim=-2)[stored]
        y = x[stored]  # a copy: the layer works in place
        native.run(y, self.pages, self._step, self._angles[1], index, by_row=True)
        self._end(layer)
        if len(y) == stored.numel():
            return y.view_as(x)
        out = torch.zeros_like(x)
        out[stored] = y
        return out

    def _stored(self, layer: PagedLayer, mask, batch: int, count: int) -> torch.Tensor:
        """Of the step's tokens, what is stored, ``[B, L]``; the first layer opens the step."""
        if layer.index == 0:
            self._begin(self._seen_new(mask, batch, count, layer.window), stores_padding=False)
        return self._new

    def _seen_new(self, mask, batch: int, count: int, window: int | None) -> torch.Tensor:
        """Which new tokens are no padding, ``[B, L]``; ValueError for a mask that hides more than
        padding, what comes later, and what is before the window."""
        new = torch.ones(batch, count, dtype=torch.bool)
        if mask is None:
            return new
        seen = mask if mask.dtype == torch.bool else mask == 0
        total = self.seen + count
        seen = seen.expand(batch, -1, -1, -1)[:, 0, :, -total:]
        new = seen[:, :, -count:].any(1)
        if seen.shape[1] == 1 and count > 1:  # padding alone (memlm/hf_attention.py)
            return new
        before = self._valid if self.seen else self._valid.new_empty(batch, 0)
        valid = torch.cat((before, new), dim=1)[:, None]
        distance = torch.arange(self.seen, total)[:, None] - torch.arange(total)
        limits = (distance >= 0) & (distance < window) if window else distance >= 0
        # Rows of padding may be anything.
        if ((seen != (limits & valid)) & new[..., None]).any():
            raise ValueError("attention_mask: a PagedCache knows causal masks, padding and windows")
        return new

    # What generate does with it.

    def _forget(self) -> None:
        for s in self.sequences:
            self.pages.free(s)
        self.sequences = []

    def reset(self) -> None:
        """Empties the cache."""
        self._forget()
        self._valid, self._stores_padding = self._valid[:, :0], None

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` tokens of each row.  Raises ValueError for a positive
        number, and where the window before them has been evicted."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: got {tokens_to_remove}, accepted is 0 or below")
        valid = self._valid[:, : max(0, self.seen + tokens_to_remove)]
        for s, length in zip(self.sequences, valid.sum(1).tolist()):
            self.pages.truncate(s, length)
        self._valid = valid

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was: tables are copied, blocks are not."""
        kept, rows = set(), []
        indices = beam_idx.tolist()
        for i in indices:
            s = self.sequences[i]
            rows.append(self.pages.fork(s) if s in kept else s)
            kept.add(s)
        for s in self.sequences:
            if s not in kept:
                self.pages.free(s)
        self.sequences, self._valid = rows, self._valid[indices]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows: indices, or a bool of each row."""
        indices = torch.as_tensor(indices)
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self.reorder_cache(torch.arange(len(self.sequences)).repeat_interleave(repeats))
