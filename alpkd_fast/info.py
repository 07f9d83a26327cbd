"""Versions, devices, backends and the reasons where one is off: `python -m alpkd_fast.info`, for bug reports."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import alpkd_fast

OPTIONAL = ("triton", "transformers", "accelerate", "datasets", "numpy")


def report() -> dict[str, str]:
    """Return what a bug report needs, one line per entry, in the order in which it is read."""
    lines = {
        "alpkd_fast": alpkd_fast.__version__,
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, HIP {torch.version.hip or 'none'})",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines[f"cuda:{index}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {properties.major}."
            f"{properties.minor}"
        )
    lines |= {name: _version(name) for name in OPTIONAL}
    for name, reason in alpkd_fast.backends().items():
        lines[f"backend {name}"] = "usable" if reason is None else f"off: {reason}"
    lines |= {name: value for name, value in sorted(os.environ.items()) if name.startswith("ALPKD_FAST_")}
    return lines


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Print the report."""
    lines = report()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")


if __name__ == "__main__":
    main()
