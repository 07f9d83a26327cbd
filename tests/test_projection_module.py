"""ALPLoss: projections of either side, the learned scale, and what torch expects of a module."""

import copy
import io
import math
import pickle

import pytest
import torch
from common import hidden_states
from torch.nn.functional import linear

from alpkd_fast import ALPLoss, alp_loss

M, N, LEAD, NARROW, WIDE = 2, 3, (2, 4), 5, 8
MASK = torch.tensor([[1, 2, 0, 0], [1, 1, 1, 1]])


def sides(dtype=torch.float64):
    return hidden_states(M, LEAD, NARROW, dtype, seed=1), hidden_states(N, LEAD, WIDE, dtype, seed=2)


def randomized(**options):
    module = ALPLoss(NARROW, WIDE, **options).double()
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


def gradients(loss, student, module):
    return torch.autograd.grad(loss, [*student, *module.parameters()])


@pytest.mark.parametrize("pooling", ["token", "cls", "last", "mean"])
@pytest.mark.parametrize("projections", [None, M], ids=["shared", "per-layer"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_student_projection_is_a_linear_layer_before_the_loss(bias, projections, pooling):
    student, teacher = sides()
    module = randomized(projection="student", projections=projections, bias=bias, pooling=pooling, learn_scale=True)
    loss = module(student, teacher, MASK)

    def projected(i):
        pick = (lambda p: p) if projections is None else (lambda p: p[i])
        return linear(student[i], pick(module.proj_weight), None if not bias else pick(module.proj_bias))

    expected = alp_loss(
        [projected(i) for i in range(M)], teacher, MASK, pooling=pooling, scale=module.log_scale.exp().squeeze(),
        backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for a, b in zip(gradients(loss, student, module), gradients(expected, student, module), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_default_scale_and_normalizer_are_of_the_teachers_width():
    student, teacher = sides()
    module = randomized(projection="student", bias=False, reduction="mean")
    rows = [linear(s, module.proj_weight) for s in student]
    by_hand = alp_loss(rows, teacher, MASK, scale=1 / math.sqrt(WIDE), reduction="sum") / (M * WIDE * MASK.sum())
    torch.testing.assert_close(module(student, teacher, MASK), by_hand, rtol=1e-12, atol=0)


def test_rows_of_weight_0_do_not_reach_the_student_projection():
    student, teacher = ([h.detach() for h in side] for side in sides())
    for h in student + teacher:
        h[MASK == 0] = torch.nan
    module = randomized(projection="student")
    module(student, teacher, MASK).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_student_projection_in_low_precision_under_autocast(dtype):
    student, teacher = sides()
    module = randomized(projection="student").float()
    low = [s.to(dtype) for s in student], [t.to(dtype) for t in teacher]
    exact = copy.deepcopy(module).double()([s.double() for s in low[0]], [t.double() for t in low[1]], MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = module(*low, MASK)
    assert loss.dtype == torch.float32
    # NARROW + WIDE products and sums of float32, none in the low precision
    torch.testing.assert_close(loss.double(), exact, rtol=8 * (NARROW + WIDE) * 2**-24, atol=0)


def test_teacher_projection_by_name_is_the_default():
    torch.manual_seed(0)
    named = ALPLoss(NARROW, WIDE, projection="teacher")
    torch.manual_seed(0)
    default = ALPLoss(NARROW, WIDE)
    assert named.proj_weight.shape == (NARROW, WIDE)
    assert torch.equal(named.proj_weight, default.proj_weight)
    assert ALPLoss(NARROW, NARROW).proj_weight is None
    assert ALPLoss(NARROW, WIDE, projection=False).proj_weight is None


@pytest.mark.parametrize("projection", ["teacher", "student"])
def test_starting_values(projection):
    square = ALPLoss(WIDE, WIDE, projection=projection, projections=M)
    assert torch.equal(square.proj_weight, torch.eye(WIDE).expand(M, -1, -1))
    other = ALPLoss(NARROW, WIDE, projection=projection)
    W = other.proj_weight if projection == "teacher" else other.proj_weight.T
    torch.testing.assert_close(W @ W.T, torch.eye(NARROW))
    assert not other.proj_bias.any()


@pytest.mark.parametrize("scale", [None, 0.5])
def test_learned_scale(scale):
    student, teacher = sides()
    student, teacher = student, [t[..., :NARROW] for t in teacher]
    module = ALPLoss(NARROW, NARROW, learn_scale=True, scale=scale).double()
    start = 1 / math.sqrt(NARROW) if scale is None else scale
    assert math.isclose(module.log_scale.exp().item(), start, rel_tol=1e-6)
    loss = module(student, teacher, MASK)
    loss.backward()
    tau = module.log_scale.detach().exp().squeeze().requires_grad_()
    expected = alp_loss(student, teacher, MASK, scale=tau)
    (d_tau,) = torch.autograd.grad(expected, tau)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(module.log_scale.grad.squeeze(), d_tau * tau.detach())


def test_learned_scale_stays_positive():
    student, teacher = sides()
    module = ALPLoss(NARROW, NARROW, learn_scale=True).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=10)
    for _ in range(5):
        optimizer.zero_grad()
        module(student, [t[..., :NARROW] for t in teacher], MASK).backward()
        optimizer.step()
    assert module.log_scale.exp() > 0
    assert module(student, [t[..., :NARROW] for t in teacher], MASK).isfinite()


@pytest.mark.parametrize("options", [
    {"projection": "student", "projections": M, "learn_scale": True},
    {"projection": "teacher", "bias": False, "layer_weights": [1.0, 0.5]},
], ids=["student", "teacher"])  # fmt: skip
def test_state_dict_deepcopy_and_pickle(options):
    student, teacher = sides()
    module = randomized(**options)
    loss = module(student, teacher, MASK)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = ALPLoss(NARROW, WIDE, **options).double()
    loaded.load_state_dict(torch.load(buffer))
    for other in (loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(student, teacher, MASK), loss)
    parts = [
        ("log_scale" in options or "learn_scale" in options, "log_scale"),
        (options.get("bias", True), "proj_bias"),
        ("layer_weights" in options, "layer_weights"),
    ]
    assert set(module.state_dict()) == {"proj_weight", *(name for held, name in parts if held)}


def test_repr_names_what_it_holds():
    text = repr(ALPLoss(NARROW, WIDE, projection="student", pooling="cls", learn_scale=True))
    assert text == "ALPLoss(pooling='cls', projection='student', proj_weight=(8, 5), bias=True, learn_scale=True)"


@pytest.mark.parametrize(("arguments", "message"), [
    ({"projection": "both"}, "projection: got 'both'; pass teacher, student"),
    ({"projection": "student", "student_dim": NARROW}, "student_dim and teacher_dim, got 5 and None"),
    ({"learn_scale": True}, "needs student_dim"),
    ({"learn_scale": True, "scale": 0.0}, "finite and > 0, got 0.0"),
], ids=str)  # fmt: skip
def test_errors_of_the_constructor(arguments, message):
    with pytest.raises(ValueError, match=message):
        ALPLoss(**arguments)


def test_errors_of_a_call():
    student, teacher = sides()
    with pytest.raises(ValueError, match=r"student projection has shape \(7, 5\).*\(8, 5\), or \(2, 8, 5\)"):
        ALPLoss(NARROW, 7, projection="student")(student, teacher)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        ALPLoss(NARROW, WIDE, projection="student")(student, teacher, MASK[:1])
