"""What a run leaves: a table on the console, metrics as JSON, plots as PNG."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..hf.extras import require


def write_json(path: Path, values: Any) -> None:
    """Write so that an interruption leaves the old file or the new one, never half of one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console, table = require("rich.console", "the table"), require("rich.table", "the table")
    made = table.Table(title=title)
    for index, name in enumerate(header):
        made.add_column(name, justify="left" if index == 0 else "right")
    for row in rows:
        made.add_row(*row)
    console.Console().print(made)


def pyplot() -> Any:
    require("matplotlib", "plots").use("Agg")
    return require("matplotlib.pyplot", "plots")


def plot_curves(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Losses over the steps above, and what was evaluated, if anything was, below."""
    plt = pyplot()
    evaluated = sorted({k for row in history for k in row if k.startswith("eval_") and _is_metric(k)})
    panels = [("loss", ["loss", "ce", "kd", "alp"])] + [("validation", evaluated)] * bool(evaluated)
    figure, axes = plt.subplots(len(panels), 1, figsize=(7, 3.2 * len(panels)), squeeze=False, layout="constrained")
    for axis, (label, names) in zip(axes[:, 0], panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in history if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), marker="." if name in evaluated else None, label=name)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _is_metric(name: str) -> bool:
    return not any(part in name for part in ("runtime", "per_second"))


def plot_attention(path: Path, attention: Sequence[Sequence[float]], student_layers: Sequence[int]) -> None:
    """Heat map (student layer, teacher layer) of the mean attention at the end of training."""
    plt = pyplot()
    m, n = len(attention), len(attention[0])
    figure, axis = plt.subplots(figsize=(1.5 + 0.5 * n, 1.2 + 0.5 * m), layout="constrained")
    image = axis.imshow(attention, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for i, row in enumerate(attention):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if value < 0.6 else "k")
    axis.set(xlabel="teacher layer", ylabel="student layer", xticks=range(n), yticks=range(m))
    axis.set_yticklabels(list(student_layers))
    figure.colorbar(image, label="mean attention")
    figure.savefig(path, dpi=120)
    plt.close(figure)
