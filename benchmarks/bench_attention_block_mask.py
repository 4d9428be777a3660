"""``attention`` with block masks of several densities, forward and backward, beside itself without
a mask, torch's function with the mask's elements, and torch's flex_attention: docs/attention.md.

    python -m benchmarks.bench_attention_block_mask [--record]

All of a case by turns in one process, each call alone after all threads have come to rest; the
median.  flex_attention has no backward on the CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks import bench_attention, harness
from memlm import limits, ops

RESULTS = Path(__file__).parent / "results" / "attention_block_mask.json"
HEADS, BLOCK, ROUNDS = 8, 128, 5
DENSITIES = (1.0, 0.5, 0.25, 0.1)
BACKWARD = ("dense", "memlm", "torch")


@dataclass(frozen=True)
class Case:
    """Self-attention of one sequence, f32.  Each block of queries sees the block of itself, and
    others at random, so many that ``density`` of its blocks are seen: of all, or if causal of those
    up to itself.  The heads share one mask: torch's function would take 537 MB for eight."""

    length: int
    dim: int
    causal: bool
    density: float

    def inputs(self) -> list[torch.Tensor]:
        """q, k, v and the gradient of the result, laid out by token."""
        torch.manual_seed(0)
        made = (torch.randn(1, self.length, HEADS, self.dim).transpose(1, 2) for _ in range(4))
        *qkv, grad = made
        return [*(x.requires_grad_() for x in qkv), grad]

    def blocks(self) -> torch.Tensor:
        """The block mask."""
        generator = torch.Generator().manual_seed(0)
        n = -(-self.length // BLOCK)
        mask = torch.eye(n, dtype=torch.bool)
        for i in range(n):
            others = [j for j in range(i if self.causal else n) if j != i]
            count = max(0, round(self.density * (len(others) + 1)) - 1)
            for place in torch.randperm(len(others), generator=generator)[:count]:
                mask[i, others[place]] = True
        return mask

    def elements(self) -> torch.Tensor:
        """bool [length, length]: what each query sees."""
        mask = self.blocks().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        mask = mask[: self.length, : self.length]
        return mask.tril() if self.causal else mask

    def flex_mask(self) -> BlockMask:
        blocks = self.blocks()

        def sees(batch, head, i, j):
            block = blocks[i // BLOCK, j // BLOCK]
            return block & (j <= i) if self.causal else block

        length = self.length
        return create_block_mask(sees, None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)

    def candidates(self) -> dict[str, Callable]:
        """By name, functions of q, k, v; all but ``dense`` compute the same."""
        torch._dynamo.reset()  # flex_attention is compiled for every case: there is a limit
        ours = partial(ops.attention, is_causal=self.causal)
        return {
            "dense": ours,
            "memlm": partial(ours, block_mask=self.blocks(), mask_block=BLOCK),
            "torch": partial(F.scaled_dot_product_attention, attn_mask=self.elements()),
            "flex": partial(torch.compile(flex_attention), block_mask=self.flex_mask()),
        }


CASES = [
    Case(8192, dim, causal, density)
    for dim in (64, 128)
    for causal in (False, True)
    for density in DENSITIES
]


@dataclass(frozen=True)
class Measurement:
    """Of one case, candidate and direction.  ``share``: of the pairs of dense attention that are
    seen; ``ms``: median."""

    case: Case
    candidate: str
    backward: bool
    share: float
    ms: float
    threads: int
    limit_gmacs: float
    isa: str
    device: str
    memlm: str
    torch: str
    commit: str


def times(case: Case, rounds: int) -> dict[tuple[str, bool], float]:
    """Median seconds by candidate and direction.

    Raises AssertionError where those that should do not compute the same."""
    *qkv, grad = case.inputs()
    plain = [x.detach() for x in qkv]
    calls, results = {}, {}
    for name, function in case.candidates().items():
        calls[name, False] = partial(function, *plain)
        results[name] = [function(*plain)]
        if name in BACKWARD:
            call = partial(torch.autograd.grad, function(*qkv), qkv, grad, retain_graph=True)
            calls[name, True] = call
            results[name] += call()
    for name in ("torch", "flex"):
        bench_attention.assert_same(results["memlm"], results[name], f"{case}: {name}")
    return bench_attention.medians(calls, rounds)


def measure(case: Case, rounds: int, threads: int, limit: float) -> list[Measurement]:
    pairs = case.length * (case.length + 1) // 2 if case.causal else case.length**2
    share, run = int(case.elements().sum()) / pairs, harness.run()
    return [
        Measurement(case, name, backward, share, 1e3 * median, threads, limit, **run)
        for (name, backward), median in times(case, rounds).items()
    ]


HEAD = (
    "| size | | density | of the pairs | forward, ms | dense | of dense | torch | flex | "
    "backward, ms | dense | of dense | torch |\n| ---: | --- |" + " ---: |" * 11 + "\n"
)
BEGIN, END = "<!-- block masks -->\n", "<!-- end of block masks -->\n"


def row(results: list[Measurement]) -> str:
    """Of one case."""
    case, ms = results[0].case, {(r.candidate, r.backward): r.ms for r in results}
    cells = [str(case.dim), "causal" if case.causal else "all", f"{case.density:g}"]
    cells += [f"{results[0].share:.3f}"]
    for backward in (False, True):
        ours, dense = ms["memlm", backward], ms["dense", backward]
        cells += [f"{ours:,.0f}", f"{dense:,.0f}", f"**{ours / dense:.3f}**"]
        cells += [f"{ms['torch', backward]:,.0f}"]
        if not backward:
            cells += [f"{ms['flex', backward]:,.0f}"]
    return "| " + " | ".join(cells) + " |"


def write(results: list[list[Measurement]]) -> None:
    """Puts the table into docs/attention.md, and all measurements into benchmarks/results."""
    first = results[0][0]
    where = (
        f"{first.device} ({first.isa}), {first.threads} threads, torch {first.torch}; "
        f"{first.case.length:,} tokens, {HEADS} heads, f32; f32 reaches {first.limit_gmacs:.0f} "
        "GMAC/s in the same run.\n\n"
    )
    bench_attention.record(BEGIN, END, where + HEAD, map(row, results), RESULTS, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--record", action="store_true", help="write docs/attention.md and the results"
    )
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="timed calls of each (%(default)s)"
    )
    parser.add_argument("--length", type=int, help="tokens, in place of each case's own")
    given = parser.parse_args()
    if given.record and given.length:
        parser.error("--record: is for the cases' own lengths")
    threads, results = torch.get_num_threads(), []
    limit = limits.measure(threads).f32_gmacs
    print(HEAD, end="")
    for case in CASES:
        if given.length:
            case = Case(given.length, case.dim, case.causal, case.density)
        results.append(measure(case, given.rounds, threads, limit))
        print(row(results[-1]), flush=True)
        if given.record:
            write(results)


if __name__ == "__main__":
    main()
