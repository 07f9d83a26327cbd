"""The learned projection: values, every gradient, autocast, and both exact ways of the specification."""

import pytest
import torch
from common import assert_as_exact, both_sides, hidden_states

pytestmark = pytest.mark.usefixtures("form")


def problem(backend, dtypes="f32-f32", per_layer=False, lead=(2, 3), wide=6, narrow=9, m=2, n=3, param=None):
    student, _ = both_sides(m, n, lead, wide, dtypes, device=backend.device)
    _, teacher = both_sides(m, n, lead, narrow, dtypes, seed=1, device=backend.device)
    dtype = param or torch.promote_types(student[0].dtype, torch.float32)
    leading = (m,) if per_layer else ()
    weight = hidden_states(1, (*leading, wide), narrow, dtype, seed=7, device=backend.device)[0]
    bias = hidden_states(1, leading, wide, dtype, seed=8, device=backend.device)[0]
    return student, teacher, {"proj_weight": weight, "proj_bias": bias}


@pytest.mark.parametrize("dtypes", ["f32-f32", "f64-f64", "bf16-bf16", "f16-f16", "f32-bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize": True},
        {"detach_attention": True},
        {"pooling": "cls"},
        {"pooling": "last"},
        {"pooling": "mean"},
        {"layer_map": [(0, 2), (1,)]},
        {"layer_weights": [0, 2.0]},
        {"reduction": "sum"},
        {"normalizer": 4.0},
        {"scale": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per-layer"])
def test_value_and_gradients(backend, per_layer, options, dtypes):
    student, teacher, phi = problem(backend, dtypes, per_layer)
    mask = torch.tensor([[1, 2, 0], [1, 1, 1]], device=backend.device)
    assert_as_exact(backend, student, teacher, mask, **phi, **options)


@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per-layer"])
def test_widths_wider_narrower_equal_and_no_bias(backend, per_layer):
    for wide, narrow in ((4, 9), (9, 4), (5, 5), (1, 3), (3, 1)):
        student, teacher, phi = problem(backend, per_layer=per_layer, wide=wide, narrow=narrow)
        assert_as_exact(backend, student, teacher, proj_weight=phi["proj_weight"])
        assert_as_exact(backend, student, teacher, **phi, scale=0.5)


def test_gradients_only_where_wanted(backend):
    student, teacher, phi = problem(backend)
    for t in teacher:
        t.requires_grad_(False)
    got = assert_as_exact(backend, student, teacher, **phi)
    assert "d_teacher" not in got
    for s in student:
        s.requires_grad_(False)
    got = assert_as_exact(backend, student, teacher, **phi)
    assert {"d_proj_weight", "d_proj_bias"} <= got.keys()


def test_scale_tensor_with_projection(backend):
    for per_layer in (False, True):
        student, teacher, phi = problem(backend, per_layer=per_layer)
        scale = torch.tensor(0.4, device=backend.device, requires_grad=True)
        assert_as_exact(backend, student, teacher, **phi, scale=scale)
        if backend.fused:  # 0, not None: a parameter without a gradient stops DistributedDataParallel
            backend(student, teacher, **phi, scale=scale, detach_attention=True).backward()
            assert scale.grad.item() == 0


@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_parameter_dtypes(backend, param):
    student, teacher, phi = problem(backend, param=param)
    loss = backend(student, teacher, **phi)
    loss.backward()
    assert loss.dtype == torch.float32
    assert phi["proj_weight"].grad.dtype == phi["proj_bias"].grad.dtype == param
    wide = [x.detach().float().requires_grad_() for x in phi.values()]
    backend(student, teacher, proj_weight=wide[0], proj_bias=wide[1]).backward()
    tolerance = {"rtol": 2 * torch.finfo(param).eps + 1e-5, "atol": 1e-6}
    torch.testing.assert_close(phi["proj_weight"].grad.float(), wide[0].grad, **tolerance)
    torch.testing.assert_close(phi["proj_bias"].grad.float(), wide[1].grad, **tolerance)


@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per-layer"])
def test_autocast_changes_nothing(backend, per_layer):
    student, teacher, phi = problem(backend, per_layer=per_layer)
    want = backend(student, teacher, **phi)
    want_grads = torch.autograd.grad(want, [*student, *teacher, *phi.values()])
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        got = backend(student, teacher, **phi)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    for one, other in zip(torch.autograd.grad(got, [*student, *teacher, *phi.values()]), want_grads, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per-layer"])
def test_both_exact_ways_agree(backend, per_layer):
    """Projecting the query instead of the teacher: q = W^T s, u = sum_j a t, C = W u + b, and its gradients."""
    student, teacher, phi = problem(backend, "f64-f64", per_layer, lead=(5,))
    tau, m, R, D = 0.7, 2, 5, 6
    loss = backend(student, teacher, **phi, scale=tau)
    loss.backward()
    t = torch.stack([t.detach() for t in teacher])  # (n, R, D_t)
    total, d_weight, d_bias, d_teacher = 0.0, 0.0, 0.0, torch.zeros_like(t)
    d_weights, d_biases = [], []
    for i in range(m):
        W, b = (x.detach()[i] if per_layer else x.detach() for x in phi.values())
        s, w = student[i].detach(), 1 / (m * R * D)
        q = s @ W
        a = torch.softmax(tau * torch.einsum("rd,jrd->rj", q, t), -1)
        u = torch.einsum("rj,jrd->rd", a, t)
        e = s - (u @ W.T + b)
        p = torch.einsum("rd,jrd->rj", e @ W, t)
        c = a * (p - (a * p).sum(-1, keepdim=True))
        y = torch.einsum("rj,jrd->rd", c, t)
        total += w * e.square().sum()
        torch.testing.assert_close(student[i].grad, 2 * w * (e - tau * y @ W.T), rtol=1e-10, atol=1e-14)
        d_weights.append(-2 * w * (e.T @ u + tau * s.T @ y))
        d_biases.append(-2 * w * e.sum(0))
        d_teacher -= 2 * w * (torch.einsum("rj,rd->jrd", a, e @ W) + tau * torch.einsum("rj,rd->jrd", c, q))
    d_weight, d_bias = (torch.stack(d) if per_layer else sum(d) for d in (d_weights, d_biases))
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    torch.testing.assert_close(phi["proj_weight"].grad, d_weight, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(phi["proj_bias"].grad, d_bias, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(torch.stack([t.grad for t in teacher]), d_teacher, rtol=1e-10, atol=1e-14)


def test_the_identity_is_no_projection(backend, form):
    student, teacher = both_sides(2, 3, (4,), 6, "f64-f64", device=backend.device)
    eye = torch.eye(6, dtype=torch.float64, device=backend.device)
    roundings = 16 * 2.0**-53 if form == "query-side" else 0  # the teacher side runs the same operator
    got, want = backend(student, teacher, proj_weight=eye), backend(student, teacher)
    torch.testing.assert_close(got, want, rtol=roundings, atol=0)


@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per-layer"])
def test_no_row_counts(backend, per_layer):
    student, teacher, phi = problem(backend, per_layer=per_layer)
    loss = backend(student, teacher, torch.zeros(2, 3, device=backend.device), **phi)
    loss.backward()
    assert loss.item() == 0
    for x in phi.values():
        assert bool((x.grad == 0).all())


@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per-layer"])
def test_a_layer_outside_the_map_is_not_read(backend, per_layer):
    student, teacher, phi = problem(backend, per_layer=per_layer)
    options = phi | {"layer_map": [(0,), (0, 2)]}
    want = backend.details(student, teacher, **options)
    with torch.no_grad():
        teacher[1].fill_(torch.nan)
    got = backend.details(student, teacher, **options)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    got.loss.backward()
    for x in (*student, teacher[0], teacher[2], *phi.values()):
        assert bool(torch.isfinite(x.grad).all())


def test_values_are_checked(backend):
    if backend.device != "cpu":
        pytest.skip("values are not checked on a GPU")
    student, teacher, phi = problem(backend)
    with pytest.raises(ValueError, match="attention_mask holds -1"):
        backend(student, teacher, -torch.ones(2, 3), **phi)
    with pytest.raises(ValueError, match="scale must be finite"):
        backend(student, teacher, scale=torch.tensor(-1.0), **phi)


def test_no_second_derivative_of_either_form(fused):
    student, teacher, phi = problem(fused)
    (first,) = torch.autograd.grad(fused(student, teacher, **phi), student[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        first.sum().backward()


@pytest.mark.parametrize("masked", [False, True], ids=["all-rows", "masked"])
@pytest.mark.parametrize("pooling", ["token", "cls", "last", "mean"])
def test_a_teacher_that_ran_under_inference_mode(backend, pooling, masked):
    student, teacher, phi = problem(backend)
    mask = torch.tensor([[1, 2, 0], [1, 1, 1]], device=backend.device) if masked else None
    with torch.inference_mode():
        teacher = [t.clone() for t in teacher]
    backend(student, teacher, mask, **phi, pooling=pooling).backward()
    want = [x.grad.clone() for x in (*student, *phi.values())]
    for x in (*student, *phi.values()):
        x.grad = None
    backend(student, [t.clone() for t in teacher], mask, **phi, pooling=pooling).backward()
    for x, d in zip((*student, *phi.values()), want, strict=True):
        assert torch.equal(x.grad, d)


@pytest.mark.parametrize("layer_map", ["all", [(0, 2), (1,)]], ids=str)
def test_batched_incoming_gradients(backend, layer_map):
    student, teacher, phi = problem(backend, "f64-f64")
    scale = torch.tensor(0.4, dtype=torch.float64, device=backend.device, requires_grad=True)
    wanted = [*student, *teacher, *phi.values(), scale]
    loss = backend(student, teacher, **phi, layer_map=layer_map, scale=scale)
    incoming = torch.tensor([0.5, -2.0], dtype=torch.float64, device=backend.device)
    want = [torch.autograd.grad(loss, wanted, g, retain_graph=True) for g in incoming]
    got = torch.autograd.grad(loss, wanted, incoming, is_grads_batched=True)
    for batched, *single in zip(got, *want, strict=True):
        torch.testing.assert_close(batched, torch.stack(single), rtol=1e-12, atol=1e-14)
