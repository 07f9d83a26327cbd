"""Where a straightforward implementation goes wrong: large scores, close students, fp16, low precision."""

import pytest
import torch
from common import assert_as_exact, assert_within, both_sides, evaluate, hidden_states, in_dtype, spec_loss


@pytest.mark.large
def test_fp16_gradients_survive_a_loss_scale_of_65536_at_bert_size(backend):
    """1/N underflows in fp16: with it, most gradients would be 0 here."""
    m, n, rows, D = 2, 3, 4096, 768  # the factor 2/N of 6 student layers is reached by layer weights of 1/3
    student, teacher = both_sides(m, n, (rows,), D, "f16-f16", device=backend.device)
    for h in teacher:
        h.requires_grad_(False)
    options = {"layer_weights": [1 / 3, 1 / 3], "grad": 65536.0}
    got = evaluate(backend.details, student, teacher, **options)
    head = slice(0, 64)  # rows do not meet but in N
    exact = in_dtype(
        torch.float64, [s[head] for s in student], [t[head] for t in teacher], normalizer=float(rows), **options
    )["d_student"]
    error = (got["d_student"][:, head].double() - exact).abs()
    # Two roundings to fp16; on matrix units, which take the coefficients in two parts, 2**-21 of the largest beside.
    parts = 2**-21 * exact.abs().max() if backend.name == "cuda" else 0.0
    assert bool((error <= 2 * 2**-11 * exact.abs() + 2**-24 + parts).all()), error.max()
    assert (got["d_student"] == 0).float().mean() < 1e-3
    loss = in_dtype(torch.float32, student, teacher, layer_weights=[1 / 3, 1 / 3])["loss"]
    assert got["loss"].item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("dtypes", ["f16-f16", "bf16-bf16", "f32-f32"])
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3])
def test_student_close_to_its_target(backend, dtypes, distance):
    """The residual is small beside the rows it is the difference of."""
    _, teacher = both_sides(1, 4, (6,), 64, dtypes, device=backend.device)
    noise = hidden_states(2, (6,), 64, torch.float64, seed=5, device=backend.device)
    # At this scale a student layer picks the teacher layer that it is close to.
    student = [
        (teacher[j].detach().double() + distance * e.detach()).to(teacher[0].dtype).requires_grad_()
        for j, e in zip((1, 3), noise, strict=True)
    ]
    of_rows = backend.name == "triton"  # its teacher gradients are sums over the rows and not over e
    got = assert_as_exact(backend, student, teacher, scale=1.0, of_rows=of_rows)
    assert got["attention"][0, :, 1].min() > 0.9
    assert_as_exact(backend, student, teacher, scale=1.0, normalize=True, of_rows=of_rows)


@pytest.mark.parametrize("dtypes", ["f32-f32", "bf16-bf16", "f64-f64"])
@pytest.mark.parametrize("size", [10.0, 30.0, 1000.0])
def test_huge_scores(backend, size, dtypes):
    """exp without subtracting the maximum overflows from scores of 89 on. At 1000 the gaps between the scores exceed
    every rounding: the attention is 1 for one layer."""
    student, teacher = both_sides(2, 3, (5,), 16, dtypes, device=backend.device)
    student = [(size * s.detach()).requires_grad_() for s in student]
    teacher = [(size * t.detach()).requires_grad_() for t in teacher]
    output = backend.details(student, teacher, scale=1.0)
    output.loss.backward()
    for value in (*output, *(h.grad for h in student + teacher)):
        assert bool(torch.isfinite(value).all())
    if size == 30.0 and backend.unit(student[0].dtype) > 2.0**-24:
        return  # at this size a matrix unit's rounding of the scores allows any value
    got = assert_as_exact(backend, student, teacher, scale=1.0, decided=size == 1000.0)
    assert size < 1000.0 or set(got["attention"].unique().tolist()) == {0.0, 1.0}


def test_all_scores_far_below_zero(backend):
    """All scores near -1000: a softmax whose maximum starts at 0 gives 0/0."""
    teacher = hidden_states(3, (4,), 16, device=backend.device)
    student = [(-100 * sum(teacher)).detach().requires_grad_() for _ in range(2)]
    assert_as_exact(backend, student, teacher, scale=1.0)


@pytest.mark.parametrize("dtypes", ["f16-f16", "bf16-bf16"])
def test_no_worse_than_eager_in_the_same_low_precision(backend, dtypes):
    student, teacher = both_sides(4, 6, (40,), 96, dtypes, device=backend.device)
    got = evaluate(backend.details, student, teacher)
    exact = in_dtype(torch.float64, student, teacher)
    eager = evaluate(spec_loss, student, teacher)
    for name in ("loss", "layer_losses", "attention", "d_student", "d_teacher"):
        error = (got[name].double() - exact[name]).abs().max()
        theirs = (eager[name].double() - exact[name]).abs().max()
        assert error <= theirs + torch.finfo(got[name].dtype).eps * exact[name].abs().max(), name


def test_large_rows_in_fp16_do_not_overflow(backend):
    """(s - t)^2 summed in fp16 overflows; so do scores."""
    student, teacher = both_sides(2, 3, (4,), 768, "f16-f16", device=backend.device)
    student = [(40 * s.detach()).requires_grad_() for s in student]
    teacher = [(40 * t.detach()).requires_grad_() for t in teacher]
    assert_as_exact(backend, student, teacher, scale=1e-4)


@pytest.mark.parametrize("dtypes", ["f32-f32", "bf16-bf16", "f16-f16"])
def test_tiny_weights_and_a_huge_normalizer(backend, dtypes):
    student, teacher = both_sides(2, 3, (6,), 16, dtypes, device=backend.device)
    mask = torch.tensor([1e-6, 1.0, 3e-5, 0.0, 1e-4, 2.0], device=backend.device)
    assert_as_exact(backend, student, teacher, mask)
    assert_as_exact(backend, student, teacher, mask, reduction="sum")
    if dtypes != "f16-f16":
        assert_as_exact(backend, student, teacher, mask, normalizer=1e9)
    else:
        assert_as_exact(backend, student, teacher, mask, normalizer=1e9, grad=2.0**30)


def test_many_rows_are_summed_without_loss_of_precision(backend):
    rows = 2000 if backend.interpreted else 40000
    student, teacher = both_sides(1, 2, (rows,), 4, device=backend.device)
    with torch.no_grad():
        got, exact = backend(student, teacher), spec_loss([s.double() for s in student], [t.double() for t in teacher])
    assert_within("loss", got, exact.loss.cpu().to(got.device), exact.loss, 16 * 2**-24 * exact.loss.item())
