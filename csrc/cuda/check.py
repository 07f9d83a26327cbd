"""Check what nvcc made of the CUDA kernels, without a GPU: python csrc/cuda/check.py

Builds the library for sm_80 and sm_90 where it is out of date, and prints one line per kernel and architecture:
registers, spills, shared memory, widths of global loads, matrix instructions, copies to shared memory. Kernels of
the speed table fail on any spill, local memory access, or copy of hidden states under 16 bytes per thread (from
sm_90 on many rows are copied whole layers at a time); no other kernel may spill.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from alpkd_fast.kernels import cubin

import build

ROOT = Path(__file__).resolve().parents[2]
TABLE = ("alp_matrix", "alp_vector", "alp_few_rows")  # their asynchronous copies are all that reads hidden states


def cubins(library: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Architecture and path of every cubin in a library, extracted to ``folder``."""
    subprocess.run(
        [cubin._tool("cuobjdump"), "-xelf", "all", str(library)], cwd=folder, check=True, capture_output=True
    )
    for path in sorted(folder.glob("*.cubin")):
        architecture = re.search(r"sm_\d+", path.name)
        if architecture:
            yield architecture[0], path


def copy_widths(path: Path) -> dict[str, Counter[str]]:
    """Of every kernel in a cubin: its asynchronous copies by bits per thread, or "bulk"."""
    sass = cubin._run("nvdisasm", "-c", path)
    functions = re.split(r"^\.text\.(\S+):$", sass, flags=re.M)
    return {
        name: Counter(
            "bulk" if op.startswith("UBLKCP") else cubin._width(op)
            for op in re.findall(r"\b(LDGSTS[\w.]*|UBLKCP\.S[\w.]*)", body)
        )
        for name, body in zip(functions[1::2], functions[2::2], strict=True)
    }


def readable(mangled: str) -> str:
    """alp_matrix-bf16-16x32: up to 16 student and 32 teacher layers. alp_vector-4: tiles of 4 student layers."""
    found = re.search(r"alp_matrixILb(\d)ELi(\d)ELi(\d)", mangled)
    if found:
        return f"alp_matrix-{'bf16' if found[1] == '1' else 'f16'}-{8 * int(found[2])}x{16 * int(found[3])}"
    found = re.search(r"alp_vectorILi(\d)", mangled)
    if found:
        return f"alp_vector-{found[1]}"
    found = re.search(r"alp_few_rowsILNS_\dDtypeE(\d)", mangled)
    if found:
        return f"alp_few_rows-{('f32', 'f64', 'bf16', 'f16')[int(found[1])]}"
    found = re.search(r"alp_genericI([fd])NS\d_7ProblemILi(\d+)", mangled)
    if found:
        return f"alp_generic-{'f32' if found[1] == 'f' else 'f64'}-{found[2]} layers"
    found = re.search(r"\d(alp_[a-z_]+?)(?:ENS|Pf|Pd|I)", mangled)
    return found[1] if found else mangled


def main() -> int:
    if build.find_nvcc() is None:
        print("CUDA kernels: skipped, nvcc was not found; install the CUDA toolkit or set CUDA_HOME")
        return 0
    library = ROOT / "alpkd_fast" / "_C_cuda.abi3.so"
    if not build.up_to_date(library):
        build.build(library, ROOT / "build" / "cuda")
    failures = []
    seen = set()
    with tempfile.TemporaryDirectory() as folder:
        for architecture, path in cubins(library, Path(folder)):
            copies = copy_widths(path)
            for mangled, report in sorted(cubin.inspect_cubin(path).items()):
                name = f"{architecture} {readable(mangled)}"
                seen.add(architecture)
                print(f"{name:42s} {report.row()} | copies {dict(copies[mangled]) or '-'}")
                if report.spilled_bytes or report.local_accesses:
                    failures.append(f"{name}: {report.spilled_bytes} B spilled, {report.local_accesses} local accesses")
                if any(kernel in mangled for kernel in TABLE):
                    wide = "128" if architecture < "sm_90" or "alp_few_rows" in mangled else "bulk"
                    if set(copies[mangled]) != {wide}:
                        failures.append(f"{name}: copies {dict(copies[mangled])}, {wide} alone are allowed")
                    if "alp_matrix" in mangled and not report.matrix:
                        failures.append(f"{name}: no matrix instruction")
    failures += [f"{missing}: no cubin" for missing in sorted({"sm_80", "sm_90"} - seen)]
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
