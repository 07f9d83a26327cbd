"""Named layer maps by the table of values worked out by hand, and what the loss does with them."""

import pytest
import torch
from common import REACH, REACH_MAP, assert_as_exact, assert_reaches, both_sides, evaluate

from alpkd_fast import make_layer_map
from alpkd_fast.layer_maps import allowed_on_device

# (kind, m, n): one string per student layer, its teacher layers counted from 1 as in the paper.
BY_HAND = {
    ("all", 2, 3): "1 2 3 | 1 2 3",
    ("all", 3, 2): "1 2 | 1 2 | 1 2",
    ("no-overlap", 6, 12): "1 2 | 3 4 | 5 6 | 7 8 | 9 10 | 11 12",
    ("no-overlap", 4, 12): "1 2 3 | 4 5 6 | 7 8 9 | 10 11 12",
    ("no-overlap", 2, 12): "1 2 3 4 5 6 | 7 8 9 10 11 12",
    ("no-overlap", 5, 12): "1 2 | 3 4 | 5 6 7 | 8 9 | 10 11 12",
    ("no-overlap", 3, 3): "1 | 2 | 3",
    ("no-overlap", 1, 4): "1 2 3 4",
    ("partial-overlap", 2, 12): "1 2 3 4 5 6 7 | 6 7 8 9 10 11 12",
    ("partial-overlap", 2, 6): "1 2 3 4 | 3 4 5 6",
    ("partial-overlap", 4, 12): "1 2 3 4 | 3 4 5 6 7 | 6 7 8 9 10 | 9 10 11 12",
    ("partial-overlap", 3, 3): "1 2 | 1 2 3 | 2 3",
    ("partial-overlap", 1, 1): "1",
    ("prefix", 3, 6): "1 2 | 1 2 3 4 | 1 2 3 4 5 6",
    ("prefix", 2, 5): "1 2 | 1 2 3 4 5",
    ("skip", 6, 12): "2 | 4 | 6 | 8 | 10 | 12",
    ("skip", 4, 12): "3 | 6 | 9 | 12",
    ("skip", 5, 12): "2 | 4 | 7 | 9 | 12",
    ("skip", 2, 3): "1 | 3",
    ("last", 6, 12): "7 | 8 | 9 | 10 | 11 | 12",
    ("last", 1, 3): "3",
    ("last", 3, 3): "1 | 2 | 3",
}


def table_by_hand(kind, m, n):
    return tuple(tuple(int(j) - 1 for j in row.split()) for row in BY_HAND[kind, m, n].split("|"))


@pytest.mark.parametrize(("kind", "m", "n"), BY_HAND, ids=lambda value: str(value))
def test_table(kind, m, n):
    assert make_layer_map(kind, m, n) == table_by_hand(kind, m, n)


@pytest.mark.parametrize("kind", ["no-overlap", "skip", "last", "prefix", "partial-overlap", "random"])
def test_as_many_student_layers_as_there_may_be(kind):
    table = make_layer_map(kind, 128, 128)
    assert len(table) == 128
    assert all(table)


def test_buckets_part_the_teacher():
    for n in range(1, 30):
        for m in range(1, n + 1):
            table = make_layer_map("no-overlap", m, n)
            assert [j for layers in table for j in layers] == list(range(n))
            assert max(map(len, table)) - min(map(len, table)) <= 1


def test_random_draws_without_replacement_in_order():
    generator = torch.Generator().manual_seed(3)
    tables = [make_layer_map("random", 4, 9, generator) for _ in range(50)]
    for table in tables:
        picks = [layers[0] for layers in table]
        assert all(len(layers) == 1 for layers in table)
        assert picks == sorted(set(picks))
        assert set(picks) <= set(range(9))
    assert len(set(tables)) > 10, "the map does not vary"
    assert {j for table in tables for (j,) in table} == set(range(9)), "a layer is never drawn"
    again = make_layer_map("random", 4, 9, torch.Generator().manual_seed(3))
    assert again == tables[0]
    assert make_layer_map("random", 5, 5) == tuple((j,) for j in range(5))


