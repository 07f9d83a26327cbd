"""Loss, details and every gradient of each backend against the float64 truth."""

from functools import partial

import pytest
import torch
from common import DTYPE_PAIRS, assert_as_exact, both_sides

from alpkd_fast import make_layer_map

# m, n, leading shape, D: single layers and columns, m > n, tiles with every remainder, many layers
SHAPES = [
    (1, 1, (1,), 1),
    (1, 1, (3,), 7),
    (1, 5, (4,), 16),
    (3, 1, (4,), 5),
    (3, 2, (5,), 31),
    (2, 4, (2, 3), 64),
    (4, 12, (7,), 33),
    (5, 3, (3,), 129),
    (6, 12, (2, 9), 48),
    (7, 6, (2, 2, 3), 17),
    (13, 7, (3,), 40),
    (64, 3, (2,), 8),
    (2, 128, (3,), 16),
]


def shape_id(shape):
    m, n, lead, D = shape
    return f"m{m}-n{n}-rows{'x'.join(map(str, lead))}-D{D}"


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_shapes_and_dtypes(backend, shape, dtypes):
    student, teacher = both_sides(*shape, dtypes, device=backend.device)
    assert_as_exact(backend, student, teacher)


@pytest.mark.parametrize("rows", [63, 64, 65, 130, 257])
def test_rows_around_chunk_borders(backend, rows):
    student, teacher = both_sides(2, 3, (rows,), 8, device=backend.device)
    assert_as_exact(backend, student, teacher)


@pytest.mark.parametrize("D", [1, 2, 3, 4, 8, 9, 15, 16, 24, 32, 63, 100, 256])
@pytest.mark.parametrize("dtypes", ["f32-f32", "bf16-bf16", "f16-f16", "f64-f64"])
def test_widths(backend, D, dtypes):
    student, teacher = both_sides(3, 4, (3,), D, dtypes, device=backend.device)
    assert_as_exact(backend, student, teacher)


@pytest.mark.large
@pytest.mark.parametrize("dtypes", ["f32-f32", "bf16-bf16", "f16-f16", "f32-bf16"])
def test_bert_width_and_depth(backend, dtypes):
    student, teacher = both_sides(6, 12, (37,), 768, dtypes, device=backend.device)
    assert_as_exact(backend, student, teacher, scale=0.05)


