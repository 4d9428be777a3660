"""The demo's report: Markdown tables, and plots where matplotlib is installed."""

from __future__ import annotations

import warnings
from pathlib import Path

from memlm.models.evaluate import WINDOW

# Heading, unit, and how a row shows the value.
DECODER_COLUMNS = (
    ("format", "", lambda r: r["format"]),
    ("on disk", "MB", lambda r: f"{r['disk_bytes'] / 1e6:.1f}"),
    ("resident", "MB", lambda r: f"{r['resident_bytes'] / 1e6:.0f}"),
    ("load", "s", lambda r: f"{r['load_s']:.2f}"),
    ("prefill", "tokens/s", lambda r: f"{r['prefill_tps']:.0f}"),
    ("decode", "tokens/s", lambda r: f"{r['decode_tps']:.1f}"),
    ("perplexity", "", lambda r: f"{r['perplexity']:.2f}"),
    ("KL", "nats", lambda r: f"{r['kl']:.5f}"),
    ("same top", "%", lambda r: f"{100 * r['agreement']:.1f}"),
)
ENCODER_COLUMNS = (
    ("format", "", lambda r: r["format"]),
    ("on disk", "MB", lambda r: f"{r['disk_bytes'] / 1e6:.1f}"),
    ("cosine to f32", "mean", lambda r: f"{r['cosine_mean']:.5f}"),
    ("cosine to f32", "least", lambda r: f"{r['cosine_min']:.5f}"),
    ("same nearest", "%", lambda r: f"{100 * r['same_nearest']:.1f}"),
)


def markdown_table(columns, rows: list[dict]) -> str:
    """Rows of dicts as a Markdown table."""
    headings = [f"{heading}, {unit}" if unit else heading for heading, unit, _ in columns]
    lines = [headings, ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[show(row) for *_, show in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(result: dict, folder: Path) -> Path:
    """Writes ``report.md`` (and ``demo.png``) for what :func:`memlm.demo.run` measured; returns the
    report's path."""
    limits, device = result["limits"], result["device"]
    picture = plot(result, folder / "demo.png")
    text = f"""# memlm demo

{device["cpu"]}, {device["threads"]} threads, {device["isa"]}; memlm {result["versions"]["memlm"]},
torch {result["versions"]["torch"]}. Limits measured in the same run: memory
{limits["dram_gbps"]:.1f} GB/s, f32 {limits["f32_gmacs"]:.0f} and int8 {limits["i8_gmacs"]:.0f}
billion multiply-adds per second.

## {result["model"]} (decoder)

{markdown_table(DECODER_COLUMNS, result["rows"])}

Perplexity on Moby-Dick: {result["rows"][0]["tokens"]:,} predictions in windows of {WINDOW} tokens;
KL divergence per token and how often the likeliest token is the same, against f32. Prefill of
{result["rows"][0]["prefill_tokens"]} tokens at once.
Resident: growth of the process from before loading to after running; load: with the file in the
page cache.

**About the 4-bit figures:** the publisher of this model rounded its weights to 4 bits (Q4_1: an
offset and a scale for 32 weights) before memlm read them. int4 has the same groups and finds that
grid again, which flatters it; int4a-g64, with groups of 64, does not. The true float weights of
{result["encoder"]} below show what int4 costs.
{f"{chr(10)}![The decoder in every format]({picture.name}){chr(10)}" if picture else ""}
## {result["encoder"]} (encoder)

{markdown_table(ENCODER_COLUMNS, result["encoder_rows"])}

Embeddings of {result["encoder_rows"][0]["sentences"]} sentences of Moby-Dick, and how often the
nearest other sentence is the same, against f32.

## A question to the int4 decoder

> {result["chat"]["question"]}

{chr(10).join("> " + line for line in result["chat"]["answer"].splitlines())}
"""
    path = folder / "report.md"
    path.write_text(text, "utf-8")
    return path


def plot(result: dict, path: Path) -> Path | None:
    """Bars for every format, and the decoding speed against what memory bandwidth allows."""
    try:
        import matplotlib
    except ImportError:
        warnings.warn("matplotlib is not installed (pip install 'memlm[plots]'): no plots")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, limit = result["rows"], result["limits"]["dram_gbps"] * 1e9
    names = [row["format"] for row in rows]
    colours = ["#9aa5b1", "#7b8794", "#3e7cb1", "#d1495b", "#e8a5ad"][: len(rows)]
    panels = (
        ("resident memory, MB", [r["resident_bytes"] / 1e6 for r in rows], "{:.0f}"),
        ("decode, tokens/s", [r["decode_tps"] for r in rows], "{:.0f}"),
        ("prefill, tokens/s", [r["prefill_tps"] for r in rows], "{:.0f}"),
        ("perplexity, above f32", [r["perplexity"] / rows[0]["perplexity"] - 1 for r in rows], "{:+.2%}"),
    )  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 3.6), layout="constrained")
    for axis, (title, values, format) in zip(axes, panels):
        bars = axis.bar(names, values, color=colours, width=0.65)
        axis.bar_label(bars, [format.format(v) for v in values], padding=2, fontsize=9)
        axis.set_title(title, fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.18)
        axis.yaxis.set_visible(False)
    # What reading every weight once per token would allow.
    for i, row in enumerate(rows):
        bound = limit / row["disk_bytes"]
        axes[1].plot([i - 0.33, i + 0.33], [bound, bound], color="black", linewidth=1.2,
                     label="memory bandwidth / bytes" if i == 0 else None)  # fmt: skip
    axes[1].legend(fontsize=8, frameon=False, loc="upper left")
    device = result["device"]
    figure.suptitle(
        f"{result['model']} on {device['cpu']}, {device['threads']} threads", fontsize=10
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
