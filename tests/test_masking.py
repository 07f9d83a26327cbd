"""Rows of weight 0 are not there; every other row counts with its weight."""

import pytest
import torch
from common import assert_as_exact, both_sides, hidden_states

MASKS = {
    "bool": torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool),
    "uint8": torch.tensor([[1, 1, 0, 1], [0, 2, 3, 0], [1, 1, 255, 1]], dtype=torch.uint8),
    "int8": torch.tensor([[1, 1, 0, 1], [0, 2, 3, 0], [1, 1, 127, 1]], dtype=torch.int8),
    "int16": torch.tensor([[1, 1, 0, 1], [0, 2, 3, 0], [1, 1, 300, 1]], dtype=torch.int16),
    "int32": torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.int32),
    "int64": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]),
    "f16": torch.tensor([[0.5, 1, 0, 0], [0, 2.5, 6e-8, 0], [1, 0.1, 1000, 1]], dtype=torch.float16),
    "bf16": torch.tensor([[0.5, 1, 0, 0], [0, 2.5, 1, 0], [1, 0.1, 3, 1]], dtype=torch.bfloat16),
    "f32": torch.tensor([[0.5, 1, 0, 0], [0, 2.5, 1e-20, 0], [1, 0.1, 3, 1]]),
    "f64": torch.tensor([[0.5, 1, 0, 0], [0, 2.5, 1e-20, 0], [1, 0.1, 3, 1]], dtype=torch.float64),
    "strided": torch.tensor([[0.5, 1, 0], [0, 2.5, 1], [1, 0.1, 0], [1, 1, 1]]).t(),
    "expanded": torch.tensor([1.0, 0.5, 0, 2]).expand(3, 4),
    "first-0": torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]),
    "sequence-of-0": torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]),
}
POOLINGS = ("token", "cls", "last", "mean")


def read_rows(mask, pooling):
    """Bool (B, S): positions that the pooling reads."""
    mask = mask > 0
    if pooling == "cls":
        return mask & (torch.arange(mask.shape[1]) == 0)
    if pooling == "last":
        return mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return mask


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_weights(backend, mask, pooling):
    student, teacher = both_sides(2, 3, (3, 4), 10, device=backend.device)
    assert_as_exact(backend, student, teacher, mask.to(backend.device), pooling=pooling)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtypes", ["f32-f32", "bf16-bf16", "f16-f16", "f64-f64", "f32-bf16"])
def test_rows_of_weight_0_are_never_read(backend, pooling, dtypes, poison):
    mask = MASKS["sequence-of-0"].to(backend.device)
    clean = both_sides(2, 3, (3, 4), 10, dtypes, device=backend.device)
    unread = ~read_rows(mask.cpu(), pooling).to(backend.device)
    poisoned = [[h.detach().masked_fill(unread[..., None], poison).requires_grad_() for h in side] for side in clean]
    for options in ({}, {"normalize": True}, {"scale": 2.0, "layer_map": [(0, 1), (2,)]}):
        got = assert_as_exact(backend, *poisoned, mask, pooling=pooling, **options)
        want = assert_as_exact(backend, *clean, mask, pooling=pooling, **options)
        for name, value in got.items():
            assert torch.equal(value, want[name]), f"{name} depends on rows of weight 0"
        for side in ("d_student", "d_teacher"):
            assert bool((got[side][:, unread] == 0).all()), f"{side} of a row of weight 0 is not 0"
            assert not bool((got[side][:, ~unread] == 0).all(-1).any()), f"{side} of a row that counts is 0"


@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per-layer"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_rows_of_weight_0_do_not_reach_the_projection(backend, form, pooling, per_layer):
    mask = MASKS["sequence-of-0"].to(backend.device)
    student, _ = both_sides(2, 3, (3, 4), 5, device=backend.device)
    teacher = hidden_states(3, (3, 4), 7, device=backend.device, seed=3)
    unread = ~read_rows(mask.cpu(), pooling).to(backend.device)
    teacher = [t.detach().masked_fill(unread[..., None], torch.nan).requires_grad_() for t in teacher]
    weight = hidden_states(1, (2, 5) if per_layer else (5,), 7, seed=4, device=backend.device)[0]
    bias = hidden_states(1, (2,) if per_layer else (), 5, seed=5, device=backend.device)[0]
    assert_as_exact(backend, student, teacher, mask, pooling=pooling, proj_weight=weight, proj_bias=bias)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_non_finite_values_in_rows_that_count_come_through(backend, side, pooling, poison):
    student, teacher = both_sides(2, 3, (2, 3), 20, device=backend.device)
    with torch.no_grad():
        (student if side == "student" else teacher)[1][0, 0 if pooling == "cls" else 2, 17] = poison
    loss = backend(student, teacher, pooling=pooling)
    assert not bool(torch.isfinite(loss)), f"loss {loss.item()} hides {poison}"
    loss.backward()
    hit = student[1] if side == "student" else teacher[1]
    assert not bool(torch.isfinite(hit.grad).all())
    assert bool(torch.isfinite(hit.grad[1]).all()), "it reached another sequence"


@pytest.mark.parametrize("dtypes", ["f32-f32", "f16-f16", "f64-f64"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"normalizer": 2.0}, {"normalize": True}], ids=str)
def test_no_row_counts(backend, pooling, dtypes, options):
    student, teacher = both_sides(2, 3, (2, 3), 6, dtypes, device=backend.device)
    for h in student + teacher:
        h.data.fill_(torch.nan)
    scale = torch.tensor(1.0, device=backend.device, requires_grad=True)
    mask = torch.zeros(2, 3, device=backend.device)
    output = backend.details(student, teacher, mask, pooling=pooling, scale=scale, **options)
    for value in output:
        assert bool((value == 0).all())
    output.loss.backward()
    for h in [*student, *teacher, scale]:
        assert bool((h.grad == 0).all())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_zero_rows(backend, pooling):
    student, teacher = both_sides(2, 3, (0,) if pooling == "token" else (0, 3), 6, device=backend.device)
    output = backend.details(student, teacher, pooling=pooling)
    assert output.loss.item() == 0
    assert output.attention.shape == (2, 0, 3)
    assert bool((output.layer_losses == 0).all())
    assert bool((output.entropy == 0).all())
    output.loss.backward()
    assert student[0].grad.shape == student[0].shape


def test_zero_rows_in_the_middle_dimension(backend):
    student, teacher = both_sides(2, 3, (4, 0), 6, device=backend.device)
    loss = backend(student, teacher, torch.ones(4, 0, device=backend.device))
    loss.backward()
    assert loss.item() == 0
    assert student[0].grad.shape == (4, 0, 6)


def test_a_weight_counts_like_repeated_rows(backend):
    student, teacher = both_sides(2, 3, (4,), 6, device=backend.device)
    weights = torch.tensor([3, 0, 1, 2], device=backend.device)
    weighted = backend(student, teacher, weights)
    rows = weights.repeat_interleave(weights).new_tensor([0, 0, 0, 2, 3, 3])
    repeated = backend([s[rows] for s in student], [t[rows] for t in teacher])
    assert weighted.item() == pytest.approx(repeated.item(), rel=1e-6)
