"""Bad input: the error names the argument, what came, what is allowed and the remedy; nothing is changed."""

import pytest
import torch
from common import both_sides, hidden_states

from alpkd_fast import ALPLoss, alp_loss, make_layer_map

M, N, LEAD, D = 3, 4, (2, 5), 6
NAN, INF = float("nan"), float("inf")


def layers(count, lead=LEAD, width=D, dtype=torch.float32):
    return hidden_states(count, lead, width, dtype)


def s(**kwargs):
    return layers(M, **kwargs)


def t(**kwargs):
    return layers(N, **kwargs)


def mask(value=1.0, dtype=torch.float32):
    weights = torch.ones(LEAD, dtype=dtype)
    weights[1, 3] = value
    return weights


# id: (student, teacher, mask, options, type, what the message must hold)
BAD = {
    # empty and malformed lists
    "no-student": ([], t(), None, {}, ValueError, ["student_hidden_states", "no layer", "at least one"]),
    "no-teacher": (s(), [], None, {}, ValueError, ["teacher_hidden_states", "no layer", "at least one"]),
    "only-none": ([None, None], t(), None, {}, ValueError, ["student_hidden_states", "no layer"]),
    "stacked-0": (torch.zeros(0, 2, D), t(), None, {}, ValueError, ["student_hidden_states", "no layer"]),
    "stacked-1d": (torch.zeros(4), t(), None, {}, ValueError, ["student_hidden_states", "(4,)", "stacked"]),
    "not-a-sequence": (3, t(), None, {}, TypeError, ["student_hidden_states", "int", "sequence"]),
    "not-a-tensor": ([[1.0]], t(), None, {}, TypeError, ["student_hidden_states[0]", "list", "tensors"]),
    "scalar-layer": ([torch.tensor(1.0)], t(), None, {}, ValueError, ["student_hidden_states[0]", "()", "D >= 1"]),
    "width-0": (s(width=0), t(width=0), None, {}, ValueError, ["student_hidden_states[0]", "(2, 5, 0)", "D >= 1"]),
    # shapes, widths, lengths
    "layer-shape": ([*s(), torch.zeros(2, 4, D)], t(), None, {}, ValueError,
                    ["student_hidden_states[3]", "(2, 4, 6)", "(2, 5, 6)", "gather"]),
    "teacher-layer-shape": (s(), [*t(), torch.zeros(2, 5, 7)], None, {}, ValueError,
                            ["teacher_hidden_states[4]", "(2, 5, 7)", "(2, 5, 6)"]),
    "widths-differ": (s(), t(width=9), None, {}, ValueError,
                      ["student width 6", "teacher width 9", "proj_weight", "(6, 9)", "ALPLoss"]),
    "sequence-lengths": (s(), t(lead=(2, 7)), None, {}, ValueError, ["(2, 5)", "(2, 7)", "gather"]),
    "ranks": (s(), t(lead=(10,)), None, {}, ValueError, ["(2, 5)", "(10,)", "gather"]),
    # dtypes and devices
    "integer": ([torch.ones(2, 5, D, dtype=torch.int64)] * M, t(), None, {},
                TypeError, ["student_hidden_states[0]", "int64", "float32", ".float()"]),
    "complex": (s(), [torch.ones(2, 5, D, dtype=torch.complex64)] * N, None, {}, TypeError,
                ["teacher_hidden_states[0]", "complex64", "float32", ".float()"]),
    "bool": ([torch.ones(2, 5, D, dtype=torch.bool)], t(), None, {}, TypeError, ["student_hidden_states[0]", "bool"]),
    "mixed-side": ([*s(), *layers(1, dtype=torch.bfloat16)], t(), None, {}, TypeError,
                   ["student_hidden_states[3]", "bfloat16", "float32", ".to("]),
    "teacher-device": (s(), [torch.zeros(2, 5, D, device="meta")] * N, None, {}, ValueError,
                       ["teacher_hidden_states", "meta", "cpu", '.to("cpu")']),
    "one-layer-device": ([*s(), torch.zeros(2, 5, D, device="meta")], t(), None, {}, ValueError,
                         ["student_hidden_states[3]", "meta", "cpu", '.to("cpu")']),
    # layer_map
    "map-unknown": (s(), t(), None, {"layer_map": "buckets"}, ValueError,
                    ["layer_map", "'buckets'", "no-overlap", "partial-overlap", "skip"]),
    "map-random-by-name": (s(), t(), None, {"layer_map": "random"}, ValueError, ["layer_map", "make_layer_map"]),
    "map-shape": (s(), t(), None, {"layer_map": torch.ones(N, M, dtype=torch.bool)}, ValueError,
                  ["layer_map", "(4, 3)", "(3, 4)"]),
    "map-dtype": (s(), t(), None, {"layer_map": torch.ones(M, N)}, ValueError, ["layer_map", "float32", ".bool()"]),
    "map-device": (s(), t(), None, {"layer_map": torch.ones(M, N, dtype=torch.bool, device="meta")}, ValueError,
                   ["layer_map", "meta", ".cpu()"]),
    "map-rows": (s(), t(), None, {"layer_map": [(0,), (1,)]}, ValueError, ["layer_map", "2 rows", "3 student"]),
    "map-index": (s(), t(), None, {"layer_map": [(0,), (1, 4), (2,)]}, ValueError,
                  ["layer_map", "student layer 1", "teacher layer 4", "0 to 3"]),
    "map-negative-index": (s(), t(), None, {"layer_map": [(0,), (1,), (-1,)]}, ValueError,
                           ["layer_map", "student layer 2", "-1"]),
    "map-nothing": (s(), t(), None, {"layer_map": [(0,), (), (2,)]}, ValueError,
                    ["layer_map", "student layer 1", "no teacher layer", "at least one"]),
    "map-nothing-bool": (s(), t(), None, {"layer_map": torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()},
                         ValueError, ["layer_map", "student layer 1", "no teacher layer"]),
    "map-type": (s(), t(), None, {"layer_map": 3}, TypeError, ["layer_map", "3", "no-overlap", "sequence"]),
    "map-flat": (s(), t(), None, {"layer_map": [0, 1, 2]}, TypeError, ["layer_map", "[0, 1, 2]", "sequence"]),
    "map-fraction": (s(), t(), None, {"layer_map": [(0,), (1.5,), (2,)]}, TypeError, ["layer_map", "1.5"]),
    "map-bools": (s(), t(), None, {"layer_map": torch.ones(M, N).bool().tolist()}, TypeError,
                  ["layer_map", "[True, True, True, True]", "bools", "indices", "torch.tensor(layer_map)"]),
    "map-numpy-bools": (s(), t(), None, {"layer_map": torch.ones(M, N).bool().numpy()}, TypeError,
                        ["layer_map", "bools", "torch.tensor"]),
    "map-torch-bools": (s(), t(), None, {"layer_map": [[*row] for row in torch.ones(M, N).bool()]}, TypeError,
                        ["layer_map", "bools", "torch.tensor"]),
    "map-m-above-n": (layers(5), t(), None, {"layer_map": "no-overlap"}, ValueError, ["m=5", "n=4", '"all"']),
    "map-m-above-n-skip": (layers(5), t(), None, {"layer_map": "skip"}, ValueError, ["m=5", "n=4", '"all"']),
    # attention_mask
    "mask-negative": (s(), t(), mask(-2.0), {}, ValueError, ["attention_mask", "-2", ">= 0", "mask == 0"]),
    "mask-negative-int": (s(), t(), mask(-1, torch.int64), {}, ValueError, ["attention_mask", "-1", ">= 0"]),
    "mask-additive": (s(), t(), mask(-INF), {}, ValueError, ["attention_mask", "-inf", "additive", "(mask == 0)"]),
    "mask-nan": (s(), t(), mask(NAN), {}, ValueError, ["attention_mask", "nan", ">= 0"]),
    "mask-inf": (s(), t(), mask(INF, torch.float16), {}, ValueError, ["attention_mask", "inf", "finite"]),
    "mask-shape": (s(), t(), torch.ones(2, 1), {}, ValueError, ["attention_mask", "(2, 1)", "(2, 5)", "broadcast"]),
    "mask-4d": (s(), t(), torch.ones(2, 1, 1, 5), {}, ValueError, ["attention_mask", "(2, 1, 1, 5)", "(2, 5)"]),
    "mask-complex": (s(), t(), torch.ones(LEAD, dtype=torch.complex64), {}, TypeError, ["attention_mask", "complex64"]),
    "mask-type": (s(), t(), [[1] * 5] * 2, {}, TypeError, ["attention_mask", "list", "(2, 5)"]),
    "mask-device": (s(), t(), torch.ones(LEAD, device="meta"), {}, ValueError,
                    ["attention_mask", "meta", '.to("cpu")']),
    "mask-requires-grad": (s(), t(), torch.ones(LEAD, requires_grad=True), {}, ValueError,
                           ["attention_mask", "requires grad", ".detach()"]),
    # scale
    "scale-negative": (s(), t(), None, {"scale": -1.0}, ValueError, ["scale", "-1", ">= 0"]),
    "scale-nan": (s(), t(), None, {"scale": NAN}, ValueError, ["scale", "nan", "finite"]),
    "scale-inf": (s(), t(), None, {"scale": INF}, ValueError, ["scale", "inf", "finite"]),
    "scale-type": (s(), t(), None, {"scale": "big"}, TypeError, ["scale", "'big'", "float"]),
    "scale-tensor-negative": (s(), t(), None, {"scale": torch.tensor(-0.5)}, ValueError, ["scale", "-0.5", ">= 0"]),
    "scale-tensor-nan": (s(), t(), None, {"scale": torch.tensor(NAN)}, ValueError, ["scale", "nan", "finite"]),
    "scale-tensor-shape": (s(), t(), None, {"scale": torch.ones(1)}, ValueError, ["scale", "(1,)", "reshape(())"]),
    "scale-tensor-int": (s(), t(), None, {"scale": torch.tensor(1)}, TypeError, ["scale", "int64", ".float()"]),
    "scale-device": (s(), t(), None, {"scale": torch.ones((), device="meta")}, ValueError,
                     ["scale", "meta", '.to("cpu")']),
    # projection
    "proj-shape": (s(), t(width=9), None, {"proj_weight": torch.ones(9, D)}, ValueError,
                   ["proj_weight", "(9, 6)", "(6, 9)", "(3, 6, 9)"]),
    "proj-layers": (s(), t(width=9), None, {"proj_weight": torch.ones(2, D, 9)}, ValueError,
                    ["proj_weight", "(2, 6, 9)", "(3, 6, 9)"]),
    "proj-1d": (s(), t(), None, {"proj_weight": torch.ones(D)}, ValueError, ["proj_weight", "(6,)", "(6, 6)"]),
    "proj-bias-shape": (s(), t(width=9), None, {"proj_weight": torch.ones(D, 9), "proj_bias": torch.ones(9)},
                        ValueError, ["proj_bias", "(9,)", "(6,)"]),
    "proj-bias-layers": (s(), t(width=9), None, {"proj_weight": torch.ones(D, 9), "proj_bias": torch.ones(3, D)},
                         ValueError, ["proj_bias", "(3, 6)", "(6,)"]),
    "proj-bias-alone": (s(), t(), None, {"proj_bias": torch.ones(D)}, ValueError, ["proj_bias", "proj_weight"]),
    "proj-int": (s(), t(width=9), None, {"proj_weight": torch.ones(D, 9, dtype=torch.int64)}, TypeError,
                 ["proj_weight", "int64", ".float()"]),
    "proj-device": (s(), t(width=9), None, {"proj_weight": torch.ones(D, 9, device="meta")}, ValueError,
                    ["proj_weight", "meta", '.to("cpu")']),
    "proj-type": (s(), t(width=9), None, {"proj_weight": [[1.0]]}, TypeError, ["proj_weight", "list", "tensor"]),
    # layer_weights, reduction, normalizer
    "weights-count": (s(), t(), None, {"layer_weights": [1.0]}, ValueError, ["layer_weights", "1 values", "3 student"]),
    "weights-negative": (s(), t(), None, {"layer_weights": [1, -1, 1]}, ValueError, ["layer_weights[1]", "-1", ">= 0"]),
    "weights-nan": (s(), t(), None, {"layer_weights": [1, 1, NAN]}, ValueError, ["layer_weights[2]", "nan", "finite"]),
    "weights-type": (s(), t(), None, {"layer_weights": 2.0}, TypeError, ["layer_weights", "2.0", "3 floats"]),
    "weights-strings": (s(), t(), None, {"layer_weights": "abc"}, TypeError, ["layer_weights", "abc", "3 floats"]),
    "weights-grad": (s(), t(), None, {"layer_weights": torch.ones(3, requires_grad=True)}, ValueError,
                     ["layer_weights", "require grad", ".detach()"]),
    "normalizer-0": (s(), t(), None, {"normalizer": 0}, ValueError, ["normalizer", "0", "> 0"]),
    "normalizer-negative": (s(), t(), None, {"normalizer": -3.0}, ValueError, ["normalizer", "-3", "> 0"]),
    "normalizer-nan": (s(), t(), None, {"normalizer": NAN}, ValueError, ["normalizer", "nan", "finite"]),
    "normalizer-tensor-0": (s(), t(), None, {"normalizer": torch.tensor(0.0)}, ValueError, ["normalizer", "0", "> 0"]),
    "normalizer-shape": (s(), t(), None, {"normalizer": torch.ones(2)}, ValueError, ["normalizer", "(2,)", ".sum()"]),
    "normalizer-type": (s(), t(), None, {"normalizer": "7 rows"}, TypeError, ["normalizer", "'7 rows'", "float"]),
    "normalizer-sum": (s(), t(), None, {"normalizer": 3.0, "reduction": "sum"}, ValueError,
                       ["normalizer", '"sum"', "drop it"]),
    "normalizer-grad": (s(), t(), None, {"normalizer": torch.tensor(2.0, requires_grad=True)}, ValueError,
                        ["normalizer", "requires grad", ".detach()"]),
    # option strings
    "pooling": (s(), t(), None, {"pooling": "max"}, ValueError, ["pooling", "'max'", "token, cls, last, mean"]),
    "reduction": (s(), t(), None, {"reduction": "none"}, ValueError, ["reduction", "'none'", "mean, sum"]),
    "pooling-2d": (s(lead=()), t(lead=()), None, {"pooling": "cls"}, ValueError,
                   ["pooling='cls'", "(..., S, D)", "(6,)", '"token"']),
    "pooling-no-position": (s(lead=(2, 0)), t(lead=(2, 0)), None, {"pooling": "mean"}, ValueError,
                            ["pooling='mean'", "S >= 1", "(2, 0, 6)"]),
}  # fmt: skip


