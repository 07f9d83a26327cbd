"""The CUDA kernels without a GPU: compiled for the CPU, one fiber per CUDA thread, against the float64 reference.

Index arithmetic, masks, options, matrix fragments and barriers are the kernels' own; only instructions are
emulated (tests/cuda_emulation). Launches, memory and speed are left to the tests on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from common import REACH, REACH_MAP, SCALED_ROWS
from cuda_emulation import build

from alpkd_fast import ops
from alpkd_fast.backends import cuda
from alpkd_fast.problem import POOLINGS, make_problem
from alpkd_fast.reference import reference_loss

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="the emulation needs g++ (or CXX)")

NAMES = ("loss", "layer_losses", "attention", "entropy")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True, scope="module")
def _emulation():
    build.load()


def emulated(problem):
    return ops.fused_loss("cuda", problem)


def evaluate(call, student, teacher, mask, teacher_grad=True, grad=1.0, **options):
    """Outputs and gradients by name, for an incoming gradient ``grad``."""
    student = [h.detach().requires_grad_() for h in student]
    teacher = [h.detach().requires_grad_(teacher_grad) for h in teacher]
    scale = options.get("scale")
    if isinstance(scale, torch.Tensor):
        options["scale"] = scale = scale.detach().requires_grad_()
    outputs = call(make_problem(student, teacher, mask, **{"details": True, **options}))
    outputs[0].backward(torch.full_like(outputs[0], grad))
    values = dict(zip(NAMES, outputs, strict=True))
    values |= {f"d_student[{i}]": h.grad for i, h in enumerate(student)}
    values |= {f"d_teacher[{j}]": h.grad for j, h in enumerate(teacher) if teacher_grad}
    if isinstance(scale, torch.Tensor):
        values["d_scale"] = scale.grad
    return {name: value.detach() for name, value in values.items()}


def check(student, teacher, mask=None, **options):
    """The error is at most twice that of the eager form in the same dtype, or of rounding the result twice, plus
    some roundings of the arithmetic: a gradient is a difference of terms that may be larger than itself.
    """

    def wide(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    ours = evaluate(emulated, student, teacher, mask, **options)
    eager = evaluate(reference_loss, student, teacher, mask, **options)
    truth = evaluate(
        reference_loss, [*map(wide, student)], [*map(wide, teacher)], wide(mask),
        **{name: wide(value) for name, value in options.items()},
    )  # fmt: skip
    assert ours.keys() == truth.keys()
    inputs = (student[0].dtype, teacher[0].dtype)
    # The matrix kernel's split operands keep 16 bits.
    unit = 2.0**-53 if F64 in inputs else 2.0**-17 if inputs[0].itemsize == inputs[1].itemsize == 2 else 2.0**-24
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype
        if name in ("attention", "entropy") and options.get("details") is False:
            assert value.numel() == 0
            continue
        assert value.shape == truth[name].shape
        size = truth[name].abs().max().item()
        rounding = max((eager[name].double() - truth[name]).abs().max().item(), torch.finfo(value.dtype).eps / 2 * size)
        budget = 2 * rounding + 32 * unit * size + torch.finfo(value.dtype).smallest_normal
        error = (value.double() - truth[name]).abs().max().item()
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}, size {size:.2e}"


def states(layers, lead, D, dtype, seed=0):
    generator = torch.Generator().manual_seed(100 * seed + layers)
    return [torch.randn(*lead, D, generator=generator).to(dtype) for _ in range(layers)]


MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]])
OPTIONS = {
    "plain": {}, "cls": {"pooling": "cls"}, "last": {"pooling": "last"}, "mean": {"pooling": "mean"},
    "normalize": {"normalize": True}, "detach": {"detach_attention": True}, "sum": {"reduction": "sum"},
    "no-overlap": {"layer_map": "no-overlap"}, "partial-overlap": {"layer_map": "partial-overlap"},
    "prefix": {"layer_map": "prefix"}, "skip": {"layer_map": "skip"}, "average": {"scale": 0.0},
    "learned-scale": {"scale": torch.tensor(0.3)}, "layer-weights": {"layer_weights": (0.0, 2.0, 0.5)},
    "normalizer": {"normalizer": 7.0}, "normalizer-tensor": {"normalizer": torch.tensor(9)},
    "all-at-once": {"layer_weights": (0.0, 2.0, 1.0), "layer_map": "skip", "pooling": "mean", "normalize": True},
    "grad": {"grad": 0.37}, "no-details": {"details": False}, "student-only": {"teacher_grad": False},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [F32, F16], ids=["f32", "f16"])
def test_options(name, dtype):
    check(states(3, (3, 5), 37, dtype), states(7, (3, 5), 37, dtype, 1), MASK, **OPTIONS[name])


@pytest.mark.parametrize("dtypes", [(F64, F64), (BF16, BF16), (F32, BF16), (BF16, F16), (F64, F16)], ids=str)
@pytest.mark.parametrize("D", [1, 40])
def test_dtypes(dtypes, D):
    check(states(3, (2, 5), D, dtypes[0]), states(5, (2, 5), D, dtypes[1], 1), MASK[:2])


def test_layer_weights_are_as_exact_as_the_states():
    check(states(2, (5,), 16, F64), states(3, (5,), 16, F64, 1), layer_weights=(0.1, 0.7))


@pytest.mark.parametrize(
    "mask", [MASK.bool(), MASK.half(), MASK.bfloat16() * 0.5, MASK.double() * 0.1, MASK.to(torch.int8)],
    ids=lambda mask: str(mask.dtype).removeprefix("torch."),
)  # fmt: skip
@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_row_weights_of_any_dtype(mask, pooling):
    check(states(2, (3, 5), 16, F32), states(3, (3, 5), 16, F32, 1), mask, pooling=pooling)


@pytest.mark.parametrize(
    ("m", "n", "D", "options"),
    [(1, 1, 8, {}), (20, 41, 36, {"layer_map": "no-overlap"}), (9, 5, 12, {"normalize": True}), (6, 12, 3001, {})],
    ids=["1-1", "20-41", "9-5", "wider-than-shared-memory"],
)
def test_shapes(m, n, D, options):
    check(states(m, (2,), D, F32), states(n, (2,), D, F32, 1), None, **options)


# ---- The kernels that take whole rows at 16-byte steps: alp_matrix for bf16 and fp16, alp_vector for fp32, and
# alp_few_rows for all, on a device that has room for a block to each student layer of each row ----

# Emulated devices with ever less shared memory: teams of 1, 2 and 4 warps, with 4 a row in parts. Those of capability 8
# copy 16 bytes at a time.
DEVICES = {"roomy": "0", "20KiB": "1", "14KiB": "2", "12KiB": "3", "sm_80": "6", "sm_80-14KiB": "7"}
ROOM_FOR_EVERY_ROW = "12"
DEVICES_OF_MANY_LAYERS = {"roomy": "0", "20KiB": "4", "14KiB": "5", "12KiB": "10", "sm_80": "6", "sm_80-14KiB": "8"}
KERNEL_OF = {F32: "alp_vector", BF16: "alp_matrix", F16: "alp_matrix"}
ROW_WEIGHTS = torch.tensor([0, 1, 0.5, 2, 0, 1, 1, 0.25, 1, 0, 1, 3, 1])


def launched() -> list[str]:
    return build.launches().split()[::2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize(("m", "n"), [(6, 12), (8, 16), (9, 12), (1, 1), (2, 20), (12, 24)])
def test_matrix_kernel(monkeypatch, device, dtype, m, n):
    monkeypatch.setenv("ALPKD_EMULATION_DEVICE", (DEVICES_OF_MANY_LAYERS if n > 16 else DEVICES)[device])
    D = 32 if n > 16 and device != "roomy" else 96
    launched()
    check(states(m, (13,), D, dtype), states(n, (13,), D, dtype, 1), ROW_WEIGHTS, teacher_grad=False)
    assert launched() == ["alp_matrix", "alp_scale_gradients"]  # one launch forward, one backward


@pytest.mark.parametrize("device", ["roomy", "20KiB", "14KiB", "sm_80"])
@pytest.mark.parametrize(("m", "n", "D"), [(6, 12, 132), (4, 12, 160), (2, 7, 96), (1, 1, 4), (5, 9, 64), (7, 3, 132)])
def test_vector_kernel(monkeypatch, device, m, n, D):
    """Tiles of 2, 3 and 4 student layers, some with empty places; threads with two vectors, one and none."""
    monkeypatch.setenv("ALPKD_EMULATION_DEVICE", DEVICES[device])
    launched()
    check(states(m, (13,), D, F32), states(n, (13,), D, F32, 1), ROW_WEIGHTS, teacher_grad=False)
    assert launched() == ["alp_vector", "alp_scale_gradients"]


@pytest.mark.parametrize("dtype", KERNEL_OF, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(("m", "n", "D"), [(6, 12, 768), (1, 1, 8), (3, 17, 40), (2, 32, 1032), (9, 5, 64)])
def test_few_rows_kernel(monkeypatch, dtype, m, n, D):
    """Warps with two teacher layers at a time, one and none; threads with two vectors, one and none."""
    monkeypatch.setenv("ALPKD_EMULATION_DEVICE", ROOM_FOR_EVERY_ROW)
    launched()
    check(states(m, (13,), D, dtype), states(n, (13,), D, dtype, 1), ROW_WEIGHTS, teacher_grad=False)
    assert launched() == ["alp_few_rows", "alp_scale_gradients"]


@pytest.mark.parametrize(
    ("rows", "n", "D", "dtype", "kernel"),
    [(512, 2, 8, F32, "alp_few_rows"), (513, 2, 8, F32, "alp_vector"), (4, 33, 8, F32, "alp_vector"),
     (4, 2, 36, BF16, "alp_generic"), (4, 2, 36, F32, "alp_few_rows"), (1, 20, 2700, F32, "alp_vector")],
)  # fmt: skip
def test_what_the_few_rows_kernel_does_not_take(monkeypatch, rows, n, D, dtype, kernel):
    """One block to each student layer of each row at a time, 32 teacher layers, rows of whole 16 bytes."""
    monkeypatch.setenv("ALPKD_EMULATION_DEVICE", ROOM_FOR_EVERY_ROW)
    launched()
    check(states(1, (rows,), D, dtype), states(n, (rows,), D, dtype, 1), None, teacher_grad=False)
    assert launched()[0] == kernel


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(lambda m, seed: states(m, (1,), 37, F32, seed), id="one-row"),
        pytest.param(lambda m, seed: [h[:, 0] for h in states(m, (5, 4), 37, F32, seed)], id="every-fourth-row"),
        pytest.param(lambda m, seed: [h[..., :6] for h in states(m, (5,), 8, F32, seed)], id="cut-off"),
    ],
)
def test_aligned_rows_whose_length_is_not(layers):
    """Rows at 16-byte steps whose last vector is not full."""
    check(layers(3, 0), layers(5, 1), None, teacher_grad=False)


ROW_OPTIONS = {
    "cls": {"pooling": "cls"}, "last": {"pooling": "last"}, "detach": {"detach_attention": True},
    "no-overlap": {"layer_map": "no-overlap"}, "skip": {"layer_map": "skip"}, "average": {"scale": 0.0},
    "learned-scale": {"scale": torch.tensor(0.3)}, "layer-weights": {"layer_weights": (0.0, 2.0, 0.5)},
    "sum": {"reduction": "sum", "grad": 0.1}, "no-details": {"details": False},
    "steep": {"scale": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("dtype", KERNEL_OF, ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("device", ["roomy", "14KiB", "few-rows"])
@pytest.mark.parametrize("name", ROW_OPTIONS)
def test_options_of_the_kernels_that_take_rows(monkeypatch, device, name, dtype):
    monkeypatch.setenv("ALPKD_EMULATION_DEVICE", DEVICES.get(device, ROOM_FOR_EVERY_ROW))
    launched()
    check(states(3, (3, 5), 64, dtype), states(7, (3, 5), 64, dtype, 1), MASK, teacher_grad=False, **ROW_OPTIONS[name])
    assert launched()[0] == ("alp_few_rows" if device == "few-rows" else KERNEL_OF[dtype])


# 12 student layers: as many groups, of 156 and 168 indices
ALL_BUT_ONE = {n: [[j for j in range(n) if j != i] for i in range(12)] for n in (14, 15)}


@pytest.mark.parametrize(
    ("m", "n", "D", "dtypes", "options"),
    [
        (6, 12, 768, (BF16, BF16), {}), (6, 12, 768, (F32, F32), {}), (6, 12, 766, (F32, F32), {}),
        (6, 12, 760, (F16, F16), {}), (6, 12, 768, (F32, BF16), {}), (6, 12, 768, (F64, F64), {}),
        (6, 12, 64, (BF16, BF16), {"normalize": True}), (6, 12, 64, (F32, F32), {"pooling": "mean"}),
        (6, 12, 64, (F32, F32), {"pooling": "cls"}), (6, 12, 64, (BF16, BF16), {"teacher_grad": True}),
        (17, 20, 32, (BF16, BF16), {}), (6, 33, 32, (BF16, BF16), {}), (4, 36, 32, (BF16, BF16), {"layer_map": "skip"}),
        (6, 36, 32, (BF16, BF16), {"layer_map": "skip"}), (16, 32, 1536, (F32, F32), {}),
        (16, 32, 1160, (F32, F32), {}), (16, 32, 1164, (F32, F32), {}), (24, 25, 32, (F32, F32), {}),
        (12, 12, 32, (F32, F32), {"layer_map": "skip"}), (13, 13, 32, (F32, F32), {"layer_map": "skip"}),
        (12, 14, 32, (F32, F32), {"layer_map": ALL_BUT_ONE[14]}),
        (12, 15, 32, (F32, F32), {"layer_map": ALL_BUT_ONE[15]}),
        (4, 12, 4096, (BF16, BF16), {}), (4, 12, 4096, (BF16, BF16), {"layer_map": "no-overlap"}),
        (4, 12, 4096, (BF16, BF16), {"layer_map": "skip"}), (4, 12, 2048, (BF16, BF16), {"layer_map": "no-overlap"}),
        (4, 12, 4096, (BF16, BF16), {"layer_map": "no-overlap", "layer_weights": (1.0, 0.0, 0.0, 0.0)}),
        (2, 3, 32, (BF16, BF16), {"layer_weights": (0.0, 0.0)}),
    ],
)  # fmt: skip
def test_dispatch_knows_which_problems_have_a_kernel(monkeypatch, m, n, D, dtypes, options):
    monkeypatch.setattr(cuda, "_shared_bytes", lambda device: 232448)
    lead = (7, 1)  # more than two rows to a multiprocessor: as of many
    student = [h.requires_grad_() for h in states(m, lead, D, dtypes[0])]
    teacher = [h.requires_grad_("teacher_grad" in options) for h in states(n, lead, D, dtypes[1], 1)]
    given = {name: value for name, value in options.items() if name != "teacher_grad"}
    problem = make_problem(student, teacher, details=True, **given)
    launched()
    emulated(problem)
    assert cuda.has_kernel_for(problem) == (launched()[0] != "alp_generic")


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_matrix_kernel_takes_rows_in_parts(monkeypatch, order):
    """Parts that pass 2 does not find any more are loaded again; copies may be early or late."""
    monkeypatch.setenv("ALPKD_EMULATION_DEVICE", DEVICES["20KiB"])
    monkeypatch.setenv("ALPKD_EMULATION_ORDER", order)
    launched()
    for D in (512, 1056):
        check(states(6, (5,), D, BF16), states(12, (5,), D, BF16, 1), ROW_WEIGHTS[:5], teacher_grad=False)
    assert launched()[::2] == ["alp_matrix"] * 2


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize("device", ["roomy", "20KiB", "14KiB", "sm_80", "few-rows"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=["f32", "f16"])
def test_order_of_warps_does_not_matter_where_they_take_rows(monkeypatch, order, device, dtype):
    monkeypatch.setenv("ALPKD_EMULATION_ORDER", order)
    monkeypatch.setenv("ALPKD_EMULATION_DEVICE", DEVICES.get(device, ROOM_FOR_EVERY_ROW))
    student, teacher = states(6, (13,), 64, dtype), states(12, (13,), 64, dtype, 1)
    options = {"layer_map": "all", "scale": torch.tensor(0.3), "teacher_grad": False}
    first = evaluate(emulated, student, teacher, ROW_WEIGHTS, **options)
    for name, value in evaluate(emulated, student, teacher, ROW_WEIGHTS, **options).items():
        assert torch.equal(value, first[name]), name
    check(student, teacher, ROW_WEIGHTS, **options)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("roomy", F32), ("20KiB", F32), ("14KiB", F32), ("sm_80", F32)]
    + [(device, BF16) for device in ("roomy", "20KiB", "14KiB", "12KiB", "sm_80")],
)
def test_who_takes_a_dealt_row_does_not_matter(monkeypatch, device, dtype):
    """More than four rows to a team: the last fifth goes to whichever team asks, some of them of weight 0."""
    monkeypatch.setenv("ALPKD_EMULATION_DEVICE", DEVICES[device])
    student, teacher = states(3, (121,), 96, dtype), states(12, (121,), 96, dtype, 1)
    weights = torch.arange(121) % 4 / 2.0
    options = {"scale": torch.tensor(0.3), "teacher_grad": False}
    launched()
    monkeypatch.setenv("ALPKD_EMULATION_ORDER", "forward")
    first = evaluate(emulated, student, teacher, weights, **options)
    assert launched()[0] == KERNEL_OF[dtype]
    monkeypatch.setenv("ALPKD_EMULATION_ORDER", "backward")
    for name, value in evaluate(emulated, student, teacher, weights, **options).items():
        assert torch.equal(value, first[name]), name
    check(student, teacher, weights, **options)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_many_rows_of_which_no_layer_counts(dtype):
    check(states(2, (121,), 32, dtype), states(3, (121,), 32, dtype, 1), layer_weights=(0.0, 0.0), teacher_grad=False)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_matrix_kernel_close_to_the_teacher(dtype):
    """The residual of a student that has learned is small beside the rows; its loss must not drown in them."""
    teacher = states(6, (13,), 64, dtype, 1)
    mean = torch.stack(teacher).double().mean(0)
    student = [(mean + 0.01 * h).to(dtype) for h in states(3, (13,), 64, F64)]
    ours = evaluate(emulated, student, teacher, None, teacher_grad=False, scale=0.0)
    truth = evaluate(reference_loss, [*map(torch.Tensor.double, student)], [*map(torch.Tensor.double, teacher)], None,
                     teacher_grad=False, scale=0.0)  # fmt: skip
    # |e| is about 0.01 |C|: an error of 2**-17 |C| in e is one of 2 * 2**-17 / 0.01 in its square.
    torch.testing.assert_close(ours["loss"].double(), truth["loss"], rtol=2 * 2.0**-17 / 0.01, atol=0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("device", [DEVICES["roomy"], ROOM_FOR_EVERY_ROW], ids=["roomy", "few-rows"])
def test_rows_keep_nan_where_it_is(monkeypatch, device, dtype):
    """NaN in rows and layers that are not read changes nothing; a row that is read spoils its own gradients only."""
    monkeypatch.setenv("ALPKD_EMULATION_DEVICE", device)
    student, teacher = states(3, (13,), 64, dtype), states(7, (13,), 64, dtype, 1)
    options = {"layer_map": [[0, 1], [2], [3, 4]], "layer_weights": (1.0, 0.0, 1.0), "teacher_grad": False}
    before = evaluate(emulated, student, teacher, ROW_WEIGHTS, **options)
    for h in (*student, *teacher):
        h[ROW_WEIGHTS == 0] = torch.nan
    for h in (student[1], teacher[2], teacher[5]):
        h.fill_(torch.nan)
    after = evaluate(emulated, student, teacher, ROW_WEIGHTS, **options)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    teacher[0][1] = torch.nan
    spoilt = evaluate(emulated, student, teacher, ROW_WEIGHTS, **options)
    assert spoilt["loss"].isnan()
    assert spoilt["d_student[0]"][1].isnan().all()
    assert torch.equal(spoilt["d_student[0]"][2:], before["d_student[0]"][2:])
    assert torch.equal(spoilt["d_student[2]"], before["d_student[2]"])


@pytest.mark.parametrize("kernel", ["alp_generic", "alp_matrix", "alp_vector", "alp_few_rows"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("layer", REACH, ids=lambda layer: "-".join(map(str, layer)))
def test_a_layer_that_is_not_finite_reaches_only_what_the_map_joins_it_with(monkeypatch, kernel, layer, poison):
    if kernel == "alp_few_rows":
        monkeypatch.setenv("ALPKD_EMULATION_DEVICE", ROOM_FOR_EVERY_ROW)
    dtype = BF16 if kernel == "alp_matrix" else F32
    student, teacher = states(3, (4,), 64, dtype), states(5, (4,), 64, dtype, 1)
    options = {"layer_map": REACH_MAP, "teacher_grad": kernel == "alp_generic"}
    launched()
    clean = evaluate(emulated, student, teacher, None, **options)
    assert launched()[0] == kernel
    side, k = layer
    (student if side == "student" else teacher)[k][2, 5] = poison
    got = evaluate(emulated, student, teacher, None, **options)
    students, teachers = REACH[layer]
    assert torch.equal(got["layer_losses"].isfinite(), torch.tensor([i not in students for i in range(3)]))
    for name, value in got.items():
        if not name.startswith("d_"):
            continue
        reached = [f"d_student[{i}]" for i in students] + [f"d_teacher[{j}]" for j in teachers]
        if name in reached:
            assert not value[2].isfinite().all(), f"{name} hides it"
            value[2] = clean[name][2]
        assert torch.equal(value, clean[name]), f"it reached {name}"


# ---- Rows, weights and layers -------------------------------------------------------------------------


def test_a_card_with_little_shared_memory(monkeypatch):
    """The 99 KiB of capability 8.6 and 8.9: what does not fit beside 32 columns goes to scratch memory, and more
    layers than anybody has take fewer columns at a time."""
    monkeypatch.setenv("ALPKD_EMULATION_DEVICE", "9")
    check(states(64, (2,), 44, F64), states(32, (2,), 44, F64, 1))
    check(states(216, (1,), 36, F64), states(40, (1,), 36, F64, 1), details=False)


def test_what_no_block_can_hold_is_refused(monkeypatch):
    monkeypatch.setenv("ALPKD_EMULATION_DEVICE", "11")
    with pytest.raises(RuntimeError, match=r"64 student and 8 teacher layers .* of shared memory.* has 10240"):
        emulated(make_problem(states(64, (1,), 64, F64), states(8, (1,), 64, F64, 1)))


def test_many_row_weights_are_added_up_first():
    weights = torch.zeros(2500)
    weights[::600] = torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0])
    launched()
    check(states(2, (2500,), 8, F32), states(3, (2500,), 8, F32, 1), weights)
    assert launched()[:2] == ["alp_row_weights", "alp_generic"]


def test_strided_rows():
    student = [h[..., 1:41] for h in states(2, (3, 5), 44, F32)]
    teacher = [h.transpose(0, 1)[:, ::2] for h in states(3, (10, 3), 40, F32, 1)]
    check(student, teacher, MASK)


@pytest.mark.parametrize("order", ["forward", "backward"])
def test_order_of_warps_does_not_matter(monkeypatch, order):
    """A barrier that is missing shows where the warps run first to last, or last to first."""
    monkeypatch.setenv("ALPKD_EMULATION_ORDER", order)
    check(states(3, (2, 5), 64, F32), states(5, (2, 5), 64, F32, 1), MASK[:2], normalize=True)


def test_nothing_crosses_from_rows_and_layers_that_are_not_read():
    student, teacher = states(3, (3, 5), 16, F32), states(7, (3, 5), 16, F32, 1)
    options = {"layer_map": [[0, 1], [2], [3, 4]], "layer_weights": (1.0, 0.0, 1.0)}
    before = evaluate(emulated, student, teacher, MASK, **options)
    for h in (*student, *teacher):
        h[MASK == 0] = torch.nan
    for h in (student[1], teacher[2], teacher[5], teacher[6]):
        h.fill_(torch.nan)
    after = evaluate(emulated, student, teacher, MASK, **options)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_nan_weight_comes_through():
    mask = MASK.float()
    mask[0, 0] = torch.nan
    values = evaluate(emulated, states(2, (3, 5), 16, F32), states(3, (3, 5), 16, F32, 1), mask)
    assert values["loss"].isnan()


def test_negative_weights_count_as_zero():
    student, teacher = states(2, (3, 5), 16, F32), states(3, (3, 5), 16, F32, 1)
    ours = evaluate(emulated, student, teacher, torch.where(MASK == 0, -1.5, 1.0))
    for name, value in evaluate(emulated, student, teacher, MASK).items():
        assert torch.equal(value, ours[name]), name


@pytest.mark.parametrize("dtype", [F16, F32], ids=["f16", "f32"])
def test_second_backward(dtype):
    """A kept graph's stored gradients are scaled anew, not twice."""
    student = [h.requires_grad_() for h in states(2, (3,), 16, dtype)]
    loss = emulated(make_problem(student, states(3, (3,), 16, dtype, 1), details=True))[0]
    first = torch.autograd.grad(loss, student, torch.tensor(0.5), retain_graph=True)
    second = torch.autograd.grad(loss, student, torch.tensor(0.5))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=["f64", "f32", "bf16", "f16"])
