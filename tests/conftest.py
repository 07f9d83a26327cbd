"""The backend as a parameter, poisoned fresh memory, and a last line that says which backends ran."""

from __future__ import annotations

import ctypes
import os
from collections import Counter

import pytest
import torch
from backend import Backend

import alpkd_fast
import alpkd_fast.projection
from alpkd_fast.backends import cuda

# An unwritten output must not pass: fresh tensors of PyTorch hold NaN. The kernels' own come from the C library: bytes
# of 0x40 are 2 to 3 in every dtype but float64, where they are 32, and their complement in memory that was freed is
# -1.9 to -0.1.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
M_PERTURB, FRESH_BYTE = -6, 0x40
if hasattr(libc := ctypes.CDLL(None), "mallopt"):
    libc.mallopt(M_PERTURB, FRESH_BYTE ^ 0xFF)


def pytest_addoption(parser):
    parser.addoption("--backends", help="comma-separated names; the tests of other backends are left out")


def pytest_configure(config):
    config.addinivalue_line("markers", "large: too large for Triton's interpreter and the emulation of CUDA")
    if os.environ.get("ALPKD_EMULATE_CUDA") == "1":
        from cuda_emulation import build

        build.load()
        cuda.unavailable = lambda: None
        cuda.cannot_run = lambda problem: None


def pytest_generate_tests(metafunc):
    for fixture, names in (
        ("backend", list(alpkd_fast.backends())),
        ("fused", [name for name in alpkd_fast.backends() if name != "reference"]),
    ):
        if fixture in metafunc.fixturenames:
            chosen = metafunc.config.getoption("--backends")
            names = [name for name in names if chosen is None or name in chosen.split(",")]
            metafunc.parametrize(fixture, names, indirect=True)


_ran: Counter[str] = Counter()
_skipped: dict[str, str] = {}


def _usable(request) -> Backend:
    backend = Backend(request.param)
    reason = alpkd_fast.backends()[backend.name]
    if reason is not None:
        _skipped[backend.name] = reason
        pytest.skip(f"{backend.name}: {reason}")
    if backend.interpreted and request.node.get_closest_marker("large"):
        pytest.skip(f"{backend.name}: too large to run interpreted")
    _ran[backend.name] += 1
    return backend


@pytest.fixture
def backend(request) -> Backend:
    """Every backend of the registry."""
    return _usable(request)


@pytest.fixture
def fused(request) -> Backend:
    """Every backend but the reference."""
    return _usable(request)


@pytest.fixture(params=["teacher-side", "query-side"])
def form(request, monkeypatch) -> str:
    """Both forms of the teacher's projection, whatever would be quicker."""
    monkeypatch.setattr(alpkd_fast.projection, "query_side_pays", lambda *_: request.param == "query-side")
    return request.param


def pytest_sessionfinish(session):
    """Hand a worker's counts to the process that reports, where pytest-xdist runs the tests side by side."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["backends"] = dict(_ran), _skipped


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    ran, skipped = getattr(node, "workeroutput", {}).get("backends", ({}, {}))
    _ran.update(ran)
    _skipped.update(skipped)


def pytest_unconfigure(config):
    """The last line of a run."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not (_ran or _skipped):
        return
    ran = ", ".join(f"{name} ({count} tests)" for name, count in _ran.items()) or "none"
    skipped = "; ".join(f"{name}: {reason}" for name, reason in _skipped.items()) or "none"
    reporter.write_line(f"backends that ran: {ran} | skipped: {skipped}")
