"""Memory beyond inputs and gradients, in a process of its own, where nothing is allocated and warm yet."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from . import measure, providers
from .cases import DTYPES, LOSS, make_inputs
from .runner import run

MODE = "forward+backward"


def first_call(case_name, dtype, device_name, backend, threads, answer):
    """Peak extra memory of the first call at full size, after one at a size of eight tokens has loaded the code."""
    from dataclasses import replace

    measure.keep_freed_memory()
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    case = LOSS[case_name].on(device)
    (provider,) = [p for p in providers.ours(case, device)[0] if p.name == backend]
    run(provider, make_inputs(replace(case, batch=1, seq=8), DTYPES[dtype], device, 0), True, None)(0)
    inputs = make_inputs(case, DTYPES[dtype], device, 0)
    answer.put((measure.extra_bytes(run(provider, inputs, True, None), device), sum(map(measure.tensor_bytes, (
        inputs[0].student, inputs[0].teacher)))))  # fmt: skip


@pytest.mark.memory
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param("bert-base-6", "fp32", marks=pytest.mark.level("quick")),
        ("bert-base-6", "bf16"),
        ("bert-large-12", "fp32"),
        pytest.param("decoder-16", "bf16", marks=pytest.mark.level("full")),
    ],
)
def test_memory(case, dtype, record, done):
    done(suite="memory", case=case, dtype=dtype)
    shape = LOSS[case].on(record.device)
    mine, reasons = providers.ours(shape, record.device)
    for provider in mine:
        if provider.name == "reference":
            pytest.skip(f"no fused backend is usable: {reasons}")
        context = multiprocessing.get_context("spawn")
        answer = context.Queue()
        process = context.Process(
            target=first_call, args=(case, dtype, record.device.type, provider.name, torch.get_num_threads(), answer)
        )
        process.start()
        extra, given = answer.get(timeout=300)
        process.join()
        if extra is None:
            pytest.skip("this system does not tell a process's peak memory")
        record.rows.append(record.row(shape, dtype, mode=MODE, provider=provider.name, kind="ours", extra_bytes=extra))
        allowed = given // 100 if record.device.type == "cuda" else torch.get_num_threads() << 20
        assert extra <= allowed, f"{provider.name} takes {extra / 2**20:.2f} MiB, allowed {allowed / 2**20:.2f} MiB"
