"""The CUDA kernels without a GPU: compiled for the CPU, one fiber per CUDA thread, against the float64 reference.

Index arithmetic, masks, options, matrix fragments and barriers are the kernels' own; only instructions are
emulated (tests/cuda_emulation). Launches, memory and speed are left to the tests on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from alpkd_fast import ops
from alpkd_fast.problem import make_problem
from alpkd_fast.reference import reference_loss

from cuda_emulation import build

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="the emulation needs g++ (or CXX)")

DEFAULTS = {
    "pooling": "token", "layer_map": "all", "scale": None, "normalize": False, "detach_attention": False,
    "layer_weights": None, "reduction": "mean", "normalizer": None, "details": True, "projected": False,
}  # fmt: skip
NAMES = ("loss", "layer_losses", "attention", "entropy")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True, scope="module")
def _emulation():
    build.load()


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """An unwritten output must not pass: fresh tensors hold NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def emulated(problem):
    return ops.fused_loss("cuda", problem)


def evaluate(call, student, teacher, mask, teacher_grad=True, grad=1.0, **options):
    """Outputs and gradients by name, for an incoming gradient ``grad``."""
    student = [h.detach().requires_grad_() for h in student]
    teacher = [h.detach().requires_grad_(teacher_grad) for h in teacher]
    options = {**DEFAULTS, **options}
    if isinstance(options["scale"], torch.Tensor):
        options["scale"] = options["scale"].detach().requires_grad_()
    outputs = call(make_problem(student, teacher, mask, **options))
    outputs[0].backward(torch.full_like(outputs[0], grad))
    values = dict(zip(NAMES, outputs, strict=True))
    values |= {f"d_student[{i}]": h.grad for i, h in enumerate(student)}
    values |= {f"d_teacher[{j}]": h.grad for j, h in enumerate(teacher) if teacher_grad}
    if isinstance(options["scale"], torch.Tensor):
        values["d_scale"] = options["scale"].grad
    return {name: value.detach() for name, value in values.items()}


def check(student, teacher, mask=None, **options):
    """Error at most twice that of the eager form in the same dtype, and a few roundings of each result's size."""
    def wide(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    ours = evaluate(emulated, student, teacher, mask, **options)
    eager = evaluate(reference_loss, student, teacher, mask, **options)
    truth = evaluate(
        reference_loss, [*map(wide, student)], [*map(wide, teacher)], wide(mask),
        **{name: wide(value) for name, value in options.items()},
    )  # fmt: skip
    assert ours.keys() == truth.keys()
    inputs = (student[0].dtype, teacher[0].dtype)
    # Products of split 16-bit operands keep 16 bits.
    unit = 2.0**-53 if F64 in inputs else 2.0**-24 if inputs == (F32, F32) else 2.0**-17
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype
        if name in ("attention", "entropy") and options.get("details") is False:
            assert value.numel() == 0
            continue
        assert value.shape == truth[name].shape
        size = truth[name].abs().max().item()
        # Loss and teacher gradient: sums over rows, columns and layers; 16 roundings of the largest value.
        budget = 2 * (eager[name].double() - truth[name]).abs().max().item() + 16 * unit * size
        budget += torch.finfo(value.dtype).smallest_normal
        error = (value.double() - truth[name]).abs().max().item()
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}, size {size:.2e}"


def states(layers, lead, D, dtype, seed=0):
    generator = torch.Generator().manual_seed(100 * seed + layers)
    return [torch.randn(*lead, D, generator=generator).to(dtype) for _ in range(layers)]


MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
OPTIONS = {
    "plain": {}, "cls": {"pooling": "cls"}, "last": {"pooling": "last"}, "mean": {"pooling": "mean"},
    "normalize": {"normalize": True}, "detach": {"detach_attention": True}, "sum": {"reduction": "sum"},
    "no-overlap": {"layer_map": "no-overlap"}, "partial-overlap": {"layer_map": "partial-overlap"},
    "prefix": {"layer_map": "prefix"}, "skip": {"layer_map": "skip"}, "average": {"scale": 0.0},
    "learned-scale": {"scale": torch.tensor(0.3)}, "layer-weights": {"layer_weights": (0.0, 2.0, 0.5)},
    "normalizer": {"normalizer": 7.0}, "normalizer-tensor": {"normalizer": torch.tensor(9)},
    "all-at-once": {"layer_weights": (0.0, 2.0, 1.0), "layer_map": "skip", "pooling": "mean", "normalize": True},
    "grad": {"grad": 0.37}, "no-details": {"details": False}, "student-only": {"teacher_grad": False},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [F32, F16], ids=["f32", "f16"])