@pytest.mark.parametrize(("student", "teacher", "weights", "options", "kind", "holds"), BAD.values(), ids=BAD)
def test_message(backend, student, teacher, weights, options, kind, holds):
    if backend.device != "cpu":
        pytest.skip("values are not checked on a GPU, and all other checks are the same code")
    inputs = [x for x in [*_tensors(student), *_tensors(teacher), *_tensors(weights)] if x.device.type == "cpu"]
    before = [x.detach().clone() for x in inputs]
    with pytest.raises(kind) as raised:
        backend(student, teacher, weights, **options)
    assert raised.type is kind
    for text in holds:
        assert text in str(raised.value), f"{text!r} is not in: {raised.value}"
    for x, old in zip(inputs, before, strict=True):
        assert torch.equal(x.detach().nan_to_num(7.5), old.nan_to_num(7.5))
        assert x.grad is None


def _tensors(value):
    if torch.is_tensor(value):
        return [value]
    return [x for x in value if torch.is_tensor(x)] if isinstance(value, list) else []


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.complex64])
def test_a_dtype_that_no_kernel_reads(backend, dtype):
    ones = torch.ones(LEAD, device=backend.device)
    student, teacher = both_sides(M, N, LEAD, D, device=backend.device)

    def run(argument, value):
        options = {} if argument == "attention_mask" else {argument: value[0, 0]}
        return backend(student, teacher, None if options else value, **options)

    for argument in ("attention_mask", "scale", "normalizer"):
        with pytest.raises(TypeError, match=rf"^{argument}: got .*{dtype}; allowed are .*convert with \.float\(\)"):
            run(argument, ones.to(dtype))
        assert torch.equal(run(argument, ones.to(dtype).float()), run(argument, ones))  # the remedy


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev])
def test_torch_func_names_the_reference(fused, transform):
    student, teacher = ([h.detach() for h in side] for side in both_sides(M, N, LEAD, D, device=fused.device))
    with pytest.raises(
        RuntimeError, match=r'do not run under torch\.func .*; call alp_loss\(..., backend="reference"\)'
    ):
        transform(lambda h: fused([h], [h]))(student[0])
    weights = torch.rand(LEAD, device=fused.device)
    got = torch.func.grad(lambda h: alp_loss([h, *student[1:]], teacher, weights, backend="reference"))(student[0])
    first = student[0].requires_grad_()
    (want,) = torch.autograd.grad(alp_loss(student, teacher, weights, backend="reference"), first)
    torch.testing.assert_close(got, want)


