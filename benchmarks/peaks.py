"""Peak memory in a process of its own, where large tensors are mapped apart: no peak holds freed memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from . import measure

SLACK = 4 << 20  # code that is first used, and scratch memory of matrix products, which differs from run to run


class Peak(NamedTuple):
    peak: int  # bytes beyond what was there before the run
    kept: int  # bytes of them in the tensors that the run returned


def _child(make_runs: Callable[..., dict[str, measure.Run]], arguments: tuple[Any, ...], answer: Any) -> None:
    measure.map_large_tensors()
    found: dict[str, tuple[int | None, int]] = {}
    for name, run in make_runs(*arguments).items():
        kept: list[int] = []
        peak = measure.extra_bytes(lambda k, run=run: kept.append(measure.tensor_bytes(run(k))), arguments[-1])  # noqa: B023
        found[name] = peak, kept[0]
    answer.put(found)


def peaks(make_runs: Callable[..., dict[str, measure.Run]], *arguments: Any) -> dict[str, Peak]:
    """The peak of each run that ``make_runs(*arguments)`` makes and has warmed up; the last argument is the device."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=_child, args=(make_runs, arguments, answer))
    process.start()
    found = answer.get(timeout=900)  # some runs take 10 s and a warm-up each
    process.join()
    if any(peak is None for peak, _ in found.values()):
        pytest.skip("this system does not tell a process's peak memory")
    return {name: Peak(*values) for name, values in found.items()}