@pytest.mark.parametrize("D", [37, 40, 3000])
@pytest.mark.parametrize(("pooling", "weights", "positions"), SCALED_ROWS)
def test_only_compared_rows_are_scaled(dtype, D, pooling, weights, positions):
    """In one launch, whatever the rows' alignment; several rows to a block, and several blocks to a row."""
    values = states(3, (2, 3, 5), D, dtype)
    got = [v.clone() for v in values]
    launched()
    factors = torch.tensor([0.3, 0.7], dtype=torch.promote_types(dtype, F32))
    torch.ops.alpkd_fast.scale_gradients_cuda(got, *factors, POOLINGS.index(pooling), weights)
    assert launched() == ["alp_scale_gradients"]
    for g, v in zip(got, values, strict=True):
        v.view(6, 5, D)[range(6), positions] *= factors.prod()
        assert torch.equal(g, v)


@pytest.mark.parametrize("pooling", ["cls", "last"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_backward_of_pooled_rows(pooling, masked):
    """One launch multiplies the compared rows: infinity would make NaN of the others' zeros. It does not need the mask
    that the caller had given, and a kept graph is multiplied whole."""
    student = [h.requires_grad_() for h in states(2, (3, 5), 16, F32)]
    mask = MASK.clone() if masked else None
    problem = make_problem(student, states(3, (3, 5), 16, F32, 1), mask, pooling=pooling)
    kept, scaled, poisoned = (emulated(problem)[0] for _ in range(3))
    want = torch.autograd.grad(kept, student, torch.tensor(0.3), retain_graph=True)
    if masked:
        mask.fill_(1)
    launched()
    got = torch.autograd.grad(scaled, student, torch.tensor(0.3))
    assert launched() == ["alp_scale_gradients"]
    spoilt = torch.autograd.grad(poisoned, student, torch.tensor(torch.inf))
    for expected, g, h in zip(want, got, spoilt, strict=True):
        assert torch.equal(g, expected)
        rows = range(3), {"cls": [0] * 3, "last": [3, 3, 0] if masked else [4] * 3}[pooling]
        h[rows] = 0
        assert bool((h == 0).all())


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_scale_gradients(factor):
    tensors = [torch.randn(37).to(dtype) for dtype in (F64, F32, BF16, BF16, F16)] + [torch.randn(3)[1:]]
    want = [(t.double() * torch.tensor(factor).double()).to(t.dtype) for t in tensors]
    torch.ops.alpkd_fast.scale_gradients_cuda(tensors, torch.tensor(factor), torch.tensor(1.0))
    for got, expected in zip(tensors, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=torch.finfo(got.dtype).eps, atol=0)
