"""One schema for every result: a row is one provider on one case in one run. Files are CSV and only grow."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

import alpkd_fast

RESULTS = Path(__file__).parent / "results"
RIVALS = ("eager", "public", "compiled")  # the kinds that ours are compared with


@dataclass
class Row:
    # the run
    run: str = ""  # UTC start of the run, ISO 8601
    command: str = ""
    commit: str = ""
    device: str = ""
    threads: int = 0
    versions: str = ""
    # the case
    suite: str = ""  # the marker
    case: str = ""
    m: int = 0
    n: int = 0
    D: int = 0
    rows: int = 0
    valid_rows: int = 0
    padding: float = 0.0
    dtype: str = ""
    mode: str = ""  # "forward", "forward+backward", with " (CUDA graph)" where replayed
    gradient: str = "1"  # the incoming gradient
    # the provider
    provider: str = ""
    kind: str = ""  # "ours", "eager", "public", "compiled", "part" (attention alone), "bare", "step", "capture"
    status: str = "ok"  # or why there is no figure
    error: float | None = None  # against the float64 reference
    tolerance: float | None = None
    # the figures
    rounds: int | None = None
    median_s: float | None = None  # GPU: between events on the device
    iqr_s: float | None = None  # of the times; for a step with the loss, of what it adds
    wall_s: float | None = None  # median wall time of a call
    disturbed: float | None = None  # share of the CPU time that other processes took meanwhile
    bytes_read: int | None = None
    bytes_written: int | None = None
    operations: int | None = None
    bandwidth: float | None = None  # bytes/s of the best plain stream with the case's mix
    copy_bandwidth: float | None = None
    peak: float | None = None  # operations/s
    floor_s: float | None = None
    floor_bound: str = ""  # "memory" or "compute"
    x_floor: float | None = None
    best_rival: str = ""
    x_best_rival: float | None = None  # the best rival's time over this one's (wall time for [CLS] rows)
    achieved: float | None = None  # bytes/s
    added_s: float | None = None  # a step's time over that of the step without the loss, median of paired turns
    extra_bytes: int | None = None
    launches: int | None = None
    compile_s: float | None = None

    def key(self) -> tuple[object, ...]:
        """What two runs on the same machine have in common when they measure the same thing."""
        return (self.device, self.threads, self.suite, self.case, self.rows, self.n, self.m, self.D, self.padding,
                self.dtype, self.mode, self.gradient, self.provider)  # fmt: skip


_FIELDS = {field.name: str(field.type) for field in fields(Row)}


def append(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(_FIELDS)
        writer.writerows([_text(getattr(row, name)) for name in _FIELDS] for row in rows)


def _text(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def read(paths: Iterable[Path]) -> list[Row]:
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            for record in csv.DictReader(file):
                if record.keys() != _FIELDS.keys():
                    raise ValueError(f"{path}: its columns are not those of benchmarks/results.py; measure anew")
                rows.append(Row(**{name: _value(_FIELDS[name], text) for name, text in record.items()}))
    return rows


def _value(kind: str, text: str) -> object:
    if "None" in kind and text == "":
        return None
    return int(text) if kind.startswith("int") else float(text) if kind.startswith("float") else text


def latest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each key, in the order of the files."""
    newest: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if row.key() not in newest or newest[row.key()].run <= row.run:
            newest[row.key()] = row
    return list(newest.values())


def serves(row: Row, run: Row) -> bool:
    """Whether a run that resumes finds in the row what it would measure. A row with rivals serves a run without."""
    then, now = set(row.command.split()), set(run.command.split())
    decisive = {"--quick", "--full", "--default-malloc"}
    return (
        (row.commit, row.device, row.threads) == (run.commit, run.device, run.threads)
        and then & decisive == now & decisive
        and ("--ours-only" not in then or "--ours-only" in now)
    )


def commit() -> str:
    """Commit of the package that is measured, "+changes" where its sources differ from it."""
    root = Path(alpkd_fast.__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "alpkd_fast", "csrc", "kernels", "setup.py", "benchmarks/*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ALPKD_FAST_COMMIT", "unknown")  # a copy without its history


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        said = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", info.read_text(), re.MULTILINE))
        name = said.get("model name", name)
        if "cpu family" in said and not re.search(r"\d", name):  # a virtual machine hides which processor it is
            name += f" family {said['cpu family']} model {said['model']}"
    return f"{name}, {os.cpu_count()} cores"


def versions(device: torch.device) -> str:
    found = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    found += [f"alpkd_fast {alpkd_fast.__version__}"]
    if device.type == "cuda":
        import triton

        found += [f"triton {triton.__version__}", f"CUDA {torch.version.cuda}"]
    return ", ".join(found)
