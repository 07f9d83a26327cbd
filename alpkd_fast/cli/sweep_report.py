"""The sweep's table, its bootstrap intervals against plain KD, and its plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..hf.extras import require
from .report import print_table, pyplot, write_json
from .sweep_runs import run_path
from .training import Work

BASELINE = "kd"


def report(args: argparse.Namespace, methods: Sequence[str], work: Work) -> int:
    """Summarise the finished runs into summary.json, table.md and sweep.png; return the exit status."""
    output = Path(args.output)
    teacher = json.loads((output / "sweep.json").read_text())
    rows = [
        _row(method, depth, _runs(output, method, depth, args.seeds), baseline, work, args.resamples)
        for depth in args.depths
        for baseline in (_runs(output, BASELINE, depth, args.seeds),)
        for method in methods
    ]
    main = work.task.main_metric
    score = teacher["teacher"]["metrics"][main]
    write_json(output / "summary.json", {"metric": main, "teacher": score, "rows": rows})
    header = ("method", "layers", main, f"against {BASELINE}", "95 % interval", "entropy", "seconds", "")
    cells = [cells_of(row) for row in rows]
    print_table(f"{work.task.name}: teacher {100 * score:.1f}", header, cells)
    lines = ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *cells)]
    (output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _plot(output / "sweep.png", rows, score, work.task.name, main, methods, args.depths)
    return 0


def _runs(output: Path, method: str, depth: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
    paths = [run_path(output, method, depth, seed) for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def _row(
    method: str, depth: int, runs: list[dict[str, Any]], baseline: list[dict[str, Any]], work: Work, resamples: int
) -> dict[str, Any]:
    np = require("numpy", "the table")
    main = work.task.main_metric
    values = [run["metrics"][main] for run in runs]
    entropies = [v for run in runs for k, v in run["last_log"].items() if k.startswith("alp_entropy")]
    row: dict[str, Any] = {
        "method": method,
        "depth": depth,
        "values": values,
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "entropy": float(np.mean(entropies)) if entropies else None,
        "seconds": float(np.mean([run["train_seconds"] for run in runs])),
        "difference": None,
        "interval": None,
    }
    if method != BASELINE and len(baseline) == len(runs) and runs[0]["predictions"]:
        labels = np.array([example["labels"] for example in work.validation])
        ours, theirs = (np.array([run["predictions"] for run in group]) for group in (runs, baseline))

        def metric(predicted: Any, truth: Any) -> float:
            return work.task.metric(predicted, truth)[main]

        row["difference"] = row["mean"] - float(np.mean([run["metrics"][main] for run in baseline]))
        row["interval"] = paired_interval(metric, ours, theirs, labels, resamples)
    return row


def paired_interval(
    metric: Callable[[Any, Any], float], ours: Any, theirs: Any, labels: Any, resamples: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean difference of a metric between two methods.

    Each resample draws validation rows and seeds with replacement, the same for both methods, so that what
    is hard for both cancels.

    Args:
        ours, theirs: (seeds, N) predictions. labels: (N,).
    """
    np = require("numpy", "the bootstrap")
    generator = np.random.default_rng(0)
    seeds, count = ours.shape
    differences = np.empty(resamples)
    for index in range(resamples):
        rows = generator.integers(count, size=count)
        drawn = generator.integers(seeds, size=seeds)
        truth = labels[rows]
        by_seed = {s: metric(ours[s, rows], truth) - metric(theirs[s, rows], truth) for s in set(drawn.tolist())}
        differences[index] = np.mean([by_seed[s] for s in drawn.tolist()])
    tail = 50 * (1 - level)
    low, high = np.percentile(differences, [tail, 100 - tail])
    return float(low), float(high)


def cells_of(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of summary.json as the table shows it."""
    spread = "" if row["sd"] is None else f" ± {100 * row['sd']:.1f}"
    difference, interval, verdict = "", "", ""
    if row["interval"] is not None:
        low, high = row["interval"]
        difference = f"{100 * row['difference']:+.1f}"
        interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
        verdict = "not distinguishable" if low <= 0 <= high else ("better" if low > 0 else "worse")
    entropy = "" if row["entropy"] is None else f"{row['entropy']:.2f}"
    return (
        row["method"],
        str(row["depth"]),
        f"{100 * row['mean']:.1f}{spread}",
        difference,
        interval,
        entropy,
        f"{row['seconds']:.0f}",
        verdict,
    )


def _plot(
    path: Path,
    rows: list[dict[str, Any]],
    teacher: float,
    task: str,
    metric: str,
    methods: Sequence[str],
    depths: Sequence[int],
) -> None:
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    width = 0.8 / len(methods)
    for k, method in enumerate(methods):
        of_method = {row["depth"]: row for row in rows if row["method"] == method}
        at = [i + (k - (len(methods) - 1) / 2) * width for i in range(len(depths))]
        means = [100 * of_method[d]["mean"] for d in depths]
        axis.errorbar(at, means, [100 * (of_method[d]["sd"] or 0) for d in depths], fmt="o", capsize=3, label=method)
        for x, d in zip(at, depths, strict=True):
            values = [100 * v for v in of_method[d]["values"]]
            axis.plot([x] * len(values), values, "k.", ms=3, alpha=0.4)
    axis.axhline(100 * teacher, color="gray", ls="--", lw=1, label="teacher")
    axis.set(xticks=range(len(depths)), xlabel="student layers", ylabel=f"{task} {metric} × 100")
    axis.set_xticklabels(list(depths))
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)
