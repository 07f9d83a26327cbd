"""What a call costs where there is nothing to compute: alp_loss against a bare autograd.Function with the same
arguments around an operator that does no work."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import alpkd_fast
from alpkd_fast import ops

from . import measure
from .cases import Case, make_inputs

TINY = Case("tiny", n=4, m=2, D=64, batch=1, seq=1)
LIMIT = 2.5


class BareFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, m, options, *layers):
        wanted = ctx.needs_input_grad[2:]
        loss, *_, gradients, _ = torch.ops.alpkd_fast_benchmarks.empty.default(
            layers[:m], layers[m:], *options, wanted[:m], wanted[m:], False
        )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return None, None, *ctx.saved_tensors, *[None] * (len(ctx.needs_input_grad) - 2 - len(ctx.saved_tensors))


@pytest.fixture(scope="module")
def empty_operator(tmp_path_factory):
    """Compile and load the operator without work."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler for the operator to compare with")
    built = tmp_path_factory.mktemp("empty_operator") / "empty_operator.so"
    source = __file__.replace("test_overhead.py", "empty_operator.cpp")
    subprocess.run(
        [compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000", source,
         *(f"-I{path}" for path in include_paths()), *(f"-L{path}" for path in library_paths()), "-ltorch_cpu",
         "-o", str(built)],
        check=True,
    )  # fmt: skip
    library = torch.library.Library("alpkd_fast_benchmarks", "DEF")
    library.define("empty" + ops._SCHEMA)
    torch.ops.load_library(str(built))
    return library


@pytest.mark.overhead
@pytest.mark.level("quick")
def test_overhead(empty_operator, record, report):
    if record.device.type != "cpu" or alpkd_fast.backends()["cpu"] is not None:
        pytest.skip(f"measures the CPU backend: {alpkd_fast.backends()['cpu'] or 'the device is a GPU'}")
    given = make_inputs(TINY, torch.float32, record.device, 0)[0]
    no_options = (None, 0, [], [], None, 0.125, [], False, False, True, None, 0.0, False)

    def ours(_):
        return torch.autograd.grad(alpkd_fast.alp_loss(given.student, given.teacher, backend="cpu"), given.student)

    def bare(_):
        return torch.autograd.grad(
            BareFunction.apply(len(given.student), no_options, *given.student, *given.teacher), given.student
        )

    times = measure.take_turns({"cpu": ours, "bare function": bare}, record.device, 1.0, 200)
    medians = {name: measure.median_iqr(values) for name, (values, _) in times.items()}
    ratio = medians["cpu"][0] / medians["bare function"][0]
    for name, (median, iqr) in medians.items():
        record.rows.append(record.row(
            TINY, "fp32", mode="forward+backward", provider=name, kind="ours" if name == "cpu" else "bare",
            rounds=len(times[name][0]), median_s=median, iqr_s=iqr, wall_s=median,
            best_rival="bare function", x_best_rival=medians["bare function"][0] / median,
        ))  # fmt: skip
    report(times["cpu"][0], times_the_bare_function=ratio)
    assert ratio <= LIMIT, f"a call costs {ratio:.2f} times a bare autograd.Function, allowed {LIMIT}"
