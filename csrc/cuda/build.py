"""Builds ``alpkd_fast/_C_cuda.abi3.so`` with nvcc against LibTorch's stable ABI; called by setup.py.

It links no CUDA library but the runtime, and that statically: the package imports without a driver. PyTorch
may be a CPU build at build time. ALPKD_FAST_CUDA=1 demands the library, =0 leaves it out;
TORCH_CUDA_ARCH_LIST (such as "8.0;9.0+PTX") says for which GPUs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCES = sorted(FOLDER.glob("*.cu"))
HEADERS = sorted([*FOLDER.glob("*.cuh"), *FOLDER.glob("*.h"), *FOLDER.parent.glob("*.h")])
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]


def find_nvcc() -> str | None:
    """The nvcc of CUDACXX, CUDA_HOME or PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def architecture_flags(listed: str) -> list[str]:
    """nvcc's -gencode flags of a TORCH_CUDA_ARCH_LIST.

    >>> architecture_flags("8.0;9.0+PTX")
    ['-gencode=arch=compute_80,code=sm_80', '-gencode=arch=compute_90,code=[sm_90,compute_90]']
    """
    flags = []
    for name in listed.replace(",", ";").replace(" ", ";").split(";"):
        number = name.removesuffix("+PTX").replace(".", "")
        if not number:
            continue
        if not number.rstrip("af").isdigit() or int(number.rstrip("af")) < 80:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST holds {name!r}; list numbers from 8.0 on, such as '8.0;9.0+PTX'")
        code = f"[sm_{number},compute_{number}]" if name.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def include_flags() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return [f"-I{path}" for path in include_paths()]


def build(target: Path, work: Path) -> None:
    """Compile and link the library to ``target``; objects go to ``work``."""
    from torch.utils.cpp_extension import library_paths

    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found; install the CUDA toolkit, or set CUDA_HOME")
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    architectures = architecture_flags(listed)
    work /= re.sub("[^0-9A-Za-z.+]", "_", listed)  # other GPUs, other objects
    work.mkdir(parents=True, exist_ok=True)
    objects = [work / f"{source.stem}.o" for source in SOURCES]
    common = [*FLAGS, *architectures, "--threads=0", *include_flags()]
    jobs = min(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1), len(SOURCES))
    running: list[subprocess.Popen[bytes]] = []
    waiting = [pair for pair in zip(SOURCES, objects, strict=True) if not up_to_date(pair[1])]
    while waiting or running:
        while waiting and len(running) < jobs:
            source, built = waiting.pop()
            running.append(subprocess.Popen([nvcc, *common, "-c", str(source), "-o", str(built)]))
        if running.pop(0).wait() != 0:
            for process in running:
                process.terminate()
            raise RuntimeError("nvcc failed, see its message above")
    libraries = [f"-L{path}" for path in library_paths()]
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [nvcc, "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", *map(str, objects), *libraries,
         "-ltorch_cpu", "-ldl", "-o", str(target)],
        check=True,
    )  # fmt: skip


def up_to_date(target: Path) -> bool:
    parts = [*SOURCES, *HEADERS, Path(__file__)]
    return target.exists() and target.stat().st_mtime > max(part.stat().st_mtime for part in parts)


def build_if_wanted(target: Path, work: Path) -> None:
    """Build unless ALPKD_FAST_CUDA=0; a failure is an error only with ALPKD_FAST_CUDA=1."""
    wanted = os.environ.get("ALPKD_FAST_CUDA", "")
    if wanted == "0":
        return
    if wanted != "1" and find_nvcc() is None:
        print("alpkd_fast: no nvcc, the CUDA backend is left out", file=sys.stderr)
        return
    if up_to_date(target):
        return
    try:
        build(target, work)
    except Exception as error:
        if wanted == "1":
            raise
        print(f"alpkd_fast: the CUDA library was not built: {error}", file=sys.stderr)


if __name__ == "__main__":
    root = FOLDER.parents[1]
    build(root / "alpkd_fast" / "_C_cuda.abi3.so", root / "build" / "cuda")
