"""The backward: any incoming gradient, any number of times, and no second derivative of a fused backend."""

import pytest
import torch
from common import assert_as_exact, both_sides, hidden_states

DTYPES = ["f32-f32", "bf16-bf16", "f16-f16", "f64-f64", "f16-f32"]


def problem(backend, dtypes="f32-f32"):
    student, teacher = both_sides(2, 3, (2, 4), 6, dtypes, device=backend.device)
    scale = torch.tensor(0.5, device=backend.device, requires_grad=True)
    return student, teacher, scale


@pytest.mark.parametrize("grad", [1.0, 0.5, -3.0, 0.0, 1024.0])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_incoming_gradient(backend, dtypes, grad):
    student, teacher, scale = problem(backend, dtypes)
    assert_as_exact(backend, student, teacher, scale=scale, grad=grad)


MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]).view(2, 2, 4)


@pytest.mark.parametrize("dtypes", ["f32-f32", "f16-f16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
def test_incoming_gradient_of_pooled_rows(backend, pooling, masked, dtypes):
    student, teacher = both_sides(2, 3, MASK.shape, 6, dtypes, device=backend.device)
    mask = MASK.to(backend.device) if masked else None
    assert_as_exact(backend, student, teacher, mask, pooling=pooling, grad=0.3)


@pytest.mark.parametrize("pooling", ["token", "cls", "last", "mean"])
def test_mask_changed_after_the_forward_does_not_matter_to_a_fused_backend(fused, pooling):
    student, teacher = both_sides(2, 3, MASK.shape, 6, "f32-f32", device=fused.device)
    mask = MASK.clone().to(fused.device)
    want = torch.autograd.grad(0.3 * fused(student, teacher, mask, pooling=pooling), [*student, *teacher])
    loss = 0.3 * fused(student, teacher, mask, pooling=pooling)
    mask.fill_(1)
    for got, expected in zip(torch.autograd.grad(loss, [*student, *teacher]), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_rows_that_are_not_compared_are_not_multiplied(fused, pooling, masked):
    """Their gradients are zeros, and infinity would make NaN of a zero."""
    student, teacher = both_sides(2, 3, MASK.shape, 6, "f32-f32", device=fused.device)
    mask = MASK.to(fused.device) if masked else None
    loss = fused(student, teacher, mask, pooling=pooling)
    gradients = torch.autograd.grad(torch.inf * loss, [*student, *teacher])
    compared = torch.zeros(MASK.shape, dtype=torch.bool)
    positions = torch.tensor([[3, 1], [0, 2]] if masked else 3) if pooling == "last" else torch.tensor(0)
    compared.scatter_(-1, positions.expand(2, 2)[..., None], True)
    weighted = compared & (MASK != 0) if masked else compared
    for g in gradients:
        assert bool((g[~compared] == 0).all())
        assert not bool(g[weighted].isfinite().any())


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_second_call_for_pooled_rows(fused, pooling, masked):
    """A kept graph's gradients are multiplied whole, in new tensors; the last time their rows, in place."""
    student, teacher = both_sides(2, 3, MASK.shape, 6, "f16-f32", device=fused.device)
    mask = MASK.to(fused.device) if masked else None
    loss = 0.3 * fused(student, teacher, mask, pooling=pooling)
    first = torch.autograd.grad(loss, [*student, *teacher], retain_graph=True)
    second = torch.autograd.grad(loss, [*student, *teacher])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_second_call_with_retain_graph(backend, dtypes, factor):
    student, teacher, scale = problem(backend, dtypes)
    inputs = [*student, *teacher, scale]
    loss = factor * backend(student, teacher, scale=scale)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, inputs, retain_graph=True)
    third = torch.autograd.grad(loss, inputs)
    for a, b, c, d in zip(kept, first, second, third, strict=True):
        assert torch.equal(a, b), "a later backward changed a gradient that was handed out"
        assert torch.equal(a, c)
        assert torch.equal(a, d)


def test_gradients_handed_out_do_not_share_memory_with_a_kept_graph(backend):
    student, teacher, _ = problem(backend)
    loss = backend(student, teacher)
    first = torch.autograd.grad(loss, student, retain_graph=True)
    want = [g.clone() for g in first]
    for g in first:
        g.mul_(100)  # as gradient clipping does
    for got, expected in zip(torch.autograd.grad(loss, student), want, strict=True):
        assert torch.equal(got, expected)


def test_accumulation_over_two_calls(backend):
    student, teacher, _ = problem(backend)
    backend(student, teacher).backward()
    once = [h.grad.clone() for h in student + teacher]
    (2 * backend(student, teacher)).backward()
    for h, grad in zip(student + teacher, once, strict=True):
        torch.testing.assert_close(h.grad, 3 * grad)


def test_the_loss_used_twice(backend):
    student, teacher, _ = problem(backend)
    loss = backend(student, teacher)
    (loss + loss.square()).backward()
    want = torch.autograd.grad(backend(student, teacher), student)
    for h, grad in zip(student, want, strict=True):
        torch.testing.assert_close(h.grad, grad * (1 + 2 * loss.detach()))


def test_through_what_comes_before(backend):
    """Hidden states are not leaves: gradients flow on, also from their other uses."""
    x, teacher = hidden_states(1, (4,), 6, device=backend.device)[0], hidden_states(3, (4,), 6, device=backend.device)
    for h in teacher:
        h.requires_grad_(False)
    first = x * 2
    second = first.sin()
    loss = backend([first, second], teacher) + second.sum()
    loss.backward()
    leaf_1, leaf_2 = first.detach().requires_grad_(), second.detach().requires_grad_()
    backend([leaf_1, leaf_2], teacher).backward()
    want = 2 * (leaf_1.grad + first.detach().cos() * (leaf_2.grad + 1))
    torch.testing.assert_close(x.grad, want)


@pytest.mark.parametrize("kept", [False, True], ids=["freed", "kept"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("pooling", ["token", "cls", "last", "mean"])
def test_batched_incoming_gradients_equal_a_loop(fused, pooling, dtypes, kept):
    student, teacher = both_sides(2, 3, MASK.shape, 6, dtypes, device=fused.device)
    inputs = [*student, *teacher, torch.tensor(0.5, device=fused.device, requires_grad=True)]
    loss = fused(student, teacher, MASK.to(fused.device), pooling=pooling, scale=inputs[-1])
    incoming = torch.tensor([1.0, 0.3, -2.0], dtype=loss.dtype, device=fused.device)
    each = [torch.autograd.grad(loss, inputs, v, retain_graph=True) for v in incoming]
    mapped = torch.vmap(lambda v: torch.autograd.grad(loss, inputs, v, retain_graph=True))(incoming)
    together = torch.autograd.grad(loss, inputs, incoming, is_grads_batched=True, retain_graph=kept)
    for got, other, *want in zip(together, mapped, *each, strict=True):
        assert torch.equal(got, torch.stack(want))
        assert torch.equal(other, got)


def test_create_graph_alone_is_fine(backend):
    student, teacher, scale = problem(backend)
    want = torch.autograd.grad(backend(student, teacher, scale=scale), [*student, scale])
    got = torch.autograd.grad(backend(student, teacher, scale=scale), [*student, scale], create_graph=True)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


def test_second_derivative_of_a_fused_backend_names_the_reference(fused):
    student, teacher, scale = problem(fused)
    grads = torch.autograd.grad(fused(student, teacher, scale=scale), [*student, *teacher, scale], create_graph=True)
    for grad in (grads[0], grads[2], grads[-1]):
        with pytest.raises(RuntimeError, match=r'backend="reference"'):
            grad.sum().backward(retain_graph=True)


def test_unused_outputs_and_a_loss_without_backward(backend):
    student, teacher, _ = problem(backend)
    output = backend.details(student, teacher)
    del output
    with pytest.raises(RuntimeError, match="does not require grad"):
        backend.details(student, teacher).layer_losses.sum().backward()
    other = torch.ones((), device=backend.device, requires_grad=True)
    (backend(student, teacher).detach() + other).backward()
    assert student[0].grad is None


def test_inputs_changed_after_the_forward_do_not_matter_to_a_fused_backend(fused):
    """The gradients are made in the forward; nothing of the inputs is kept."""
    student, teacher, _ = problem(fused)
    want = torch.autograd.grad(fused(student, teacher), student)
    loss = fused(student, teacher)
    with torch.no_grad():
        for h in student + teacher:
            h.fill_(torch.nan)
    for got, expected in zip(torch.autograd.grad(loss, student), want, strict=True):
        assert torch.equal(got, expected)


def test_hooks_and_grad_scaler(backend):
    student, teacher, _ = problem(backend)
    seen = []
    student[0].register_hook(lambda g: seen.append(g.clone()))
    scaler = torch.amp.GradScaler(backend.device, init_scale=2.0**10)
    scaler.scale(backend(student, teacher)).backward()
    torch.testing.assert_close(student[0].grad, seen[0])
    (plain,) = torch.autograd.grad(backend(student, teacher), student[0])
    torch.testing.assert_close(seen[0], plain * 2.0**10)
