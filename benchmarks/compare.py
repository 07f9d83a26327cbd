"""Compare two commits: ``python -m benchmarks.compare BASE HEAD``.

Checks both out side by side, builds them, runs the quick set of ours in turns (A B A B ...) with the benchmarks of this
checkout, and prints time(HEAD) / time(BASE) with its spread over the turns. Above 1 is slower.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import results
from .tables import seconds

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """The commit in a folder of its own, built, with this checkout's benchmarks."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), commit], cwd=ROOT, check=True)
    try:
        subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=folder, check=True)
        shutil.rmtree(folder / "benchmarks", ignore_errors=True)
        shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, check=True)


def measure(folder: Path, csv: Path, marker: str) -> dict[tuple[str, ...], float]:
    """Median times of ours in one run, by case and provider. pytest starts in the folder, so its package is the one."""
    csv.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "benchmarks", "--quick", "--ours-only", "-q", "-m", marker,
               "-p", "no:cacheprovider", "--results", str(csv)]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    rows = results.read([csv])
    expected = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=folder, capture_output=True, text=True)
    if any(row.commit.split("+")[0] != expected.stdout.strip() for row in rows):
        raise SystemExit(f"{folder}: another copy of alpkd_fast was measured; run outside of an installed checkout")
    return {
        (row.case, row.dtype, row.mode, row.gradient, row.provider): row.median_s
        for row in rows if row.kind == "ours" and row.median_s is not None
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("head")
    parser.add_argument("--turns", type=int, default=3, help="runs of each commit")
    parser.add_argument("-m", dest="marker", default="loss or cls", help="which suites, as pytest's -m")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base = stack.enter_context(checked_out(options.base, temporary / "base"))
        head = stack.enter_context(checked_out(options.head, temporary / "head"))
        csv, marker = temporary / "rows.csv", options.marker
        turns = [(measure(base, csv, marker), measure(head, csv, marker)) for _ in range(options.turns)]
    for key in turns[0][0]:
        if any(key not in after for _, after in turns):
            print(f"{' '.join(key):<60} not in {options.head}")
            continue
        ratios = [after[key] / before[key] for before, after in turns]
        print(f"{' '.join(key):<60} {statistics.median(ratios):6.3f}  ({min(ratios):.3f} to {max(ratios):.3f})  "
              f"{seconds(turns[-1][0][key])} -> {seconds(turns[-1][1][key])}")  # fmt: skip


if __name__ == "__main__":
    main()
