"""Pooling, against rows pooled by hand and given as tokens."""

import pytest
import torch
from common import assert_as_exact, both_sides


def by_hand(layers, mask, pooling):
    if pooling == "cls":
        return [h[:, 0] for h in layers]
    if pooling == "last":
        positions = [max(k for k in range(mask.shape[1]) if row[k] > 0) for row in mask]
        return [torch.stack([h[b, k] for b, k in enumerate(positions)]) for h in layers]
    return [torch.stack([(w[:, None] * h_b).sum(0) / w.sum() for w, h_b in zip(mask, h, strict=True)]) for h in layers]


@pytest.mark.parametrize("dtypes", ["f32-f32", "f64-f64"])
@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
def test_equals_rows_pooled_by_hand(backend, pooling, dtypes):
    student, teacher = both_sides(2, 3, (3, 5), 6, dtypes, device=backend.device)
    mask = torch.tensor([[1, 2, 0.5, 0, 0], [0.3, 0, 0, 1, 0], [1, 1, 1, 1, 1]], device=backend.device)
    mask = mask.to(student[0].dtype)
    weights = mask[:, 0] if pooling == "cls" else None  # the others count 1, whatever their tokens weigh
    want = backend(by_hand(student, mask, pooling), by_hand(teacher, mask, pooling), weights)
    want_grads = torch.autograd.grad(want, student + teacher)
    got = backend(student, teacher, mask, pooling=pooling)
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtypes == "f32-f32" else {"rtol": 1e-12, "atol": 1e-15}
    torch.testing.assert_close(got, want, **tolerance)
    for one, other in zip(torch.autograd.grad(got, student + teacher), want_grads, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("lead", [(1, 1), (4,), (2, 3, 4), (2, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
def test_leading_shapes(backend, pooling, lead):
    student, teacher = both_sides(2, 3, lead, 5, device=backend.device)
    got = assert_as_exact(backend, student, teacher, pooling=pooling)
    assert got["attention"].shape == (2, *lead[:-1], 3)


@pytest.mark.parametrize("options", [{"normalize": True}, {"detach_attention": True}, {"layer_map": [(0,), (1, 2)]}],
                         ids=["normalize", "detach", "map"])  # fmt: skip
@pytest.mark.parametrize("dtypes", ["f32-f32", "bf16-bf16", "f16-f16", "bf16-f32"])
@pytest.mark.parametrize("pooling", ["cls", "last", "mean"])
def test_with_other_options(backend, pooling, dtypes, options):
    student, teacher = both_sides(2, 3, (3, 4), 17, dtypes, device=backend.device)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], device=backend.device)
    assert_as_exact(backend, student, teacher, mask, pooling=pooling, **options)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_sequence_counts_once_whatever_its_length(backend, pooling):
    student, teacher = both_sides(1, 2, (2, 6), 5, device=backend.device)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]], device=backend.device)
    single = [backend([s[b] for s in student], [t[b] for t in teacher], mask[b], pooling=pooling) for b in range(2)]
    both = backend(student, teacher, mask, pooling=pooling)
    assert both.item() == pytest.approx((single[0] + single[1]).item() / 2, rel=1e-5)


def test_last_takes_the_last_position_of_non_zero_weight(backend):
    """Left padding, gaps and right padding."""
    student, teacher = both_sides(1, 2, (3, 4), 5, device=backend.device)
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]], device=backend.device)
    backend(student, teacher, mask, pooling="last").backward()
    used = (student[0].grad != 0).any(-1)
    assert used.tolist() == [[False, False, False, True], [False, False, True, False], [True, False, False, False]]


def test_cls_counts_with_the_weight_of_index_0(backend):
    student, teacher = both_sides(1, 2, (2, 3), 5, device=backend.device)
    mask = torch.tensor([[3.0, 1, 1], [1.0, 1, 1]], device=backend.device)
    first, second = (backend([student[0][b]], [t[b] for t in teacher], pooling="cls").item() for b in range(2))
    got = backend(student, teacher, mask, pooling="cls").item()
    assert got == pytest.approx((3 * first + second) / 4, rel=1e-5)


def test_packed_tokens(backend):
    """(total_tokens, D) equals the padded batch with its mask."""
    student, teacher = both_sides(2, 3, (2, 4), 6, device=backend.device)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool, device=backend.device)
    padded = backend(student, teacher, mask)
    packed = backend([s[mask] for s in student], [t[mask] for t in teacher])
    assert packed.item() == pytest.approx(padded.item(), rel=1e-6)
