"""``alpkd info``: versions, and what can run here."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

from .. import __version__, backends

NAME = "info"
HELP = "show versions, backends and devices"
EXTRAS = ("transformers", "accelerate", "datasets", "scikit-learn", "matplotlib", "rich", "pyyaml", "triton")


def add_options(parser: argparse.ArgumentParser) -> None:
    pass


def versions() -> dict[str, str]:
    """Versions of Python, torch, this package and the libraries of its extras that are installed."""
    found = {"alpkd-fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in EXTRAS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run(args: argparse.Namespace) -> int:
    found = versions()
    for name, version in found.items():
        print(f"{name:14} {version}")
    for name in EXTRAS:
        if name not in found:
            print(f"{name:14} not installed")
    for name, reason in backends().items():
        print(f"backend {name:9}: {'usable' if reason is None else reason}")
    print(f"{'CPU':14} {platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(f"GPU {index:<10} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.cuda.device_count() == 0:
        print(f"{'GPU':14} none")
    return 0