def test_options(name, dtype):
    check(states(3, (3, 5), 37, dtype), states(7, (3, 5), 37, dtype, 1), MASK, **OPTIONS[name])


@pytest.mark.parametrize("dtypes", [(F64, F64), (BF16, BF16), (F32, BF16), (BF16, F16), (F64, F16)], ids=str)
@pytest.mark.parametrize("D", [1, 40])
def test_dtypes(dtypes, D):
    check(states(3, (2, 5), D, dtypes[0]), states(5, (2, 5), D, dtypes[1], 1), MASK[:2])


@pytest.mark.parametrize(
    "mask", [MASK.bool(), MASK.half(), MASK.bfloat16() * 0.5, MASK.double() * 0.1, MASK.to(torch.int8)],
    ids=lambda mask: str(mask.dtype).removeprefix("torch."),
)  # fmt: skip
@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_row_weights_of_any_dtype(mask, pooling):
    check(states(2, (3, 5), 16, F32), states(3, (3, 5), 16, F32, 1), mask, pooling=pooling)


@pytest.mark.parametrize(
    ("m", "n", "D", "options"),
    [(1, 1, 8, {}), (20, 41, 36, {"layer_map": "no-overlap"}), (9, 5, 12, {"normalize": True}), (6, 12, 3001, {})],
    ids=["1-1", "20-41", "9-5", "wider-than-shared-memory"],
)
def test_shapes(m, n, D, options):
    check(states(m, (2,), D, F32), states(n, (2,), D, F32, 1), None, **options)


def test_strided_rows():
    student = [h[..., 1:41] for h in states(2, (3, 5), 44, F32)]
    teacher = [h.transpose(0, 1)[:, ::2] for h in states(3, (10, 3), 40, F32, 1)]
    check(student, teacher, MASK)


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_order_of_warps_does_not_matter(monkeypatch, order):
    """A barrier that is missing shows where the warps run first to last, or last to first."""
    monkeypatch.setenv("ALPKD_EMULATION_ORDER", order)
    check(states(3, (2, 5), 64, F32), states(5, (2, 5), 64, F32, 1), MASK[:2], normalize=True)


def test_nothing_crosses_from_rows_and_layers_that_are_not_read():
    student, teacher = states(3, (3, 5), 16, F32), states(7, (3, 5), 16, F32, 1)
    options = {"layer_map": [[0, 1], [2], [3, 4]], "layer_weights": (1.0, 0.0, 1.0)}
    before = evaluate(emulated, student, teacher, MASK, **options)
    for h in (*student, *teacher):
        h[MASK == 0] = torch.nan
    for h in (student[1], teacher[2], teacher[5], teacher[6]):
        h.fill_(torch.nan)
    after = evaluate(emulated, student, teacher, MASK, **options)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_nan_weight_comes_through():
    mask = MASK.float()
    mask[0, 0] = torch.nan
    values = evaluate(emulated, states(2, (3, 5), 16, F32), states(3, (3, 5), 16, F32, 1), mask)
    assert values["loss"].isnan()


def test_negative_weights_count_as_zero():
    student, teacher = states(2, (3, 5), 16, F32), states(3, (3, 5), 16, F32, 1)
    ours = evaluate(emulated, student, teacher, torch.where(MASK == 0, -1.5, 1.0))
    for name, value in evaluate(emulated, student, teacher, MASK).items():
        assert torch.equal(value, ours[name]), name


@pytest.mark.parametrize("dtype", [F16, F32], ids=["f16", "f32"])
def test_second_backward(dtype):
    """A kept graph's stored gradients are scaled anew, not twice."""
    student = [h.requires_grad_() for h in states(2, (3,), 16, dtype)]
    loss = emulated(make_problem(student, states(3, (3,), 16, dtype, 1), None, **DEFAULTS))[0]
    first = torch.autograd.grad(loss, student, torch.tensor(0.5), retain_graph=True)
    second = torch.autograd.grad(loss, student, torch.tensor(0.5))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_scale_gradients(factor):
    tensors = [torch.randn(37).to(dtype) for dtype in (F64, F32, BF16, BF16, F16)] + [torch.randn(3)[1:]]
    want = [t if factor == 1 else (t.double() * torch.tensor(factor).double() * 2 / 2).to(t.dtype) for t in tensors]
    versions = [t._version for t in tensors]
    torch.ops.alpkd_fast.scale_gradients_cuda(tensors, torch.tensor(factor), torch.tensor(1.0))
    for got, expected, version in zip(tensors, want, versions, strict=True):
        torch.testing.assert_close(got, expected, rtol=torch.finfo(got.dtype).eps, atol=0)
        assert got._version > version
    assert tensors[0] is not want[0] or factor == 1
