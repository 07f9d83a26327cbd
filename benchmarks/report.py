"""Draw the results and write docs/benchmarks.md: ``python -m benchmarks.report [FILES]``.

Every figure comes from a row of the CSV files. README.md takes the claims over where it has the two markers.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import measure, pictures, results, steps, tables
from .cases import CLS, DTYPES, LOSS, POOLING, PROJECTION
from .results import RIVALS, Row
from .steps import verdict
from .tables import markdown, number, seconds, size

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
BOTH = "forward+backward"
TOKENS = ("bert-base-6", "bert-base-4", "bert-base-2")  # README.md shows the first that was measured on a device
MAIN_CASES = {  # and these, and how it names the rows
    **dict.fromkeys(TOKENS, "tokens"),
    "cls-6": "[CLS] rows",
    "cls-6-dense": "[CLS] rows of whole hidden states",
}
QUIET = 0.05  # with more of the CPU time taken by other processes a row is not quoted
PACE = 0.85  # nor where the processor gave less than this share of its best measured peak: a busy host behind a VM


@dataclass(frozen=True)
class Target:
    """A line that was set before anything was measured."""

    gpu: bool
    case: str
    dtype: str
    floor: float | None  # CPU: at most so many times the floor; GPU: at least this share of the copy floor
    rival: float | None  # at least so many times faster than the best rival


CLS_SECONDS, CLS_RIVAL = 15e-6, 10  # on a GPU: at most so long there; so many times faster by wall time, also replayed
TARGETS = [
    *(Target(False, f"bert-base-{m}", "fp32", 1.4, 10) for m in (2, 4, 6)),
    *(Target(False, f"bert-base-{m}", "bf16", 2.0, 5) for m in (2, 4, 6)),
    Target(False, "bert-large-12", "fp32", 2.0, 10),
    Target(False, "cls-6", "fp32", None, 8),
    Target(True, "bert-base-6", "bf16", 0.75, 8),
    *(Target(True, f"bert-base-{m}", dtype, 0.8, 8) for m in (2, 4) for dtype in ("bf16", "fp32")),
    Target(True, "bert-large-12", "bf16", 0.6, 8),
    Target(True, "decoder-16", "bf16", 0.5, 5),
    Target(True, "cls-6", "fp32", None, CLS_RIVAL),
]
TARGET_HEADER = ("case", "rows", "n", "m", "D", "dtype", "version", "time", "against the floor", "line", "× best rival",
                 "line", "best rival", "gradient ≠ 1: × floor / × rival")  # fmt: skip


def is_gpu(row: Row) -> bool:
    return "CUDA" in row.versions


def share_of_copy_floor(row: Row) -> float:
    return (row.bytes_read + row.bytes_written) / row.copy_bandwidth / row.median_s


def ours(rows: Sequence[Row], **fields: object) -> list[Row]:
    """Our timed rows that may be quoted, of the rows of one device."""
    best: dict[str, float] = {}  # by dtype: some processors multiply 16 bits faster
    for row in rows:
        best[row.dtype] = max(best.get(row.dtype, 0.0), row.peak or 0.0)
    return [
        row for row in rows
        if row.kind == "ours" and row.median_s is not None and matches(row, **fields) and (row.disturbed or 0) <= QUIET
        and (row.peak is None or is_gpu(row) or row.peak >= PACE * best[row.dtype])
    ]  # fmt: skip


def matches(row: Row, **fields: object) -> bool:
    return all(getattr(row, name) == value for name, value in fields.items())


def opponents(rows: Sequence[Row], mine: Row) -> list[Row]:
    """The rivals that were timed beside a row of ours."""
    return [
        row for row in rows
        if row.kind in RIVALS and row.median_s is not None
        and matches(row, run=mine.run, case=mine.case, dtype=mine.dtype, mode=mine.mode, gradient=mine.gradient,
                    padding=mine.padding)
    ]  # fmt: skip


def with_other_gradient(rows: Sequence[Row], mine: Row) -> list[Row]:
    """The row of the same version with an incoming gradient that is not 1, if there is one."""
    same = ours(rows, case=mine.case, dtype=mine.dtype, mode=mine.mode, provider=mine.provider, padding=mine.padding)
    return [row for row in same if row.gradient not in ("1", "65536")]


def in_order(rows: Sequence[Row]) -> list[Row]:
    """By case as benchmarks/cases.py lists them, deep students first; rows of one test stay as they were."""
    known = [*LOSS, *CLS, *POOLING, *PROJECTION]
    dtypes = list(DTYPES)

    def place(row: Row) -> tuple[object, ...]:
        case = known.index(row.case) if row.case in known else len(known)
        depth = (-row.m, row.rows) if row.suite == "step" else (0, 0)
        return case, depth, dtypes.index(row.dtype) if row.dtype else 0, row.padding, row.mode, row.gradient != "1"

    return sorted(rows, key=place)


def claims(rows: Sequence[Row]) -> str:
    """The table of the lines that were set, with what was measured, reached or not."""
    lines = []
    for target in TARGETS:
        for row in ours(rows, case=target.case, dtype=target.dtype, mode=BOTH, gradient="1", padding=0.0):
            if is_gpu(row) != target.gpu or row.suite not in ("loss", "cls"):
                continue
            floor = line = rival = other = ""
            if target.floor is not None and target.gpu:
                share = share_of_copy_floor(row)
                floor = f"{share:.1%} of the copy floor"
                line = f"≥ {target.floor:.0%}: {verdict(share >= target.floor)}"
            elif target.floor is not None:
                floor, line = f"{number(row.x_floor)} ×", f"≤ {target.floor}: {verdict(row.x_floor <= target.floor)}"
            if row.x_best_rival is not None:
                rival = f"≥ {target.rival}: {verdict(row.x_best_rival >= target.rival)}"
            for again in with_other_gradient(rows, row):
                other = f"{number(again.x_floor)} / {number(again.x_best_rival, 1)}"
            lines.append((row.case, str(row.rows), str(row.n), str(row.m), str(row.D), row.dtype, row.provider,
                          seconds(row.median_s), floor, line, number(row.x_best_rival, 1), rival, row.best_rival,
                          other))  # fmt: skip
    return markdown(TARGET_HEADER, lines) if lines else ""


def small_claims(rows: Sequence[Row]) -> list[str]:
    """Overhead, memory, the dense gradient of [CLS] views, and what a training step pays: one sentence each."""
    said = []
    for row in ours(rows, suite="overhead"):
        said.append(
            f"A call without work to do (forward + backward) costs {seconds(row.median_s)}, "
            f"{number(1 / row.x_best_rival)} times a bare autograd.Function with the same arguments (line: 2.5)."
        )
    for row in rows:
        if row.suite == "memory" and row.kind == "ours" and row.extra_bytes is not None:
            said.append(f"{row.case} in {row.dtype} ({row.provider}) takes {size(row.extra_bytes)} beyond inputs and "
                        f"gradients with {row.threads} threads.")  # fmt: skip
    for row in ours(rows, case="cls-6", gradient="1"):
        if not is_gpu(row):
            continue
        if row.mode == BOTH:
            reached = verdict(row.median_s <= CLS_SECONDS)
            said.append(f"[CLS] rows in {row.dtype} ({row.provider}) take {seconds(row.median_s)} of GPU time "
                        f"(line: {seconds(CLS_SECONDS)}: {reached}).")  # fmt: skip
        elif row.mode == f"{BOTH} (CUDA graph)" and row.x_best_rival is not None:
            reached = verdict(row.x_best_rival >= CLS_RIVAL)
            said.append(f"[CLS] rows in {row.dtype} ({row.provider}), replayed as a CUDA graph, take "
                        f"{seconds(row.wall_s)}, {number(row.x_best_rival, 1)} times less than {row.best_rival} "
                        f"(line: {CLS_RIVAL}: {reached}).")  # fmt: skip
    for view in ours(rows, case="cls-6", dtype="fp32", mode=BOTH, gradient="1"):
        for dense in ours(rows, case="cls-6-dense", dtype="fp32", mode=BOTH, gradient="1", provider=view.provider):
            said.append(f"[CLS] rows given as views take {seconds(view.wall_s)} ({view.provider}); down to the hidden "
                        f"states, with their dense zero gradient, {seconds(dense.wall_s)}, "
                        f"{number(dense.x_best_rival, 1)} times less than the best rival.")  # fmt: skip
    return said


def scaling_table(rows: Sequence[Row]) -> str:
    lines = []
    axes = {"tokens": "rows", "n": "n", "m": "m", "D": "D", "padding": "padding", "threads": "threads"}
    for axis, field in axes.items():
        points: dict[str, list[Row]] = {}
        for row in rows:
            if row.case == f"scaling-{axis}":
                points.setdefault(row.provider, []).append(row)
        for provider, timed in points.items():
            timed.sort(key=lambda row: getattr(row, field))
            values = ", ".join(f"{getattr(row, field):g}: {seconds(row.median_s)}" for row in timed)
            fitted = ""
            if axis not in ("padding", "threads") and len(timed) >= 3:
                fitted = number(measure.slope([(getattr(row, field), row.median_s) for row in timed[-3:]]))
            lines.append((axis, provider, values, fitted))
    return markdown(("axis", "version", "time at", "slope of the last three, log-log"), lines)


def section(device: str, rows: list[Row], pictures_folder: Path) -> str:
    """Everything about one device."""
    full = [row for row in rows if row.threads == max(r.threads for r in rows)]
    first, last = (pick(row.run for row in rows) for pick in (min, max))
    parts = [
        f"## {device}",
        f"Measured {first[:10]}{'' if first[:10] == last[:10] else ' to ' + last[:10]} with "
        f"{max(row.threads for row in rows)} threads; {' / '.join(sorted({row.versions for row in rows}))}; commit "
        f"{', '.join(sorted({row.commit for row in rows}))}. Commands:",
        "```\n" + "\n".join(sorted({row.command for row in rows})) + "\n```",
        "### Against the lines that were set",
        claims(full) or "No row for these yet.",
        "\n".join(f"- {sentence}" for sentence in small_claims(full)),
    ]
    drawn = pictures.draw_all(full, pictures_folder, slug(device))
    titles = {
        "floor": "Times the floor", "speedup": "Speed-up over the best rival", "roofline": "Roofline",
        "tokens": "Time and memory against tokens", "step": "What the loss adds to a training step",
    }  # fmt: skip
    for name, title in titles.items():
        if name in drawn:
            parts += [f"### {title}", picture(f"{slug(device)}-{name}", title, pictures_folder.name)]
        if name == "tokens" and any(row.suite == "scaling" for row in rows):
            parts.append(scaling_table(rows))
        if name == "step":
            parts += [steps.step_table(full), "\n".join(f"- {sentence}" for sentence in steps.chain_shares(full))]
    for title, table in (
        ("What the loss adds to a chain of layers", steps.chain_table(full)),
        ("Peak memory by how the hidden states are had", steps.memory_table(full)),
    ):
        parts += [f"### {title}", table] if table else []
    timed = [row for row in full if row.suite in ("loss", "cls", "pooling", "projection")]
    every = markdown(tables.HEADER, map(tables.cells, timed))
    parts += ["### All rows", f"<details><summary>{len(timed)} rows</summary>\n\n{every}\n\n</details>"]
    return "\n\n".join(part for part in parts if part)


def main_cases(rows: Sequence[Row]) -> list[Row]:
    """BERT-base to 6 layers, on tokens and on [CLS] rows; to fewer where 6 were not measured on tokens."""
    timed = [row for case in MAIN_CASES for row in ours(rows, case=case, mode=BOTH, gradient="1", padding=0.0)
             if row.suite in ("loss", "cls")]  # fmt: skip
    tokens = next((case for case in TOKENS if any(row.case == case for row in timed)), "")
    return [row for row in timed if row.case == tokens or row.case not in TOKENS]


def main_table(rows: Sequence[Row]) -> str:
    gpu = is_gpu(rows[0])
    lines = []
    for row in main_cases(rows):
        again = with_other_gradient(rows, row)
        lines.append((
            f"{row.rows} {MAIN_CASES[row.case]}, {row.n} → {row.m} layers of {row.D}", row.dtype, row.provider,
            seconds(row.median_s), f"{number(row.x_floor)} ×" if row.suite == "loss" else "",
            f"{number(row.x_best_rival, 1)} × over {row.best_rival}, the best of {len(opponents(rows, row))}",
            f"{seconds(again[0].median_s)}, {number(again[0].x_best_rival, 1)} ×" if again else "",
        ))  # fmt: skip
    header = ("rows and layers", "dtype", "backend", "GPU time" if gpu else "time", "time / floor",
              "speed-up over the best rival", "gradient ≠ 1: time, speed-up")  # fmt: skip
    return markdown(header, lines)


def lone_calls(rows: Sequence[Row]) -> str:
    """What GPU time leaves out, of the fastest version in each dtype."""
    said = []
    for dtype in DTYPES:
        some = [row for row in main_cases(rows) if row.case in TOKENS and row.dtype == dtype]
        for row in sorted(some, key=lambda row: row.median_s)[:1]:
            rival = min(other.wall_s for other in opponents(rows, row))
            said.append(f"{seconds(row.wall_s)} in {dtype}, {number(rival / row.wall_s, 1)} × less than the best rival")
    return (
        "GPU time is taken on the device, with the launches queued ahead as behind a model's forward. A lone call, "
        f"from Python to the last kernel's end, takes {'; '.join(said)}."
    )


def in_short(rows: list[Row], folder: str) -> str:
    """What README.md shows: the main cases on the GPU and on the CPU measured last, and a picture of the first."""
    parts, shown = [], []
    for gpu in (True, False):
        some = [row for row in rows if is_gpu(row) == gpu and row.case in MAIN_CASES]
        device = max(some, key=lambda row: row.run).device if some else ""
        here = [row for row in some if row.device == device]
        quoted = main_cases(here)
        if not quoted:
            continue
        last = max(row.run for row in quoted)[:10]
        commits = ", ".join(sorted({row.commit for row in quoted}))
        parts += [f"{device}, {max(row.threads for row in here)} threads, {last}, commit {commits}:", main_table(here)]
        parts += [lone_calls(here)] if gpu else []
        shown.append(picture(f"{slug(device)}-speedup", "Speed-up over the best rival", folder))
    return "\n\n".join([*parts, *shown[:1]]) or "No row for these yet."


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def picture(name: str, title: str, folder: str) -> str:
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}-dark.png">'
        f'<img alt="{title}" src="{folder}/{name}-light.png" width="{pictures.WIDTH_PX}"></picture>'
    )


def document(rows: list[Row], files: Sequence[Path], folder: Path) -> str:
    given = " ".join(f"benchmarks/results/{path.name}" for path in files)
    devices = sorted({row.device for row in rows})
    missing = "" if any(map(is_gpu, rows)) else "GPU figures: not measured yet.\n\n"
    sections = "\n\n".join(section(d, [row for row in rows if row.device == d], folder) for d in devices)
    return f"""# Benchmarks

