"""The plan, drawn: bars of memory by part, in the terminal or as an image."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from memlm.plan import PARTS, Advice, Prediction

COLOURS = {  # of the terminal, of the image
    "base": ("bright_black", "#9e9e9e"),
    "weights": ("blue", "#1f77b4"),
    "kv_cache": ("cyan", "#17becf"),
    "gradients": ("magenta", "#e377c2"),
    "optimizer": ("red", "#d62728"),
    "activations": ("green", "#2ca02c"),
    "logits": ("yellow", "#ff9f1c"),
    "temporary": ("white", "#d9c27e"),
}
LABELS = {"base": "torch, Python", "kv_cache": "KV cache"}
NOTE = (
    "for a process that calls memlm.memory.return_freed(): by default malloc keeps freed blocks, "
    "and a process may take half as much again or more (docs/memory.md)"
)
BAR = 36  # characters of the longest bar


def label(part: str) -> str:
    return LABELS.get(part, part)


def name(prediction: Prediction) -> str:
    s = prediction.settings
    return s.format + (", checkpointed" if s.checkpoint else "")


def size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def describe(prediction: Prediction) -> str:
    """The settings and their total on one line."""
    s = prediction.settings
    how = f"{name(prediction)}, context {s.context:,}, batch {s.batch}"
    return f"{how}: {size(prediction.total)}"


def _bar(prediction: Prediction, longest: int) -> Text:
    """Cumulative sums are rounded, so that the bar's length is right to half a character."""
    bar, total, drawn = Text(), 0, 0
    for part, count in prediction.parts.items():
        total += count
        end = round(total / longest * BAR)
        bar.append("█" * (end - drawn), style=COLOURS[part][0])
        drawn = end
    return bar


def table(advice: Advice) -> Table:
    """What was asked for in every format, by part, and whether it fits."""
    rows = advice.tried
    shown = [part for part in PARTS if any(p.parts[part] for p in rows)]
    longest = max(p.total for p in rows)
    drawn = Table(box=None, pad_edge=False)
    drawn.add_column("MB")
    for part in shown:
        heading = Text(f"■ {label(part)}", style=COLOURS[part][0])
        drawn.add_column(heading, justify="right", min_width=6)
    drawn.add_column("total", justify="right")
    drawn.add_column(f"of {size(advice.ram)}", justify="right")
    drawn.add_column("")
    for p in rows:
        fits = p.total <= advice.ram
        share = Text(f"{p.total / advice.ram:.0%}", style="green" if fits else "red")
        cells = [f"{p.parts[part] / 1e6:,.0f}" for part in shown]
        drawn.add_row(name(p), *cells, f"{p.total / 1e6:,.0f}", share, _bar(p, longest))
    return drawn


def conclusion(advice: Advice) -> str:
    if advice.chosen is None:
        over = size(advice.smallest.total - advice.ram)
        least = f"the least is {describe(advice.smallest)}, {over} too much"
        return f"nothing fits {size(advice.ram)}: {least}"
    return f"recommended: {describe(advice.chosen)}"


def draw(advice: Advice, title: str, path: Path) -> None:
    """The same as an image.  Raises ImportError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("plot: matplotlib is missing; pip install 'memlm[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(advice.tried)
    if advice.chosen is not None and advice.chosen not in rows:
        rows.append(advice.chosen)
    figure, axis = plt.subplots(figsize=(10, 1.6 + 0.55 * len(rows)), layout="constrained")
    for part in PARTS:
        widths = [p.parts[part] / 1e9 for p in rows]
        lefts = [sum(p.parts[x] for x in PARTS[: PARTS.index(part)]) / 1e9 for p in rows]
        if any(widths):
            axis.barh(range(len(rows)), widths, left=lefts, color=COLOURS[part][1],
                      label=label(part), height=0.65)  # fmt: skip
    for y, p in enumerate(rows):
        axis.annotate(size(p.total), (p.total / 1e9, y), (5, 0), textcoords="offset points",
                      va="center", fontsize=9,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
    names = []
    for p in rows:
        s = p.settings
        asked = p in advice.tried
        text = name(p) if asked else f"{name(p)}\ncontext {s.context:,}, batch {s.batch}"
        names.append(f"▸ {text}" if p == advice.chosen else text)
    axis.set_yticks(range(len(rows)), names)
    axis.invert_yaxis()
    axis.axvline(advice.ram / 1e9, color="black", linestyle="--", linewidth=1.2,
                 label=f"limit, {size(advice.ram)}")  # fmt: skip
    most = max(p.total for p in rows) / 1e9
    # A limit far beyond everything would leave the bars no room.
    axis.set_xlim(0, 1.15 * max(most, min(advice.ram / 1e9, 2 * most)))
    axis.set(xlabel="GB, peak resident memory", title=title)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=9, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