@pytest.mark.parametrize(
    ("kind", "m", "n"),
    [("no-overlap", 5, 12), ("partial-overlap", 2, 6), ("partial-overlap", 4, 12), ("prefix", 2, 5), ("skip", 5, 12),
     ("last", 1, 3), ("all", 3, 2)],
    ids=lambda value: str(value),
)  # fmt: skip
def test_name_bool_table_and_indices_mean_the_same(backend, kind, m, n):
    student, teacher = both_sides(m, n, (3,), 6, device=backend.device)
    table = table_by_hand(kind, m, n) if (kind, m, n) in BY_HAND else None
    allowed = torch.zeros(m, n, dtype=torch.bool)
    for i, layers in enumerate(table):
        allowed[i, list(layers)] = True
    want = assert_as_exact(backend, student, teacher, layer_map=table)
    for layer_map in (kind, allowed, [[*reversed(layers), layers[0]] for layers in table]):
        output = backend.details(student, teacher, layer_map=layer_map)
        assert torch.equal(output.loss, want["loss"])
        assert torch.equal(output.attention, want["attention"])
        assert bool((output.attention[~allowed.to(backend.device)[:, None].expand(m, 3, n)] == 0).all())


MAPS = {
    "disjoint": [(0, 2), (1, 3, 4), (5,)],
    "nested": [(0,), (0, 1), (0, 1, 2, 3, 4, 5)],
    "shared": [(1, 4), (1, 4), (0,)],
    "same-one": [(3,), (3,), (3,)],
    "unused-teacher-layers": [(0, 1), (1, 2), (0, 2)],
    "crossed": [(5,), (0, 5), (0,)],
}


@pytest.mark.parametrize("dtypes", ["f32-f32", "bf16-bf16", "f16-f16"])
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"layer_weights": [1, 0, 2]}, {"scale": 0.0}], ids=str)
@pytest.mark.parametrize("table", MAPS.values(), ids=MAPS)
def test_any_table(backend, table, options, dtypes):
    student, teacher = both_sides(3, 6, (4,), 9, dtypes, device=backend.device)
    assert_as_exact(backend, student, teacher, layer_map=table, **options)


def test_layers_outside_the_map_are_not_read(backend):
    student, teacher = both_sides(2, 4, (3,), 6, device=backend.device)
    teacher[1].data.fill_(torch.nan)
    loss = backend(student, teacher, layer_map=[(0, 2), (3,)])
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert bool((teacher[1].grad == 0).all())
    assert all(bool(torch.isfinite(s.grad).all()) for s in student)


@pytest.mark.parametrize(
    ("dtypes", "poison"),
    [("f32-f32", "nan"), ("f32-f32", "inf"), ("bf16-bf16", "nan"), ("f16-f16", "-inf")],
)
@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"detach_attention": True}, {"scale": 0.0}], ids=str)
@pytest.mark.parametrize("layer", REACH, ids=lambda layer: "-".join(map(str, layer)))
def test_a_layer_that_is_not_finite_reaches_only_what_the_map_joins_it_with(backend, layer, options, dtypes, poison):
    student, teacher = both_sides(3, 5, (4,), 9, dtypes, device=backend.device)
    options = {"layer_map": REACH_MAP, **options}
    clean = evaluate(backend.details, student, teacher, **options)
    side, k = layer
    with torch.no_grad():
        (student if side == "student" else teacher)[k][2, 5] = float(poison)
    got = evaluate(backend.details, student, teacher, **options)
    assert_reaches(layer, got, clean, row=2)
    students, _ = REACH[layer]
    others = torch.arange(4, device=backend.device) != 2
    assert torch.equal(got["attention"][:, others], clean["attention"][:, others])
    for i in {0, 1, 2} - set(students):
        assert torch.equal(got["attention"][i], clean["attention"][i])
        assert torch.equal(got["entropy"][i], clean["entropy"][i])


@pytest.mark.parametrize("n", [1, 62, 63, 130])
def test_the_table_as_a_tensor(n):
    """More layers than one word holds, at both of its ends."""
    table = ((0,), tuple(range(n)), tuple(range(0, n, 3)), (n - 1,), (n // 2,))
    want = torch.tensor([[j in layers for j in range(n)] for layers in table])
    assert torch.equal(allowed_on_device(table, n, torch.device("cpu")), want)


def test_a_student_layer_that_is_not_finite_reaches_the_gradient_of_the_scale(backend):
    student, teacher = both_sides(2, 4, (3,), 6, device=backend.device)
    student[0].data[1, 2] = torch.nan
    scale = torch.tensor(0.5, device=backend.device, requires_grad=True)
    backend(student, teacher, layer_map=[(0, 1), (2, 3)], scale=scale).backward()
    assert not bool(torch.isfinite(scale.grad))


def test_one_hot_map_is_the_mean_square_error(backend):
    student, teacher = both_sides(2, 4, (3, 2), 6, "f64-f64", device=backend.device)
    loss = backend(student, teacher, layer_map="skip")
    error = torch.stack([student[0] - teacher[1], student[1] - teacher[3]])
    assert loss.item() == pytest.approx(error.square().mean().item(), rel=1e-14)