@pytest.fixture
def mesh():
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("which", ["all", "mask", "scale"])
def test_dtensors_are_refused_with_a_remedy(mesh, which):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    student, teacher = s(), t()
    want = alp_loss(student, teacher, mask())
    options = {"scale": distribute_tensor(torch.tensor(0.5), mesh, [Replicate()])} if which == "scale" else {}
    weights = distribute_tensor(mask(), mesh, [Shard(0)]) if which == "mask" else mask()
    if which == "all":
        student, teacher = (
            [distribute_tensor(h.detach(), mesh, [Shard(0)]) for h in side] for side in (student, teacher)
        )
    with pytest.raises(TypeError, match=r"got a DTensor; pass x\.to_local\(\)"):
        alp_loss(student, teacher, weights, **options)
    if which == "all":
        assert torch.equal(alp_loss([h.to_local() for h in student], [h.to_local() for h in teacher], mask()), want)


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"backend: got 'gpu'; known backends are auto, .*cpu.*reference"):
        alp_loss(s(), t(), backend="gpu")


def test_a_backend_that_cannot_run_says_why():
    meta = [torch.zeros(2, D, device="meta")]
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run: .*meta.*backend=\"auto\""):
        alp_loss(meta, meta, backend="cpu")


@pytest.mark.parametrize("kind", ["no-overlap", "partial-overlap", "prefix", "skip", "last", "random"])
def test_make_layer_map_m_above_n(kind):
    with pytest.raises(ValueError, match=r'm=3 .*n=2 .*layer_map="all"'):
        make_layer_map(kind, 3, 2)


@pytest.mark.parametrize(("m", "n"), [(0, 2), (2, 0), (-1, 3)])
def test_make_layer_map_without_layers(m, n):
    with pytest.raises(ValueError, match=f"m={m}, n={n}"):
        make_layer_map("all", m, n)


def test_make_layer_map_unknown_kind():
    with pytest.raises(ValueError, match=r"'every'.*all, no-overlap, partial-overlap, prefix, skip, last, random"):
        make_layer_map("every", 2, 4)


def test_module_unknown_option_and_missing_width():
    with pytest.raises(TypeError, match=r"unknown option 'temperature'; known options are .*pooling.*scale"):
        ALPLoss(temperature=2.0)
    with pytest.raises(ValueError, match=r"student_dim and teacher_dim, got 4 and None"):
        ALPLoss(student_dim=4, projection=True)


def test_a_failed_call_leaves_the_next_one_alone(backend):
    student, teacher = both_sides(M, N, LEAD, D, device=backend.device)
    want = backend(student, teacher)
    if backend.device == "cpu":
        with pytest.raises(ValueError, match="attention_mask"):
            backend(student, teacher, mask(-1.0))
    assert torch.equal(backend(student, teacher), want)
