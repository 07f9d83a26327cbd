"""Numerical derivatives in float64: first of every backend, second of the reference."""

import pytest
import torch
from common import both_sides

OPTIONS = {
    "plain": {},
    "scale-1": {"scale": 1.0},
    "scale-0": {"scale": 0.0},
    "normalize": {"normalize": True},
    "map": {"layer_map": [(0, 1), (1, 2)]},
    "one-hot": {"layer_map": [(0,), (2,)]},
    "layer-weights": {"layer_weights": [0.5, 2.0]},
    "sum": {"reduction": "sum"},
    "normalizer": {"normalizer": 3.5},
    "cls": {"pooling": "cls"},
    "last": {"pooling": "last"},
    "mean": {"pooling": "mean"},
    "normalize-mean-map": {"normalize": True, "pooling": "mean", "layer_map": [(0, 1, 2), (1,)]},
}


def problem(backend, lead=(2, 2), D=3):
    student, teacher = both_sides(2, 3, lead, D, "f64-f64", device=backend.device)
    mask = torch.tensor([[0.5, 2.0], [1.0, 0.0]], device=backend.device)
    scale = torch.tensor(0.7, dtype=torch.float64, device=backend.device, requires_grad=True)
    return student, teacher, mask, scale


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_first_derivative(backend, options):
    student, teacher, mask, scale = problem(backend)
    options = {"scale": scale} | options

    def loss(scale, *layers):
        chosen = options | ({"scale": scale} if torch.is_tensor(options["scale"]) else {})
        return backend(layers[:2], layers[2:], mask, **chosen)

    assert torch.autograd.gradcheck(loss, (scale, *student, *teacher))


@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per-layer"])
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"pooling": "mean"}], ids=["plain", "normalize", "mean"])
def test_first_derivative_with_projection(backend, form, options, per_layer):
    student, teacher, mask, scale = problem(backend)
    teacher = [torch.cat([t, t.square()], -1).detach().requires_grad_() for t in teacher]
    lead = (2,) if per_layer else ()
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(*lead, 3, 6, dtype=torch.float64, generator=generator).to(backend.device).requires_grad_()
    bias = torch.randn(*lead, 3, dtype=torch.float64, generator=generator).to(backend.device).requires_grad_()

    def loss(scale, weight, bias, *layers):
        return backend(
            layers[:2], layers[2:], mask, scale=scale, proj_weight=weight, proj_bias=bias, layer_map=[(0, 1), (1, 2)],
            **options,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (scale, weight, bias, *student, *teacher))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_second_derivative_of_the_reference(options):
    from backend import Backend

    reference = Backend("reference")
    student, teacher, mask, scale = problem(reference, D=2)
    options = {"scale": scale} | options

    def loss(scale, *layers):
        chosen = options | ({"scale": scale} if torch.is_tensor(options["scale"]) else {})
        return reference(layers[:2], layers[2:], mask, **chosen)

    assert torch.autograd.gradgradcheck(loss, (scale, *student, *teacher))


def test_detached_attention_is_the_gradient_for_constant_weights(backend):
    """detach_attention has no numerical derivative of its own: fix the attention and differentiate that."""
    student, teacher, mask, _ = problem(backend)
    output = backend.details(student, teacher, mask, detach_attention=True, scale=1.5)
    output.loss.backward()
    fixed_s, fixed_t = [s.detach().requires_grad_() for s in student], [t.detach().requires_grad_() for t in teacher]
    expected = 0
    for i, s in enumerate(fixed_s):
        combined = sum(output.attention[i, ..., j, None] * t for j, t in enumerate(fixed_t))
        expected = expected + (mask * (s - combined).square().sum(-1)).sum() / (2 * 3 * mask.sum())
    expected.backward()
    for got, want in zip(student + teacher, fixed_s + fixed_t, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-12, atol=1e-14)
