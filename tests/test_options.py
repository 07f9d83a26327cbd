"""Every option of alp_loss: what it means, and that each backend computes it."""

import inspect
import math

import pytest
import torch
from common import assert_as_exact, both_sides

import alpkd_fast
from alpkd_fast import ALPOutput
from alpkd_fast.problem import make_problem

DTYPES = ["f32-f32", "bf16-bf16", "f16-f16", "f64-f64", "f32-bf16"]


def sides(backend, dtypes="f32-f32", lead=(2, 3), D=10):
    return both_sides(3, 4, lead, D, dtypes, device=backend.device)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"normalize": True},
        {"detach_attention": True},
        {"normalize": True, "detach_attention": True},
        {"layer_weights": [0.5, 1.0, 3.0]},
        {"layer_weights": [0.0, 1.0, 0.25]},
        {"layer_weights": [0.0, 0.0, 0.0]},
        {"layer_weights": torch.tensor([2.0, 0.0, 1.0])},
        {"reduction": "sum"},
        {"normalizer": 0.125},
        {"normalizer": torch.tensor(17)},
        {"normalizer": torch.tensor(2.5, dtype=torch.float64)},
        {"scale": 0.0},
        {"scale": 1},
        {"scale": 30.0},
        {"normalize": True, "layer_weights": [0, 2, 1], "reduction": "sum", "scale": 0.4},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_value_and_gradients(backend, options, dtypes):
    student, teacher = sides(backend, dtypes)
    options = {k: v.to(backend.device) if k == "normalizer" and torch.is_tensor(v) else v for k, v in options.items()}
    assert_as_exact(backend, student, teacher, **options)


# ---- scale ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [1.0, -2.5])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"layer_map": [(0, 1), (2,), (1, 2, 3)]},
                                     {"pooling": "mean"}, {"layer_weights": [0, 1, 2]}], ids=str)  # fmt: skip
def test_scale_tensor_gets_its_gradient(backend, options, value, grad):
    for dtypes in DTYPES:
        student, teacher = sides(backend, dtypes)
        scale = torch.tensor(value, device=backend.device, requires_grad=True)
        got = assert_as_exact(backend, student, teacher, scale=scale, grad=grad, **options)
        assert got["d_scale"].item() != 0


def test_scale_gradient_alone(backend):
    student, teacher = ([h.detach() for h in side] for side in sides(backend))
    scale = torch.tensor(0.3, device=backend.device, requires_grad=True)
    assert_as_exact(backend, student, teacher, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale_dtypes(backend, dtype):
    student, teacher = sides(backend)
    scale = torch.tensor(0.375, dtype=dtype, device=backend.device, requires_grad=True)
    got = assert_as_exact(backend, student, teacher, scale=scale)
    assert got["d_scale"].dtype == dtype


def test_scale_tensor_without_grad_equals_the_float(backend):
    student, teacher = sides(backend)
    tensor = backend(student, teacher, scale=torch.tensor(0.25, device=backend.device))
    assert torch.equal(tensor, backend(student, teacher, scale=0.25))


def test_detached_attention_gives_no_gradient_to_the_scale(backend):
    student, teacher = sides(backend)
    scale = torch.tensor(0.3, device=backend.device, requires_grad=True)
    loss = backend(student, teacher, scale=scale, detach_attention=True)
    (grad,) = torch.autograd.grad(loss, scale, allow_unused=True)
    assert grad is None or grad.item() == 0


def test_default_scale_is_one_over_root_d(backend):
    student, teacher = sides(backend, D=16)
    assert torch.equal(backend(student, teacher), backend(student, teacher, scale=0.25))


def test_scale_0_is_the_average(backend):
    student, teacher = sides(backend, "f64-f64")
    output = backend.details(student, teacher, scale=0)
    assert torch.equal(output.attention, torch.full_like(output.attention, 0.25))
    average = torch.stack(teacher).mean(0)
    expected = torch.stack([(s - average).square().mean() for s in student]).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-14)


# ---- detach, normalize ------------------------------------------------------------------------------------