Made by `python -m benchmarks.report {given}`. Every figure is a row of these files; `pytest benchmarks/` adds rows.

{missing}- *floor*: the larger of two times. Memory: every valid input row read once and every gradient element written
  once, at the best bandwidth of plain streams with that mix of reads and writes, measured in the same run.
  Arithmetic: the operations of the formulas at the rate of a large matrix product in the dtype or in fp32, or on a
  CPU of a convolution in fp32, whichever is fastest, measured in the same run (in rows of commits before
  8ecf4d4: of the matrix product alone). No plain stream of PyTorch or the C library writes as fast as stores past the
  caches do, so rows that hardly read ("dense", "last") may take less than their floor.
- *best rival*: the fastest right one of the eager forms, the public implementations' forms, and these under
  torch.compile. To save time only a full run times them all; a default run leaves out the slowest two eager forms and
  compiles one to three: on a CPU those that full runs found the best, on a GPU the better of the two that were tried.
  README.md says how many rivals a figure stands on.
- Every version is checked against float64 on the benchmark's own input first. One that is wrong is not timed.
- Versions take turns in one process. Inputs rotate, so that none is found in the last-level cache. Before every call
  with [CLS] rows on a CPU the caches are filled with something else: a step comes to its loss with neither its data nor
  its code in them. Times are medians; warm-up and compile time are not in them.
