"""What the loss adds to a training step and to a chain of layers, against the lines that were set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .cases import DTYPES
from .results import Row
from .tables import markdown, number, seconds, size

TIME_LINES = {"token": 0.03, "cls": 0.01}  # of the step without the loss
RESOLUTION = 1 << 20  # of a peak: code that a run is the first to use counts too
MEMORY_SEQUENCES = 32  # with fewer the peak is in the optimizer's step, whatever the loss takes
CHAIN_LINE = 5.0  # times less than the eager form adds


def verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


@dataclass(frozen=True)
class Added:
    """One step with the loss beside the same step without."""

    row: Row
    base: Row

    @property
    def share(self) -> float:
        return self.row.added_s / self.base.median_s

    @property
    def spread(self) -> float:
        """Half the 95 % interval of the median of the paired differences (McGill's notches), as a share."""
        return 1.57 * self.row.iqr_s / math.sqrt(self.row.rounds) / self.base.median_s

    @property
    def time_line(self) -> str:
        line = TIME_LINES[self.row.case.rsplit("-", 1)[-1]]
        if self.share - self.spread <= line < self.share + self.spread:
            return f"≤ {line:.0%}: not distinguishable"
        return f"≤ {line:.0%}: {verdict(self.share <= line)}"

    @property
    def sequences(self) -> int:
        return self.row.rows if self.row.case.endswith("cls") else self.row.rows // 128

    @property
    def memory_line(self) -> str:
        """At most the step without the loss and the gradients to the rows of the student's layers, to within 1 MiB."""
        row = self.row
        if row.extra_bytes is None or self.sequences < MEMORY_SEQUENCES:
            return ""
        allowed = self.base.extra_bytes + row.m * row.rows * row.D * DTYPES[row.dtype].itemsize
        return f"≤ {size(allowed)}: {verdict(row.extra_bytes <= allowed + RESOLUTION)}"


def pairs(rows: Sequence[Row], prefix: str) -> list[Added]:
    """Every step of the cases with this prefix, with the first of its case and size, which has no loss."""
    some = [row for row in rows if row.suite == "step" and row.case.startswith(prefix)]
    bases: dict[tuple[str, int], Row] = {}
    for row in some:
        bases.setdefault((row.case, row.rows), row)
    return [Added(row, bases[row.case, row.rows]) for row in some]


def step_table(rows: Sequence[Row]) -> str:
    header = ("case", "sequences", "dtype", "step", "time", "added", "share, ± 95 %", "line", "peak memory", "line")
    lines = []
    for pair in pairs(rows, "step-"):
        row, ours = pair.row, "fused ALP" in pair.row.provider
        added = ("", "") if row is pair.base else (milliseconds(row.added_s), f"{pair.share:+.1%} ± {pair.spread:.1%}")
        lines.append((
            row.case, str(pair.sequences), row.dtype, row.provider, seconds(row.median_s), *added,
            pair.time_line if ours else "", size(row.extra_bytes), pair.memory_line if ours else "",
        ))  # fmt: skip
    return markdown(header, lines) if lines else ""


def chain_table(rows: Sequence[Row]) -> str:
    header = ("case", "by", "time", "added", "times less than eager", "line")
    lines = []
    eager: dict[str, float] = {}
    for pair in pairs(rows, "chain-"):
        row = pair.row
        if row is pair.base:
            lines.append((row.case, row.provider, seconds(row.median_s), "", "", ""))
            continue
        eager.setdefault(row.case, row.added_s)  # the first after the chain alone
        factor = eager[row.case] / row.added_s
        line = f"≥ {CHAIN_LINE:.0f}: {verdict(factor >= CHAIN_LINE)}" if row.provider.endswith("in place") else ""
        added = milliseconds(row.added_s)
        lines.append((row.case, row.provider, seconds(row.median_s), added, number(factor, 1), line))
    return markdown(header, lines) if lines else ""


def chain_shares(rows: Sequence[Row]) -> list[str]:
    """What the loss adds to the chain, which a step's noise does not hide, as a share of the shortest whole step."""
    said = []
    for pooling, share in TIME_LINES.items():
        added = [pair.row for pair in pairs(rows, f"chain-6-{pooling}") if "fused ALP" in pair.row.provider]
        steps = [pair.row for pair in pairs(rows, "step-") if pair.row is pair.base and pair.row.case.endswith(pooling)]
        steps = [row for row in steps if added and row.rows == added[0].rows]
        if added and steps:
            least, step = min(row.added_s for row in added), min(row.median_s for row in steps)
            said.append(f"With {pooling} rows of {added[0].m} layers the loss adds {milliseconds(least)[1:]} to the "
                        f"chain below. That is {least / step:.2%} of the shortest KD step of as many sequences "
                        f"({seconds(step)}; line: {share:.0%}).")  # fmt: skip
    return said


def memory_table(rows: Sequence[Row]) -> str:
    """Peak memory by how the hidden states are had; the first row of a case keeps none."""
    some = [row for row in rows if row.suite == "memory" and row.kind == "capture"]
    least: dict[str, int] = {}
    for row in some:
        least.setdefault(row.case, row.extra_bytes)
    lines = [
        (row.case, row.provider, row.mode, size(row.extra_bytes),
         f"{(row.extra_bytes - least[row.case]) / 2**20:+.1f} MiB" if row.extra_bytes != least[row.case] else "")
        for row in some
    ]  # fmt: skip
    return markdown(("case", "by", "mode", "peak memory", "added"), lines) if lines else ""


def milliseconds(value: float) -> str:
    return f"{value * 1e3:+.1f} ms"
