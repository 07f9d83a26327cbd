"""Compiles csrc/cuda with the host's C++ compiler against the emulation, and registers its operators for the CPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"


def find_compiler() -> str | None:
    return next((path for name in (os.environ.get("CXX"), "g++") if name and (path := shutil.which(name))), None)


def load() -> None:
    """Build, unless a build of these sources is there, and load: ``alp_cuda`` then runs on CPU tensors."""
    from torch.utils.cpp_extension import include_paths

    parts = sorted([*HERE.glob("*.h"), *SOURCES.glob("*.cu*"), *SOURCES.glob("*.h"), *SOURCES.parent.glob("*.h")])
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts) + torch.__version__.encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"alpkd_fast_emulation_{os.getuid()}" / f"{digest}.so"
    if not target.exists():
        target.parent.mkdir(mode=0o700, exist_ok=True)
        built = target.with_suffix(f".{os.getpid()}")
        includes = [f"-I{path}" for path in [HERE, SOURCES, *include_paths()]]
        libraries = Path(torch.__file__).parent / "lib"
        subprocess.run(
            [find_compiler() or "g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden",
             "-Wno-attributes", "-DTORCH_TARGET_VERSION=0x020a000000000000", *includes, "-x", "c++",
             *map(str, sorted(SOURCES.glob("*.cu"))), "-o", str(built), f"-L{libraries}", "-ltorch_cpu"],
            check=True,
        )  # fmt: skip
        built.rename(target)
    torch.ops.load_library(str(target))
    _library.append(ctypes.CDLL(str(target)))
    _library[-1].alpkd_emulation_launches.restype = ctypes.c_char_p


_library: list[ctypes.CDLL] = []


def launches() -> str:
    """Name and block size of every kernel launched since the last call."""
    return _library[-1].alpkd_emulation_launches().decode()