@pytest.mark.large
@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("pooling", ["token", "last"])
def test_gradients_larger_than_the_caches(backend, pooling, threads, request):
    """Many threads write them past the caches, and so the zeros of padding and of tokens that are not pooled."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(threads)
    student, teacher = both_sides(6, 3, (2, 260), 768, device=backend.device)  # 9.6 MB of student rows
    mask = torch.ones(2, 260, device=backend.device)
    mask[0, 3:200] = 0
    mask[1, -90:] = 0
    assert_as_exact(backend, student, teacher, mask, pooling=pooling)


WHOLE_VECTORS = {
    "token": {},
    "cls": {"pooling": "cls"},
    "last": {"pooling": "last"},
    "single layers": {"layer_map": [[0], [1], [3]]},
    "single layers and groups": {"layer_map": [[0], [1, 3], [2, 3]]},
    "average": {"scale": 0.0},
    "detached": {"detach_attention": True},
    "scaled": {"scale": 2.0, "layer_weights": [1.0, 0.0, 2.0]},
}


@pytest.mark.parametrize("dtypes", ["f32-f32", "bf16-bf16", "f16-f16", "bf16-f32"])
@pytest.mark.parametrize("wanted", ["student", "some", "both"])
@pytest.mark.parametrize("options", WHOLE_VECTORS.values(), ids=WHOLE_VECTORS)
def test_rows_of_whole_vectors(backend, options, wanted, dtypes):
    """Backends may read such rows where they lie, and bf16 two vectors at a time."""
    student, teacher = both_sides(3, 4, (2, 5), 64, dtypes, device=backend.device)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]], device=backend.device)
    student[1].requires_grad_(wanted != "some")
    for h in teacher:
        h.requires_grad_(wanted == "both")
    assert_as_exact(backend, student, teacher, mask, **options)


@pytest.mark.parametrize("sides", ["student", "teacher", "both", "neither", "some"])
def test_gradients_only_where_wanted(backend, sides):
    student, teacher = both_sides(3, 4, (5,), 12, device=backend.device)
    for h in student:
        h.requires_grad_(sides in ("student", "both"))
    for h in teacher:
        h.requires_grad_(sides in ("teacher", "both"))
    if sides == "some":
        student[1].requires_grad_()
        teacher[0].requires_grad_()
        teacher[3].requires_grad_()
        loss = backend(student, teacher)
        loss.backward()
        both = [h.detach().requires_grad_() for h in student], [h.detach().requires_grad_() for h in teacher]
        backend(*both).backward()
        assert student[0].grad is None
        assert teacher[1].grad is None
        for one, other in ((student[1], both[0][1]), (teacher[0], both[1][0]), (teacher[3], both[1][3])):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-7)
    else:
        got = assert_as_exact(backend, student, teacher)
        assert ("d_student" in got) == (sides in ("student", "both"))
        assert ("d_teacher" in got) == (sides in ("teacher", "both"))


def test_loss_dtype_and_gradient_dtype(backend):
    for dtypes, expected in (("bf16-f16", torch.float32), ("f32-f64", torch.float64), ("f16-f16", torch.float32)):
        student, teacher = both_sides(2, 2, (3,), 4, dtypes, device=backend.device)
        output = backend.details(student, teacher)
        output.loss.backward()
        assert {x.dtype for x in output} == {expected}
        assert [h.grad.dtype for h in student + teacher] == [h.dtype for h in student + teacher]
        assert output.loss.dim() == 0


# ---- What public implementations compute -----------------------------------------------------------------


def test_form_of_lad(backend):
    """[CLS] rows, scale 1/sqrt(D), mean over rows and D, mean over student layers; "prefix" maps too."""
    B, S, m, n, D = 3, 4, 3, 6, 8
    student, teacher = both_sides(m, n, (B, S), D, device=backend.device)
    for table in (make_layer_map("all", m, n), make_layer_map("prefix", m, n)):
        expected = 0
        for i, layers in enumerate(table):
            s = student[i][:, 0].double()
            t = torch.stack([teacher[j][:, 0].double() for j in layers], dim=1)  # (B, n_i, D)
            a = torch.softmax((t @ s[:, :, None]).squeeze(-1) / D**0.5, dim=-1)
            expected += torch.nn.functional.mse_loss((a[:, None] @ t).squeeze(1), s) / m
        loss = backend(student, teacher, pooling="cls", layer_map=table)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_form_of_lad_on_tokens_counts_the_padding(backend):
    """All tokens, padding too: no attention_mask."""
    B, S, m, n, D = 2, 5, 2, 4, 8
    student, teacher = both_sides(m, n, (B, S), D, device=backend.device)
    expected = 0
    for s in student:
        t = torch.stack([t.double() for t in teacher], dim=2)  # (B, S, n, D)
        a = torch.softmax(torch.einsum("bsd,bsnd->bsn", s.double(), t) / D**0.5, dim=-1)
        expected += torch.nn.functional.mse_loss(torch.einsum("bsn,bsnd->bsd", a, t), s.double()) / m
    assert backend(student, teacher).item() == pytest.approx(expected.item(), rel=1e-6)


def test_form_of_the_glm_toolkit(backend):
    """[CLS] rows, scale 1, mean over rows and D, sum over student layers: m times our mean."""
    B, S, m, n, D = 3, 2, 2, 5, 8
    student, teacher = both_sides(m, n, (B, S), D, device=backend.device)
    expected = 0
    for s in student:
        s = s[:, 0].double()
        t = torch.stack([t[:, 0].double() for t in teacher], dim=1)
        a = torch.softmax((t * s[:, None]).sum(-1), dim=-1)
        expected += torch.nn.functional.mse_loss((a[..., None] * t).sum(1), s)
    loss = m * backend(student, teacher, pooling="cls", scale=1.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_form_of_pkd(backend):
    """[CLS] rows, L2-normalised, one-hot map without the last layer, mean over rows, layers and D."""
    B, S, D = 3, 2, 16
    student, teacher = both_sides(6, 12, (B, S), D, device=backend.device)
    picks = [1, 3, 5, 7, 9]  # teacher layers 2, 4, 6, 8, 10 counted from 1, to student layers 1 to 5
    s = torch.stack([h[:, 0].double() for h in student[:5]], dim=1)
    t = torch.stack([teacher[j][:, 0].double() for j in picks], dim=1)
    normed = torch.nn.functional.normalize
    expected = torch.nn.functional.mse_loss(normed(s, dim=-1), normed(t, dim=-1))
    skip = make_layer_map("skip", 6, 12)
    assert skip[:5] == tuple((j,) for j in picks)
    loss = backend(student[:5], teacher, pooling="cls", layer_map=skip[:5], normalize=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_form_of_ckd(backend):
    """All tokens, padding excluded, normalised; sum over D and layers, mean over tokens; contiguous groups."""
    B, S, m, n, D = 2, 4, 2, 4, 8
    student, teacher = both_sides(m, n, (B, S), D, device=backend.device)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], device=backend.device)
    groups = make_layer_map("no-overlap", m, n)
    normed, expected = torch.nn.functional.normalize, 0
    for i, layers in enumerate(groups):
        combined = torch.stack([teacher[j].double() for j in layers]).mean(0)
        error = normed(student[i].double(), dim=-1) - normed(combined, dim=-1)
        expected += (error.square().sum(-1) * mask).sum() / mask.sum()
    loss = m * D * backend(student, teacher, mask, layer_map=groups, scale=0, normalize=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
