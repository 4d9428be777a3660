"""Pictures of measurements."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .harness import Measurement

if TYPE_CHECKING:
    from .sparse import Line

MARKERS = "os^Dvp*XP<>h"
Name = tuple[str, str]  # impl, format


def pyplot():
    """matplotlib's pyplot, or None (with a warning) where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        warnings.warn("matplotlib is not installed (pip install 'memlm[plots]'): no plot")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _names(results: list[Measurement]) -> list[Name]:
    return list(dict.fromkeys((r.impl, r.format) for r in results))


def _styles(names: list[Name]) -> dict[Name, dict]:
    """A colour for each library, a marker for each of its candidates; memlm's black and on top."""
    libraries = list(dict.fromkeys(impl.split("_")[0] for impl, _ in names))
    others = [library for library in libraries if library != "memlm"]
    styles, seen = {}, dict.fromkeys(libraries, 0)
    for name in names:
        library = name[0].split("_")[0]
        ours = library == "memlm"
        styles[name] = {
            "color": "black" if ours else f"C{others.index(library)}",
            "marker": MARKERS[seen[library] % len(MARKERS)],
            "zorder": 3 if ours else 2,
            "label": " ".join(name),
            "markersize": 5,
            "linewidth": 1,
            "alpha": 0.85,
        }
        seen[library] += 1
    return styles


def _most_threads(results: list[Measurement]) -> list[Measurement]:
    threads = max(r.threads for r in results)
    return [r for r in results if r.threads == threads]


def _finish(figure, path: Path, plt) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def roofline(results: list[Measurement], path: Path) -> None:
    """Speed over intensity (multiply-adds per byte of weights), below the machine's roofs, with the
    most threads that were measured."""
    if not (plt := pyplot()):
        return
    results = _most_threads(results)
    figure, axis = plt.subplots(figsize=(10, 6), layout="constrained")
    intensities = [r.macs / r.weight_bytes for r in results]
    low, high = min(intensities) / 2, max(intensities) * 2
    roofs = {r.arithmetic: r.limit_gops for r in results}
    bandwidth = results[0].limit_gbps
    for style, (arithmetic, roof) in zip(("-", "--"), sorted(roofs.items())):
        xs = sorted({low, min(max(roof / bandwidth, low), high), high})
        axis.plot(xs, [min(bandwidth * x, roof) for x in xs], style, color="black", linewidth=1,
                  label=f"limit, {arithmetic}: {roof:.0f} GMAC/s")  # fmt: skip
    for name, style in _styles(_names(results)).items():
        points = [(x, r.gops) for x, r in zip(intensities, results) if (r.impl, r.format) == name]
        axis.plot(*zip(*sorted(points)), linestyle="", **style)
    axis.set(xscale="log", yscale="log", xlabel="multiply-adds per byte of weights",
             ylabel="10⁹ multiply-adds per second",
             title=f"{results[0].op} on {results[0].device}, {results[0].threads} threads, "
                   f"{bandwidth:.0f} GB/s")  # fmt: skip
    axis.grid(which="major", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _finish(figure, path, plt)


def ratios(results: list[Measurement], reference: Name, path: Path) -> None:
    """Each candidate's time over that of ``reference``, for each m, a panel for each W, with the
    most threads that were measured.  Above 1 the reference is faster."""
    if not (plt := pyplot()):
        return
    from matplotlib.ticker import LogLocator, NullLocator

    results = _most_threads(results)
    base = {(r.n, r.k, r.m): r.us for r in results if (r.impl, r.format) == reference}
    shapes = list(dict.fromkeys((n, k) for n, k, _ in base))
    ms = sorted({m for _, _, m in base})
    styles = _styles(_names(results))
    figure, axes = plt.subplots(
        1, len(shapes), figsize=(3 + 4 * len(shapes), 7), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (n, k) in zip(axes[0], shapes):
        for name, style in styles.items():
            points = [
                (ms.index(r.m), r.us / base[n, k, r.m])
                for r in results
                if (r.impl, r.format) == name and (r.n, r.k) == (n, k) and (n, k, r.m) in base
            ]
            if points and name != reference:
                axis.plot(*zip(*sorted(points)), **style)
        axis.axhline(1, color="black", linewidth=2)
        axis.set(yscale="log", title=f"W {n}x{k}", xlabel="rows of x (m)")
        axis.set_xticks(range(len(ms)), [str(m) for m in ms])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"time / time of {' '.join(reference)}")
    handles = {}
    for axis in axes[0]:
        lines, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, lines))
    figure.legend(handles.values(), handles.keys(), fontsize=8, frameon=False,
                  loc="outside right center")  # fmt: skip
    title = f"{results[0].op} on {results[0].device}, {results[0].threads} threads"
    figure.suptitle(title, x=0.01, ha="left")  # the legend stands on the right
    _finish(figure, path, plt)


def sparse(lines: list[Line], path: Path) -> None:
    """Time over that of the dense product, by the share of W that is stored: a panel for each m, the
    largest W of each format; dotted, the largest ratio that is wanted."""
    if not (plt := pyplot()):
        return
    largest = max(line.n * line.k for line in lines)
    lines = [line for line in lines if line.n * line.k == largest]
    ms = sorted({line.m for line in lines})
    figure, axes = plt.subplots(
        1, len(ms), figsize=(3 + 3.5 * len(ms), 5), sharey=True, squeeze=False, layout="constrained"
    )
    formats = list(dict.fromkeys(line.format for line in lines))
    for axis, m in zip(axes[0], ms):
        for i, format in enumerate(formats):
            of_format = sorted(
                (line for line in lines if (line.m, line.format) == (m, format)),
                key=lambda line: line.density,
            )
            stored = [line.density for line in of_format]
            axis.plot(stored, [line.time_ratio for line in of_format], f"{MARKERS[i]}-",
                      color=f"C{i}", label=format, markersize=5, linewidth=1)  # fmt: skip
            if format.startswith("block") and of_format[0].most_time:
                axis.plot(stored, [line.most_time for line in of_format], ":", color=f"C{i}")
        axis.axhline(1, color="black", linewidth=1)
        axis.set(title=f"m={m}", xlabel="share of W that is stored", xlim=(0, 1), ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("time / time of the dense product")
    axes[0][-1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    first = lines[0]
    title = f"W {first.n}x{first.k} on {first.device}, {first.threads} threads"
    figure.suptitle(title, x=0.01, ha="left")
    _finish(figure, path, plt)
