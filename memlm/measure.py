"""How fast a model runs and what memory it takes, in this process."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import memlm
from memlm import memory
from memlm.models.decoder import Decoder
from memlm.models.generate import generate

PREFILL_TOKENS, DECODE_TOKENS, DECODE_PROMPT, REPEATS = 512, 64, 32, 3


@dataclass(frozen=True)
class Speed:
    """``load_s``: seconds until the model is ready (files in the page cache); ``resident_bytes``:
    by how much this process's resident memory grew from before loading to after running (mapped
    weights, KV cache, what malloc holds back); ``memory``: all of it by part, at the end, with the
    KV cache of ``prefill_tokens`` tokens (:class:`memlm.memory.Account`); tokens per second of
    ``prefill_tokens`` at once and of decoding one by one, each the median."""

    load_s: float
    resident_bytes: int
    memory: dict[str, int]
    prefill_tokens: int
    prefill_tps: float
    decode_tps: float
    threads: int
    isa: str

    def to_dict(self) -> dict:
        return asdict(self)


def measure(
    path: str | Path,
    dtype: torch.dtype | None = None,
    pages: str = "mapped",
    kv: str | None = None,
) -> Speed:
    """Loads the decoder at ``path`` (``dtype`` and ``pages`` as :func:`memlm.load` has them) and times
    it, with a cache of type ``kv`` (:meth:`Decoder.new_cache`).  For honest memory call it in a fresh
    process.

    Raises TypeError for a model that is no decoder.
    """
    before, base = memory.resident_bytes(), memory.baseline()
    memory.reset_peak()
    start = time.perf_counter()
    model = memlm.load(path, dtype, pages=pages)
    load_s = time.perf_counter() - start
    if not isinstance(model, Decoder):
        raise TypeError(f"{path}: speed is measured for decoders, this is {type(model).__name__}")
    length = min(PREFILL_TOKENS, model.config.max_positions // 2)
    # Any tokens do: the work does not depend on them.
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.manual_seed(0))
    prefill = []
    with torch.inference_mode():
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            model(ids, model.new_cache(kv), last_only=True)
            prefill.append(time.perf_counter() - start)
    stamps = [
        time.perf_counter()
        for _ in generate(model, ids[0, :DECODE_PROMPT].tolist(), DECODE_TOKENS + 1, kv=kv)
    ]
    steps = [b - a for a, b in zip(stamps, stamps[1:])]
    resident = memory.resident_bytes() - before
    cache = model.new_cache(kv)
    with torch.inference_mode():
        model(ids, cache, last_only=True)
    return Speed(
        load_s=load_s,
        resident_bytes=resident,
        memory=memory.account(base, model, cache).to_dict(),
        prefill_tokens=length,
        prefill_tps=length / statistics.median(prefill[1:]),
        decode_tps=1 / statistics.median(steps),
        threads=torch.get_num_threads(),
        isa=memlm.isa(),
    )
