"""Rows as tables: plain text for the terminal, Markdown for the document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .results import Row

HEADER = ("case", "dtype", "mode", "gradient", "version", "time", "IQR", "× floor", "× best rival", "GB/s", "extra")


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    unit, factor = next((u, f) for u, f in (("s", 1), ("ms", 1e3), ("µs", 1e6)) if value * f >= 1 or u == "µs")
    return f"{value * factor:.3g} {unit}"


def size(value: float | None) -> str:
    if value is None:
        return ""
    unit, factor = next((u, f) for u, f in (("GiB", 30), ("MiB", 20), ("KiB", 10)) if value >= 1 << f or u == "KiB")
    return f"{value / (1 << factor):.3g} {unit}"


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def cells(row: Row) -> tuple[str, ...]:
    case = row.case + (f" ({row.padding:.0%} padding)" if row.padding else "")
    head = (case, row.dtype, row.mode, row.gradient, row.provider)
    if row.status != "ok":
        return (*head, row.status, *[""] * (len(HEADER) - len(head) - 1))
    achieved = "" if row.achieved is None else f"{row.achieved / 1e9:.1f}"
    return (*head, seconds(row.median_s), seconds(row.iqr_s), number(row.x_floor), number(row.x_best_rival, 1),
            achieved, size(row.extra_bytes))  # fmt: skip


def text(rows: Iterable[Row]) -> str:
    table = [HEADER, *map(cells, rows)]
    widths = [max(len(line[k]) if len(line[k]) < 60 else 0 for line in table) for k in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
    )


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)])