def test_detaching_changes_the_gradient_and_not_the_loss(backend):
    student, teacher = sides(backend)
    attached, detached = (backend(student, teacher, scale=1.0, detach_attention=d) for d in (False, True))
    assert torch.equal(attached, detached)
    one, other = torch.autograd.grad(attached, student)[0], torch.autograd.grad(detached, student)[0]
    assert (one - other).norm() > 0.05 * one.norm()


@pytest.mark.parametrize("dtypes", ["f32-f32", "f64-f64", "bf16-bf16"])
@pytest.mark.parametrize("size", [0.0, 1e-13, 1e-7, 1e6])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_normalize_rows_of_any_length(backend, side, size, dtypes):
    """Rows shorter than 1e-12 are divided by 1e-12; a row of zeros has no direction and no NaN."""
    student, teacher = sides(backend, dtypes)
    scale = 1 / (max(size, 1.0) * student[0].shape[-1] ** 0.5)  # the scores of long rows are as small as the others'
    for h in student if side == "student" else teacher:
        h.data[0, 1] *= size
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]], device=backend.device)
    got = assert_as_exact(backend, student, teacher, mask, normalize=True, scale=scale)
    assert got["d_student"][:, 0, 1].abs().max() == 0
    assert_as_exact(backend, student, teacher, normalize=True, scale=scale)


# ---- layer weights, reduction, normalizer ------------------------------------------------------------------


def test_layer_weights_do_not_change_n(backend):
    student, teacher = sides(backend)
    plain = backend.details(student, teacher).layer_losses
    weighted = backend.details(student, teacher, layer_weights=[2, 0, 0.5])
    torch.testing.assert_close(weighted.layer_losses, plain * plain.new_tensor([2, 0, 0.5]))
    torch.testing.assert_close(weighted.loss, weighted.layer_losses.sum())


def test_a_layer_of_weight_0_is_skipped(backend):
    student, teacher = sides(backend)
    student[1].data.fill_(torch.nan)
    output = backend.details(student, teacher, layer_weights=[1, 0, 1])
    output.loss.backward()
    assert bool(torch.isfinite(output.loss))
    assert bool((student[1].grad == 0).all())
    assert bool((output.attention[1] == 0).all())
    assert output.entropy[1].item() == 0


def test_sum_is_mean_times_n(backend):
    student, teacher = sides(backend)
    mask = torch.tensor([[1, 0, 2], [1, 1, 0]], device=backend.device)
    mean, total = backend(student, teacher, mask), backend(student, teacher, mask, reduction="sum")
    assert total.item() == pytest.approx(mean.item() * 3 * 10 * 5, rel=1e-6)


@pytest.mark.parametrize("pooling", ["token", "cls", "last", "mean"])
def test_normalizer_makes_parts_add_up(backend, pooling):
    """Two micro-batches with the count of both give the loss and the gradient of one batch; it counts pooled rows."""
    student, teacher = both_sides(2, 3, (4, 3), 6, "f64-f64", device=backend.device)
    mask = torch.tensor([[1, 1, 0], [2, 1, 1], [0, 0, 0], [1, 1, 1]], device=backend.device)
    whole = backend(student, teacher, mask, pooling=pooling)
    want = torch.autograd.grad(whole, student)
    count = {"token": mask.sum(), "cls": mask[:, 0].sum(), "last": 3.0, "mean": torch.tensor(3)}[pooling]
    parts = 0
    for rows in (slice(0, 1), slice(1, 4)):
        parts = parts + backend(
            [s[rows] for s in student], [t[rows] for t in teacher], mask[rows], pooling=pooling, normalizer=count
        )
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    for got, expected in zip(torch.autograd.grad(parts, student), want, strict=True):
        torch.testing.assert_close(got, expected)


