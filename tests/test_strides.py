"""Views are read where they lie: a layer is copied only if its strides cannot be followed."""

import mmap
import sys

import pytest
import torch
from common import assert_as_exact, both_sides, hidden_states

R, S, D = 3, 4, 6


def base(*shape, seed=0, dtype=torch.float32):
    return hidden_states(1, shape[:-1], shape[-1], dtype, seed=seed)[0].detach()


# Each gives a (R, S, D) tensor of other strides; True: rows at two strides or fewer, no copy.
VIEWS = {
    "contiguous": (lambda x: x, True),
    "slice-of-D": (lambda x: torch.cat([x, x], -1)[..., 1 : D + 1], True),
    "every-other-token": (lambda x: x.repeat_interleave(2, 1)[:, ::2], True),
    "batch-second": (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), True),
    "cls-like": (lambda x: x[:, :1].expand(R, S, D), True),
    "one-row": (lambda x: x[:1, :1].expand(R, S, D), True),
    "offset": (lambda x: torch.cat([x[:1], x])[1:], True),
    "D-not-contiguous": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), False),
    "D-expanded": (lambda x: x[..., :1].expand(R, S, D), False),
    "every-other-column": (lambda x: x.repeat_interleave(2, -1)[..., ::2], False),
}


def on(backend, view, seed, dtype=torch.float32):
    """A view with its storage on the backend's device."""
    return view(base(R, S, D, seed=seed, dtype=dtype).to(backend.device)).requires_grad_()


@pytest.mark.parametrize("pooling", ["token", "cls", "last", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("view", [v for v, _ in VIEWS.values()], ids=VIEWS)
def test_views(backend, view, dtype, pooling):
    student = [on(backend, view, 1, dtype), on(backend, VIEWS["contiguous"][0], 2, dtype)]
    teacher = [on(backend, view, 3, dtype), on(backend, view, 4, dtype), on(backend, VIEWS["offset"][0], 5, dtype)]
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]], device=backend.device)
    assert_as_exact(backend, student, teacher, mask, pooling=pooling)


def test_three_strides_are_copied_and_right(backend):
    wide = base(2, 5, 3, 5, 2, 5, D).to(backend.device)
    student = [wide[:, 1:4, :, 1:3, :, 1:2, :].squeeze(5)[..., k, :].requires_grad_() for k in range(2)]
    teacher = [(h.detach() * 1.5).requires_grad_() for h in student]
    assert_as_exact(backend, student, teacher)


@pytest.mark.parametrize(("view", "free"), VIEWS.values(), ids=VIEWS)
def test_no_copy_where_rows_have_two_strides(fused, view, free):
    if fused.device != "cpu" or fused.interpreted:
        pytest.skip("the profiler sees the copies of the C++ kernel only")
    layer, other = on(fused, view, 1), base(R, S, D)
    with torch.no_grad(), torch.profiler.profile() as profile:
        fused([layer], [other])
    copies = sum(event.count for event in profile.key_averages() if event.key in ("aten::clone", "aten::copy_"))
    assert (copies == 0) == free, f"{copies} copies"


def test_cls_views(backend):
    """[CLS] rows as views of (B, S, D); their gradient flows into the whole."""
    student, teacher = both_sides(2, 3, (5, 7), 12, device=backend.device)
    got = backend([s[:, 0] for s in student], [t[:, 0] for t in teacher])
    want = backend(student, teacher, pooling="cls")
    assert torch.equal(got, want)
    for one, other in zip(
        torch.autograd.grad(got, student + teacher), torch.autograd.grad(want, student + teacher), strict=True
    ):
        assert torch.equal(one, other)


def test_gradients_are_dense_for_any_view(backend):
    """A gradient never shares memory between rows, even where the layer does."""
    layer = base(1, D).to(backend.device).expand(5, D).requires_grad_()
    teacher = hidden_states(2, (5,), D, device=backend.device)
    backend([layer], teacher).backward()
    assert layer.grad.shape == (5, D)
    assert not torch.equal(layer.grad[0], layer.grad[1])


# ---- Sizes ------------------------------------------------------------------------------------------------


@pytest.mark.large
def test_more_than_2_to_the_31_elements(backend):
    """Stride-0 rows forward: 2^31 / 64 rows of 72 columns at no memory; the last row counts."""
    if backend.name == "reference":
        pytest.skip("the reference makes copies of its inputs in memory: 26 GB here")
    rows = 2**31 // 64 + 1000
    student, teacher = base(1, 72, seed=1).to(backend.device), base(1, 72, seed=2).to(backend.device)
    expected = (student - teacher).square().mean()
    with torch.no_grad():
        loss = backend([student.expand(rows, 72)], [teacher.expand(rows, 72)])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.large
def test_byte_offsets_beyond_2_to_the_32(backend):
    """Rows far apart in one reserved block: row r of a layer starts r * 1.5 GiB into it."""
    if backend.device != "cpu" or backend.interpreted:
        pytest.skip("needs memory that is reserved and not used")
    step = 400_000_000
    block = _reserve(3 * step + 64)
    rows = torch.as_strided(block, (4, 16), (step, 1))
    values = base(4, 16, seed=3)
    rows.copy_(values)
    teacher = hidden_states(2, (4,), 16)
    want = backend([values], teacher)
    assert torch.equal(backend([rows], teacher), want)


@pytest.mark.large
def test_more_than_2_to_the_31_elements_in_memory(backend):
    """One student and two overlapping teacher layers of 2^31 elements each, with the student's gradient."""
    if backend.device != "cpu" or backend.name == "reference" or _available_memory() < 17 << 30:
        pytest.skip("needs 17 GB of free memory and a fused backend on the CPU")
    block, copies, width = 4096, 513, 1024
    pattern = base(2, block + 1, width, seed=4).bfloat16()

    def step(copies):
        student = pattern[0, :block].repeat(copies, 1).requires_grad_()
        teacher = pattern[1, :block].repeat(copies + 1, 1)
        rows = copies * block
        loss = backend([student], [teacher[:rows], teacher[1 : rows + 1]], reduction="sum")
        loss.backward()
        return loss.detach(), student.grad

    loss, gradient = step(copies)
    assert gradient.numel() > 2**31
    small_loss, small_gradient = step(1)
    assert loss.item() == pytest.approx(copies * small_loss.item(), rel=1e-6)
    for start in (0, (copies // 2) * block, (copies - 1) * block):
        assert torch.equal(gradient[start : start + block], small_gradient)


def _available_memory():
    if sys.platform != "linux":
        return 0
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def _reserve(elements):
    """Float32 memory that the operating system gives only where it is written."""
    if sys.platform != "linux":
        pytest.skip("memory is reserved by Linux's mmap")
    noreserve = 0x4000  # mmap.MAP_NORESERVE from Python 3.13 on
    try:
        block = mmap.mmap(-1, 4 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve)
    except OSError as error:
        pytest.skip(f"cannot reserve memory: {error}")
    return torch.frombuffer(block, dtype=torch.float32)
