"""What gpu_suite.sh leaves behind: one JSON per stage and a short table; and the small cases that it sanitizes.

gpu_report.py stage OUT NAME EXIT_CODE SECONDS    writes OUT/NAME.json and prints the stage's lines
gpu_report.py table OUT                           prints the lines of all stages
gpu_report.py small-cases                         runs every kind of kernel on small inputs
"""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from pathlib import Path
from typing import Any

STAGES = ("build", "test", "sanitize", "bench")
TIMED_OUT = (124, 137)


def environment() -> dict[str, str]:
    """Device, versions and commit; what is missing is said, never an error."""
    found = {"python": platform.python_version(), "commit": os.environ.get("ALPKD_FAST_COMMIT", "unknown")}
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or a copy without its history
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
        found["commit"] = git.stdout.strip()
    try:
        import torch

        found |= {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
        if torch.cuda.is_available():
            found["device"] = torch.cuda.get_device_name()
        import triton

        found["triton"] = triton.__version__
    except ImportError as error:
        found["missing"] = str(error)
    return found


def figures(out: Path, name: str) -> dict[str, Any]:
    """What a stage measured."""
    found = sorted(out.glob("test*.xml")) if name == "test" else []
    if found:
        suites = [suite for path in found for suite in ElementTree.parse(path).getroot().iter("testsuite")]
        keys = ("tests", "failures", "errors", "skipped")
        counts = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in keys}
        failed = [f"{case.get('classname')}::{case.get('name')}" for suite in suites for case in suite.iter("testcase")
                  if case.find("failure") is not None or case.find("error") is not None]  # fmt: skip
        return counts | {"failed": failed}
    if name == "bench" and (out / "bench.csv").exists():
        with (out / "bench.csv").open(newline="") as file:
            return {"rows": [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]}
    return {}


def _number(text: str) -> str | float | None:
    if text == "":
        return None
    try:
        return float(text)
    except ValueError:
        return text


def write_stage(out: Path, name: str, code: int, seconds: int) -> None:
    log = (out / f"{name}.log").read_text(errors="replace").splitlines()
    skipped = [line for line in log if line.startswith("SKIPPED:")]  # the stage; pytest writes "SKIPPED [" of a test
    status = "timed out" if code in TIMED_OUT else "failed" if code else "skipped" if skipped else "passed"
    report = {"stage": name, "status": status, "exit_code": code, "seconds": seconds, **environment(),
              "figures": figures(out, name), "last_lines": log[-15:]}  # fmt: skip
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(lines(report)))


def lines(report: dict[str, Any]) -> list[str]:
    """A stage in a few lines."""
    head = f"{report['stage']:9s} {report['status']:9s} {report['seconds']:4d} s  {report.get('device', 'no GPU')}"
    found = report["figures"]
    if "tests" in found:
        head += "  " + ", ".join(f"{found[key]} {key}" for key in ("tests", "failures", "errors", "skipped"))
    table = [head, *(f"  FAILED {name}" for name in found.get("failed", [])[:20])]
    for row in found.get("rows", []):
        if row["kind"] != "ours":
            continue
        where = f"  {row['case']:14s} {row['dtype']:5s} {row['mode']:28s} {row['provider']:8s}"
        if row["median_s"] is None:
            table.append(f"{where} {row['status']}")
            continue
        share = f"{100 / row['x_floor']:5.1f} % of the floor" if row["x_floor"] else ""
        rival = f"{row['x_best_rival']:6.2f} x {row['best_rival']}" if row["x_best_rival"] else ""
        table.append(f"{where} {1e6 * row['median_s']:9.1f} us  {share}  {rival}")
    return table


def print_table(out: Path) -> None:
    for name in STAGES:
        path = out / f"{name}.json"
        print("\n".join(lines(json.loads(path.read_text()))) if path.exists() else f"{name:9s} not run")


def small_cases() -> None:
    """Every kernel, team size and option that differs in its memory accesses, on inputs of a few kilobytes."""
    import torch

    import alpkd_fast

    def run(m: int, n: int, lead: tuple[int, ...], D: int, dtype: torch.dtype, **options: Any) -> None:
        teacher_grad = options.pop("teacher_grad", False)
        student = [torch.randn(*lead, D, device="cuda", dtype=dtype, requires_grad=True) for _ in range(m)]
        teacher = [torch.randn(*lead, D, device="cuda", dtype=dtype, requires_grad=teacher_grad) for _ in range(n)]
        mask = torch.rand(lead, device="cuda") > 0.3
        loss = alpkd_fast.alp_loss(student, teacher, mask, backend="cuda", **options)
        (0.5 * loss).backward()

    bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    for dtype in (bf16, f16, f32):
        for m, n, D in ((6, 12, 768), (1, 1, 32), (12, 24, 1024), (16, 32, 4096), (2, 20, 64)):
            # The sanitizers are slow: of the largest, just more than two rows to each of up to 149 multiprocessors.
            run(m, n, (3, 100 if D == 4096 else 200), D, dtype)
            run(m, n, (8, 3), D, dtype, pooling="cls")
    run(6, 12, (3, 5), 96, bf16, layer_map="no-overlap")
    for dtype in (bf16, f16, f32, f64):
        for pooling in ("token", "cls", "last", "mean"):
            run(3, 7, (3, 5), 37, dtype, pooling=pooling, teacher_grad=True)
        run(3, 7, (3, 5), 37, dtype, normalize=True, teacher_grad=True, layer_map="partial-overlap")
    run(6, 12, (2, 2), 9000, f64, teacher_grad=True)
    run(64, 128, (2, 2), 40, f64)
    torch.cuda.synchronize()
    print("small cases: done")


def main(arguments: list[str]) -> int:
    match arguments:
        case ["stage", out, name, code, seconds]:
            write_stage(Path(out), name, int(code), int(seconds))
        case ["table", out]:
            print_table(Path(out))
        case ["small-cases"]:
            small_cases()
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