# ---- return_details ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["token", "cls", "last", "mean"])
def test_details(backend, pooling):
    student, teacher = sides(backend, lead=(2, 2, 3))
    mask = torch.tensor([[[1, 1, 0], [0, 0, 0]], [[1, 0, 0], [1, 2, 1]]], device=backend.device)
    output = backend.details(student, teacher, mask, pooling=pooling)
    assert isinstance(output, ALPOutput)
    rows = mask if pooling == "token" else mask.any(-1)
    assert output.attention.shape == (3, *rows.shape, 4)
    counted = (rows > 0).expand(3, *rows.shape)
    assert bool((output.attention[~counted] == 0).all())
    torch.testing.assert_close(output.attention[counted].sum(-1), torch.ones_like(output.attention[counted][:, 0]))
    torch.testing.assert_close(output.layer_losses.sum(), output.loss.detach())
    assert output.loss.requires_grad
    assert not any(value.requires_grad for value in output[1:])
    weights = rows.double()
    entropy = (weights * torch.special.entr(output.attention.double()).sum(-1)).flatten(1).sum(1) / weights.sum()
    torch.testing.assert_close(output.entropy.double(), entropy, rtol=1e-5, atol=1e-6)
    assert bool((output.entropy <= math.log(4)).all())
    assert torch.equal(backend(student, teacher, mask, pooling=pooling), output.loss)


def test_details_without_any_gradient(backend):
    student, teacher = ([h.detach() for h in side] for side in sides(backend))
    output = assert_as_exact(backend, student, teacher)
    assert "d_student" not in output
    assert not backend(student, teacher).requires_grad


# ---- what may be given as hidden states ----------------------------------------------------------------------


def test_stacked_tensors_lists_tuples_and_none_entries(backend):
    student, teacher = sides(backend)
    want = backend(student, teacher)
    grads = torch.autograd.grad(want, student + teacher)
    stacked = torch.stack([s.detach() for s in student]).requires_grad_()
    teacher_stacked = torch.stack([t.detach() for t in teacher]).requires_grad_()
    loss = backend(stacked, teacher_stacked)
    loss.backward()
    assert torch.equal(loss, want)
    assert torch.equal(stacked.grad, torch.stack(grads[:3]))
    assert torch.equal(teacher_stacked.grad, torch.stack(grads[3:]))
    with_none = (None, student[0], None, None, *student[1:]), (*teacher[:2], None, *teacher[2:])
    assert torch.equal(backend(*with_none), want)
    assert torch.equal(backend((h for h in student), (h for h in teacher)), want)


def test_none_entries_are_dropped_before_indices_count(backend):
    student, teacher = sides(backend)
    table = [(0, 3), (1,), (2,)]
    assert torch.equal(
        backend(student, (None, *teacher[:2], None, *teacher[2:]), layer_map=table),
        backend(student, teacher, layer_map=table),
    )


def test_the_same_tensor_as_two_layers(backend):
    """A shared layer gets both gradients; a tensor on both sides too."""
    student, teacher = both_sides(2, 2, (3,), 6, "f64-f64", device=backend.device)
    a, b = student[0], teacher[0]
    copies = [x.detach().requires_grad_() for x in (a, a, b, b)]
    backend(copies[:2], copies[2:], layer_weights=[1, 3]).backward()
    backend([a, a], [b, b], layer_weights=[1, 3]).backward()
    torch.testing.assert_close(a.grad, copies[0].grad + copies[1].grad)
    torch.testing.assert_close(b.grad, copies[2].grad + copies[3].grad)
    c = student[1]
    copies = [c.detach().requires_grad_(), c.detach().requires_grad_()]
    backend([copies[0]], [copies[1], teacher[1]]).backward()
    backend([c], [c, teacher[1]]).backward()
    torch.testing.assert_close(c.grad, copies[0].grad + copies[1].grad)


def test_a_problem_has_the_defaults_of_alp_loss():
    """Both signatures state them: the public one for its reader, the inner one for callers inside."""
    public, inner = (inspect.signature(f).parameters for f in (alpkd_fast.alp_loss, make_problem))
    shared = public.keys() & inner.keys()
    assert shared >= {"attention_mask", "pooling", "layer_map", "scale", "reduction", "normalizer"}
    assert {name: public[name].default for name in shared} == {name: inner[name].default for name in shared}
    assert public["return_details"].default == inner["details"].default
