"""The pictures of the report, each once for light and once for dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import steps
from .results import Row

WIDTH_PX = 760  # at which the pictures are shown; they are drawn at twice that
BOTH = "forward+backward"
THEMES = {
    "light": {"page": "#ffffff", "ink": "#1f2328", "faint": "#d1d9e0"},
    "dark": {"page": "#0d1117", "ink": "#e6edf3", "faint": "#3d444d"},
}
COLORS = {"ours": "#2f81f7", "eager": "#d9822b", "compiled": "#8f6ed5", "public": "#b35c77", "base": "#8b949e"}
MARKS = {"ours": "o", "eager": "s", "compiled": "D", "public": "^"}
NAMES = {"ours": "alpkd_fast", "eager": "best eager form", "compiled": "best compiled form"}


def style(theme: dict[str, str]) -> dict[str, object]:
    return {
        "figure.facecolor": theme["page"], "axes.facecolor": theme["page"], "savefig.facecolor": theme["page"],
        "text.color": theme["ink"], "axes.labelcolor": theme["ink"], "axes.edgecolor": theme["faint"],
        "xtick.color": theme["ink"], "ytick.color": theme["ink"], "grid.color": theme["faint"],
        "axes.grid": True, "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False,
        "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10, "legend.frameon": False, "legend.fontsize": 9,
    }  # fmt: skip


def best(rows: list[Row], kind: str) -> Row | None:
    timed = [row for row in rows if row.kind == kind and row.median_s is not None]
    return min(timed, key=lambda row: row.median_s, default=None)


def by_case(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of the loss and [CLS] suites: forward + backward, incoming gradient 1 (fp16: the loss scale)."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.suite in ("loss", "cls") and row.mode == BOTH and row.gradient in ("1", "65536") and not row.padding:
            groups.setdefault(f"{row.case}\n{row.dtype}", []).append(row)
    return groups


def bars(ax: Axes, labels: list[str], series: dict[str, list[float | None]], form: str) -> None:
    """Horizontal bars, one group per label, with their values written beside them."""
    height = 0.8 / len(series)
    y = np.arange(len(labels))
    for k, (name, values) in enumerate(series.items()):
        color = COLORS.get(name, list(COLORS.values())[k])
        drawn = ax.barh(y + (k - (len(series) - 1) / 2) * height, [v or 0 for v in values], height * 0.92, color=color)
        ax.bar_label(drawn, ["" if v is None else form.format(v) for v in values], padding=3, fontsize=8)
    ax.set_yticks(y, [label.replace("\n", "  ") for label in labels])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)


def floor(rows: list[Row]) -> Figure | None:
    groups = {label: group for label, group in by_case(rows).items() if not label.startswith("cls")}
    timed = [row for group in groups.values() for row in group if row.median_s is not None]
    backends = sorted({row.provider for row in timed if row.kind == "ours"})
    if not backends:
        return None
    height = 0.9 + 0.28 * len(groups) * max(1, len(backends) * 0.8)
    figure, ax = plt.subplots(figsize=(7.6, height), layout="constrained")
    series = {
        backend: [next((r.x_floor for r in group if r.provider == backend), None) for group in groups.values()]
        for backend in backends
    }
    bars(ax, list(groups), series, "{:.2f}")
    ax.axvline(1, color=plt.rcParams["text.color"], linewidth=1)
    ax.set_xlabel("time / floor (1 = what the machine allows; smaller is better)")
    if len(backends) > 1:
        figure.legend(ax.containers, backends, loc="outside lower center", ncols=len(backends))
    return figure


def speedup(rows: list[Row]) -> Figure | None:
    mine: dict[str, Row] = {}  # the fastest of ours by what is compared: time on the device, or wall time
    for label, group in by_case(rows).items():
        compared = [row for row in group if row.kind == "ours" and row.x_best_rival is not None]
        if compared:
            mine[label] = max(compared, key=lambda row: row.x_best_rival)
    if not mine:
        return None
    figure, ax = plt.subplots(figsize=(7.6, 0.9 + 0.28 * len(mine)), layout="constrained")
    bars(ax, list(mine), {"ours": [row.x_best_rival for row in mine.values()]}, "")
    labels = [f"{row.x_best_rival:.1f} × over {row.best_rival}" for row in mine.values()]
    ax.bar_label(ax.containers[0], labels, padding=3, fontsize=8)
    ax.margins(x=0.3)
    ax.axvline(1, color=plt.rcParams["text.color"], linewidth=1)
    ax.set_xlabel("best rival's time / alpkd_fast's time (larger is better)")
    return figure


def roofline(rows: list[Row]) -> Figure | None:
    groups = [group for label, group in by_case(rows).items() if not label.startswith("cls")]
    measured = {row.dtype for group in groups for row in group if row.peak}
    dtypes = [dtype for dtype in ("fp32", "bf16", "fp16") if dtype in measured]
    if not dtypes:
        return None
    figure, axes = plt.subplots(1, len(dtypes), figsize=(7.6, 3.9), sharey=True, layout="constrained", squeeze=False)
    for ax, dtype in zip(axes[0], dtypes, strict=True):
        here = [group for group in groups if group[0].dtype == dtype]
        example = next(row for group in here for row in group if row.peak)
        # To where the roof is flat, so that its height can be written on it
        end = max(64, 2 ** math.ceil(math.log2(2 * example.peak / example.bandwidth)))
        intensities = np.geomspace(1, end, 50)
        memory, compute = example.bandwidth * intensities, np.full(50, example.peak)
        ax.plot(intensities, np.minimum(memory, compute) / 1e9, color=plt.rcParams["text.color"], linewidth=1.5)
        ax.text(1.7, example.bandwidth / 1e9, f"{example.bandwidth / 1e9:.0f} GB/s", fontsize=8)
        height = f"{example.peak / 1e9:.0f} Gop/s" if example.peak < 1e13 else f"{example.peak / 1e12:.0f} Top/s"
        ax.text(end, example.peak / 1e9 * 1.1, height, ha="right", fontsize=8)
        for kind, name in NAMES.items():
            points = [row for group in here if (row := best(group, kind)) is not None]
            x = [row.operations / (row.bytes_read + row.bytes_written) for row in points]
            ax.scatter(x, [row.operations / row.median_s / 1e9 for row in points], s=34, marker=MARKS[kind],
                       color=COLORS[kind], label=name, zorder=3)  # fmt: skip
        ax.set(xscale="log", yscale="log", title=dtype, xlabel="operations per byte of the floor")
        ticks = [2**k for k in range(end.bit_length())][:: 1 if end <= 128 else 2]
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
    axes[0][0].set_ylabel("operations per second (Gop/s)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def tokens(rows: list[Row]) -> Figure | None:
    points = sorted((row for row in rows if row.case == "scaling-tokens" and row.median_s), key=lambda row: row.rows)
    if not points:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.6), layout="constrained")
    for provider in dict.fromkeys(row.provider for row in points):
        some = [row for row in points if row.provider == provider]
        look = {"color": COLORS[some[0].kind], "marker": MARKS[some[0].kind], "markersize": 5}
        name = "eager, " + provider if some[0].kind == "eager" else f"alpkd_fast, {provider}"
        left.plot([r.rows for r in some], [r.median_s * 1e3 for r in some], label=name, **look)
        right.plot([r.rows for r in some], [(r.extra_bytes or 0) / 2**20 for r in some], label=name, **look)
    mine = [row for row in points if row.kind == "ours"]
    left.plot([r.rows for r in mine], [r.floor_s * 1e3 for r in mine], "--", color=COLORS["base"], label="floor")
    left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="time (ms)", title="forward + backward")
    right.set(xscale="log", xlabel="tokens", ylabel="MiB", title="memory beyond inputs and gradients")
    right.set_yscale("symlog", linthresh=1)
    right.set_ylim(bottom=0)
    ticks = [r.rows for r in mine]
    for ax in (left, right):
        ax.set_xticks(ticks, [f"{t // 1024} Ki" if t >= 1024 else str(t) for t in ticks], fontsize=8)
        ax.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def step(rows: list[Row]) -> Figure | None:
    pairs = steps.pairs(rows, "step-")
    if not pairs:
        return None

    def label(pair: steps.Added) -> str:
        return f"{pair.row.case}\n{pair.sequences} seq."

    cases = list(dict.fromkeys(label(pair) for pair in pairs))
    names = {"KD": "base", "KD + eager ALP": "eager", "KD + fused ALP": "ours"}
    figure, ax = plt.subplots(figsize=(7.6, 1.2 + 0.75 * len(cases)), layout="constrained")
    found = {(label(pair), pair.row.provider): pair for pair in pairs}
    series = {color: [found[case, name].row.median_s for case in cases] for name, color in names.items()}
    bars(ax, cases, series, "")
    for name, drawn in zip(names, ax.containers, strict=True):
        labels = [f"{found[case, name].row.median_s:.3g} s" for case in cases]
        if name != "KD":
            shares = [found[case, name] for case in cases]
            labels = [f"{text}, {p.share:+.1%} ± {p.spread:.1%}" for text, p in zip(labels, shares, strict=True)]
        if name == "KD + fused ALP":
            labels = [f"{text} (line {p.time_line})" for text, p in zip(labels, shares, strict=True)]
        ax.bar_label(drawn, labels, padding=3, fontsize=8)
    ax.set_xlabel("time of a training step (s), and what the loss adds to it")
    ax.margins(x=0.9)
    figure.legend(ax.containers, names, loc="outside lower center", ncols=3)
    return figure


PICTURES: dict[str, Callable[[list[Row]], Figure | None]] = {
    function.__name__: function for function in (floor, speedup, roofline, tokens, step)
}


def draw_all(rows: list[Row], folder: Path, prefix: str) -> set[str]:
    """Draw what there are rows for, in both themes; return the names."""
    drawn = set()
    for name, draw in PICTURES.items():
        for theme, colors in THEMES.items():
            with plt.rc_context(style(colors)):
                figure = draw(rows)
                if figure is not None:
                    figure.savefig(folder / f"{prefix}-{name}-{theme}.png", dpi=200, metadata={"Software": None})
                    plt.close(figure)
                    drawn.add(name)
    return drawn
