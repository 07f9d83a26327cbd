"""Which form of the projection a call takes, and that both give the same."""

import pytest
import torch
from common import REACH, REACH_MAP, assert_reaches, both_sides, evaluate, hidden_states

from alpkd_fast import alp_loss, projection
from alpkd_fast.layer_maps import counts_and_layers
from alpkd_fast.ops import binary_problem
from alpkd_fast.problem import make_problem


def chosen(backend="cpu", m=2, n=12, D_s=384, per_layer=False, layer_map="all", layer_weights=None):
    """The form that a call takes: widths are all that matters of the tensors, so they have no rows."""
    student, teacher = [torch.empty(0, D_s)] * m, [torch.empty(0, 8)] * n
    problem = make_problem(student, teacher, layer_map=layer_map, layer_weights=layer_weights, projected=True)
    weight = torch.empty(m, D_s, 8) if per_layer else torch.empty(D_s, 8)
    query = projection.has_query_side(problem, backend) and projection.query_side_pays(problem, weight, backend)
    return "query-side" if query else "teacher-side"


@pytest.mark.parametrize(
    ("form", "case"),
    [
        ("query-side", {}),
        ("query-side", {"D_s": 768}),
        ("query-side", {"m": 3}),
        ("query-side", {"D_s": 64}),
        ("query-side", {"m": 6, "per_layer": True}),
        ("query-side", {"m": 4, "n": 24, "D_s": 1024}),
        ("query-side", {"backend": "triton", "m": 6, "per_layer": True}),
        ("teacher-side", {"m": 4}),
        ("teacher-side", {"m": 6}),
        ("teacher-side", {"m": 3, "D_s": 64}),
        ("teacher-side", {"m": 6, "per_layer": True, "layer_map": "no-overlap"}),
        ("teacher-side", {"per_layer": True, "layer_map": "skip"}),
        ("teacher-side", {"backend": "cuda"}),
        ("teacher-side", {"backend": "reference"}),
        ("teacher-side", {"layer_weights": (0.0, 1.0)}),
    ],
    ids=str,
)
def test_the_form_follows_from_the_count_of_products(form, case):
    assert chosen(**case) == form


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 3), (300,)], ids=str)
@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per-layer"])
def test_both_forms_give_the_same(fused, per_layer, lead, monkeypatch):
    """In float64, with a layer map, row weights, a scale to learn and gradients for everything."""
    student, _ = both_sides(2, 4, lead, 5, "f64-f64", device=fused.device)
    teacher = hidden_states(4, lead, 7, torch.float64, seed=3, device=fused.device)
    weight = hidden_states(1, (2, 5) if per_layer else (5,), 7, torch.float64, seed=4, device=fused.device)[0]
    scale = torch.tensor(0.4, dtype=torch.float64, device=fused.device, requires_grad=True)
    mask = (torch.arange(torch.Size(lead).numel(), device=fused.device) + 2).reshape(lead) % 3  # 2, 0, 1, 2, …
    options = {"proj_weight": weight, "scale": scale, "layer_map": [(0, 1, 3), (1, 2)], "normalizer": 7.0}
    values = []
    for query_side in (False, True):
        monkeypatch.setattr(projection, "query_side_pays", lambda *_, answer=query_side: answer)
        values.append(evaluate(fused.details, student, teacher, mask, **options))
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value, rtol=1e-10, atol=1e-13, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("layer", REACH, ids=lambda layer: "-".join(map(str, layer)))
@pytest.mark.parametrize("query_side", [False, True], ids=["teacher-side", "query-side"])
def test_a_layer_that_is_not_finite_reaches_only_what_the_map_joins_it_with(
    fused, query_side, layer, poison, monkeypatch
):
    """With one W for each student layer, so that no W is joined with all layers."""
    monkeypatch.setattr(projection, "query_side_pays", lambda *_: query_side)
    student, _ = both_sides(3, 5, (4,), 5, device=fused.device)
    teacher = hidden_states(5, (4,), 7, seed=3, device=fused.device)
    weight = hidden_states(1, (3, 5), 7, seed=4, device=fused.device)[0]
    options = {"proj_weight": weight, "layer_map": REACH_MAP}
    clean = evaluate(fused.details, student, teacher, **options)
    side, k = layer
    with torch.no_grad():
        (student if side == "student" else teacher)[k][2, 3] = poison
    got = evaluate(fused.details, student, teacher, **options)
    assert_reaches(layer, got, clean, row=2)
    students, _ = REACH[layer]
    for i, (value, before) in enumerate(zip(got["d_proj_weight"][0], clean["d_proj_weight"][0], strict=True)):
        assert bool(torch.isfinite(value).all()) == (i not in students)
        assert i in students or torch.equal(value, before)


def test_the_query_side_makes_nothing_of_the_teachers_size(monkeypatch):
    monkeypatch.setattr(projection, "query_side_pays", lambda *_: True)
    student, _ = both_sides(2, 8, (1024,), 16)
    teacher = [t.detach() for t in hidden_states(8, student[0].shape[:-1], 24)]
    weight = hidden_states(1, (16,), 24)[0]
    with torch.profiler.profile(profile_memory=True) as profile:
        alp_loss(student, teacher, proj_weight=weight, backend="cpu").backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < sum(t.nbytes for t in teacher) / 2


@pytest.mark.parametrize("dtypes", ["f32-f32", "f32-bf16", "f64-f16"])
@pytest.mark.parametrize("table", [None, ((0, 2), (1,))], ids=["all", "map"])
def test_opcheck_of_the_layer_attention(dtypes, table):
    if reason := binary_problem():
        pytest.skip(f"cpu: {reason}")
    queries, teacher = both_sides(2, 3, (5,), 6, dtypes)
    queries, teacher = [q.detach() for q in queries], [t.detach() for t in teacher]
    counted = torch.tensor([True, False, True, True, False])
    shared = (counted, *counts_and_layers(table), torch.tensor(0.4), 0.0)
    operators, utils = torch.ops.alpkd_fast, ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = (queries, teacher, *shared)
    torch.library.opcheck(operators.layer_attention_cpu.default, forward, test_utils=utils)
    combined, attention = operators.layer_attention_cpu.default(*forward)
    backward = (combined, queries, teacher, attention, *shared, False, [True, False], [False, True, True], True)
    torch.library.opcheck(operators.layer_attention_backward_cpu.default, backward, test_utils=utils)
    d_queries, d_teacher, _ = operators.layer_attention_backward_cpu.default(*backward)
    assert [d.dtype for d in (*d_queries, *d_teacher)] == [h.dtype for h in (queries[0], *teacher[1:])]
