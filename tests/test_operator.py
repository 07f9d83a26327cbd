"""The operator itself: torch.library.opcheck, fakes, and modes."""

import pytest
import torch
from common import both_sides

from alpkd_fast import alp_loss
from alpkd_fast.ops import _FusedLoss

CASES = {
    "plain": {},
    "details": {"return_details": True},
    "mask": {"mask": torch.tensor([[1, 1, 0, 1], [0.5, 2, 1, 0]])},
    "map-weights": {"layer_map": [(0, 1), (2,)], "layer_weights": [2.0, 0.0]},
    "scale-tensor": {"scale": torch.tensor(0.4, requires_grad=True)},
    "normalizer-tensor": {"normalizer": torch.tensor(5.0)},
    "normalize-mean": {"normalize": True, "pooling": "mean", "return_details": True},
    "last-sum": {"pooling": "last", "reduction": "sum", "detach_attention": True},
}


@pytest.fixture
def operator_arguments(monkeypatch):
    """What alp_loss hands to the operator."""
    seen = []

    def record(backend, m, options, scale_tensor, *layers):
        row_weights, pooling, counts, indices, *rest = options
        grads = [h.requires_grad for h in layers]
        scale_grad = scale_tensor is not None and scale_tensor.requires_grad
        seen.append((
            list(layers[:m]), list(layers[m:]), row_weights, pooling, counts, indices, scale_tensor, *rest,
            grads[:m], grads[m:], scale_grad,
        ))  # fmt: skip
        return original(backend, m, options, scale_tensor, *layers)

    original = _FusedLoss.apply
    monkeypatch.setattr(_FusedLoss, "apply", record)
    return seen


@pytest.mark.parametrize("dtypes", ["f32-f32", "bf16-bf16", "f16-f16", "f64-f32"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_opcheck(fused, options, dtypes, operator_arguments):
    student, teacher = both_sides(2, 3, (2, 4), 6, dtypes, device=fused.device)
    teacher[1].requires_grad_(False)
    options = {k: v.to(fused.device) if torch.is_tensor(v) else v for k, v in options.items()}
    fused(student, teacher, options.pop("mask", None), **options)
    (arguments,) = operator_arguments
    arguments = tuple([h.detach() for h in a] if isinstance(a, list) and a and torch.is_tensor(a[0]) else a
                      for a in arguments)  # fmt: skip
    operator = getattr(torch.ops.alpkd_fast, f"alp_{fused.name}").default
    torch.library.opcheck(
        operator, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


def test_the_operator_returns_no_gradient_that_nobody_wants(fused, operator_arguments):
    student, teacher = both_sides(2, 3, (4,), 6, device=fused.device)
    for h in student + teacher[1:]:
        h.requires_grad_(False)
    fused(student, teacher)
    (arguments,) = operator_arguments
    *_, d_student, d_teacher = getattr(torch.ops.alpkd_fast, f"alp_{fused.name}").default(*arguments)
    assert d_student == []
    assert [g.shape for g in d_teacher] == [teacher[0].shape]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nobody_wants_a_gradient_without_grad_mode(mode, fused, operator_arguments):
    student, teacher = both_sides(2, 3, (4,), 6, device=fused.device)
    scale = torch.tensor(0.5, device=fused.device, requires_grad=True)
    assert all(h.requires_grad for h in student + teacher)
    with mode():
        fused(student, teacher, scale=scale)
    (arguments,) = operator_arguments
    *_, student_grad, teacher_grad, scale_grad = arguments
    assert not any([*student_grad, *teacher_grad, scale_grad])


def test_inference_mode_and_no_grad(backend):
    student, teacher = both_sides(2, 3, (4,), 6, device=backend.device)
    want = backend(student, teacher)
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            got = backend.details(student, teacher)
        assert torch.equal(got.loss, want)
        assert not got.loss.requires_grad
    with torch.inference_mode():
        inside = [h.clone() for h in student], [h.clone() for h in teacher]
        assert torch.equal(backend(*inside), want)
    frozen = [h.clone() for h in inside[1]]  # a teacher that ran under inference_mode
    backend(student, frozen).backward()
    assert student[0].grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, dtype):
    for dtypes in ("f32-f32", "f32-bf16", "f16-f16"):
        student, teacher = both_sides(2, 3, (4,), 6, dtypes, device=backend.device)
        want = backend(student, teacher)
        grads = torch.autograd.grad(want, student + teacher)
        with torch.autocast(backend.device, dtype=dtype):
            got = backend(student, teacher)
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
        for one, other in zip(torch.autograd.grad(got, student + teacher), grads, strict=True):
            assert torch.equal(one, other)


def test_meta_tensors_of_the_fake_follow_the_real_shapes(fused):
    """FakeTensorMode: shapes, dtypes and devices without running anything."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = both_sides(2, 3, (2, 4), 6, "bf16-f32", device=fused.device)
    want = fused.details(*real, pooling="mean")
    with FakeTensorMode() as mode:
        sides = [[mode.from_tensor(h) for h in side] for side in real]
        got = alp_loss(*sides, pooling="mean", return_details=True, backend=fused.name)
        grads = torch.autograd.grad(got.loss, sides[0] + sides[1])
    for one, other in zip(got, want, strict=True):
        assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    assert [(g.shape, g.dtype) for g in grads] == [(h.shape, h.dtype) for h in real[0] + real[1]]
