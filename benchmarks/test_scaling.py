"""Time and memory against tokens, n, m, D and threads; the slope in log-log scale shows that nothing is quadratic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from . import measure, providers
from .cases import DTYPES, LOSS, Case, make_inputs
from .runner import Session, run

MODE = "forward+backward"
BASE = LOSS["bert-base-6"]
# axis: the case at a value, the values of a default run, the further values of a full run
AXES = {
    "tokens": (lambda v: replace(BASE, batch=v // 128), (256, 1024, 4096, 16384), (512, 2048, 8192, 32768, 65536)),
    "n": (lambda v: replace(BASE, batch=8, n=v), (2, 8, 32, 64), (4, 16)),
    "m": (lambda v: replace(BASE, batch=8, m=v), (1, 4, 16, 32), (2, 8)),
    "D": (lambda v: replace(BASE, batch=8, D=v), (64, 512, 2048, 8192), (128, 256, 1024, 4096)),
}
RIVAL = "einsum"
RIVAL_ELEMENTS = 2**30  # largest (n + 2 m) * tokens * D for which the rival is timed too


def dtype_on(device: torch.device) -> str:
    return "fp32" if device.type == "cpu" else "bf16"


def time_point(session: Session, case: Case) -> dict[str, float]:
    """Time ours and one rival at one size; the rows go to the session.

    Returns the least seconds of each provider: what the assertions look at, since no neighbour makes it smaller.
    """
    dtype = dtype_on(session.device)
    inputs = make_inputs(case, DTYPES[dtype], session.device, measure.cache_bytes(session.device))
    candidates = providers.ours(case, session.device)[0]
    if not session.ours_only and (case.n + 2 * case.m) * case.rows * case.D <= RIVAL_ELEMENTS:
        candidates += [p for p in providers.rivals(case) if p.name in (RIVAL, f"gathered {RIVAL}")]
    runs = {p.name: run(p, inputs, True, None) for p in candidates}
    times = measure.take_turns(runs, session.device, session.seconds / 5, session.rounds)
    read, written = case.bytes_moved(DTYPES[dtype], True)
    floor, bound = session.machine.floor(read, written, case.operations(True), DTYPES[dtype])
    rows = []
    for p in candidates:
        median, iqr = measure.median_iqr(times[p.name][0])
        rows.append(session.row(
            case, dtype, mode=MODE, provider=p.name, kind=p.kind, rounds=len(times[p.name][0]), median_s=median,
            iqr_s=iqr, wall_s=measure.median_iqr(times[p.name][1])[0], bytes_read=read, bytes_written=written,
            operations=case.operations(True), floor_s=floor, floor_bound=bound, x_floor=median / floor,
            achieved=(read + written) / median, extra_bytes=measure.extra_bytes(runs[p.name], session.device),
        ))  # fmt: skip
    session.rows += rows
    return {name: min(seconds) for name, (seconds, _) in times.items()}


@pytest.mark.scaling
@pytest.mark.parametrize("axis", AXES)
def test_scaling(axis, record, done, capsys):
    done(suite="scaling", case=f"scaling-{axis}")
    at, values, further = AXES[axis]
    if record.level == "full" or record.device.type == "cuda":
        values = sorted((*values, *further))
    points: dict[str, list[tuple[float, float]]] = {}
    for value in values:
        for provider, seconds in time_point(record, replace(at(value), name=f"scaling-{axis}")).items():
            points.setdefault(provider, []).append((value, seconds))
    for provider, timed in points.items():
        fitted = measure.slope(timed[-3:])  # at small sizes the fixed cost of a call flattens the line
        with capsys.disabled():
            print(f"\n{axis}: {provider} takes time ~ {axis}^{fitted:.2f} over {timed[-3:][0][0]} to {timed[-1][0]}")
        if provider != RIVAL:
            assert fitted <= 1.25, f"{provider} grows like {axis}^{fitted:.2f}"


@pytest.mark.scaling
def test_padding_is_not_paid_for(record, done):
    """Time against the share of padding: the valid rows are what costs. In turns, so that no slow moment hits one."""
    done(suite="scaling", case="scaling-padding")
    runs = {}
    for padding in (0.0, 0.3, 0.6):
        case = replace(BASE, name="scaling-padding", padding=padding).on(record.device)
        time_point(record, case)
        inputs = make_inputs(case, DTYPES[dtype_on(record.device)], record.device, 0)
        runs[str(padding)] = run(providers.ours(case, record.device)[0][0], inputs, True, None)
    times = measure.take_turns(runs, record.device, record.seconds / 5, 9)
    none, some, most = (min(seconds) for seconds, _ in times.values())
    assert most < some < none, (none, some, most)


@pytest.mark.scaling
def test_threads(record, done):
    if record.device.type != "cpu":
        pytest.skip("threads are a matter of the CPU")
    done(suite="scaling", case="scaling-threads")
    before = torch.get_num_threads()
    try:
        for threads in sorted({*(2**k for k in range(before.bit_length())), before}):
            torch.set_num_threads(threads)
            time_point(record, replace(BASE, name="scaling-threads"))
    finally:
        torch.set_num_threads(before)