- On a CPU the C library is told to keep freed memory, as allocators made for training do. With glibc's defaults the
  page faults of every new tensor come on top, for ours and for the rivals: rows marked (default malloc).
- Rows during which other processes took more than {QUIET:.0%} of the CPU time, or beside which the processor gave less
  than {PACE:.0%} of the best multiply-add rate measured on it, are not in the first table.
- *time* on a GPU is taken between two events there, with the launches queued ahead.
- *gradient*: the incoming gradient. 1 costs the fused backward no pass; any other value, as a weight of the loss makes
  it, costs one.
- What a step adds is the median of the differences to the step without the loss beside it, and ± half that median's
  95 % interval. A line inside the interval is not distinguishable. The line on memory was set for 32 sequences.
- *extra*: peak memory of a call beyond its inputs and the tensors that it returns.

{sections}
"""


def with_claims(text: str, block: str) -> str:
    """Replace what stands between the markers."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{block}\n\n{END}{after}"


def published(files: Sequence[Path]) -> list[Row]:
    """The newest rows of the files, in order."""
    return in_order(results.latest(results.read(files)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(results.RESULTS.glob("*.csv")))
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    rows = published(options.files)
    if not rows:
        raise SystemExit("there are no results yet; run pytest benchmarks/ first")
    folder = options.out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    (options.out / "benchmarks.md").write_text(document(rows, options.files, folder))
    readme = ROOT / "README.md"
    if BEGIN in readme.read_text():
        readme.write_text(with_claims(readme.read_text(), in_short(rows, "docs/pictures")))
    print(f"{options.out / 'benchmarks.md'} and its pictures are written")


if __name__ == "__main__":
    main()
