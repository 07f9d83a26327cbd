"""What only a GPU shows, for both GPU backends: graphs, streams, devices, launches, memory, determinism."""

from __future__ import annotations

import pytest
import torch

import alpkd_fast

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request):
    reason = alpkd_fast.backends().get(request.param, "it is not part of this build")
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def states(layers, lead, D, dtype=torch.bfloat16, seed=0, device="cuda"):
    generator = torch.Generator(device).manual_seed(100 * seed + layers)
    return [torch.randn(*lead, D, generator=generator, device=device).to(dtype) for _ in range(layers)]


def step(student, teacher, mask, backend, grad=None, **options):
    """Loss and student gradients."""
    student = [h.detach().requires_grad_() for h in student]
    loss = alpkd_fast.alp_loss(student, teacher, mask, backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss, student, grad)


def problem(dtype, D=768, m=6, n=12, rows=(8, 64)):
    mask = (torch.arange(rows[0] * rows[1], device="cuda").reshape(rows) % 5 != 0).long()
    return states(m, rows, D, dtype), states(n, rows, D, dtype, 1), mask


@pytest.mark.parametrize("pooling", ["token", "cls", "last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_graph_replays_follow_the_inputs(gpu_backend, dtype, pooling):
    """Captured with its backward, on new inputs, more than once: no ticket, workspace or factor is left over."""
    student, teacher, mask = problem(DTYPES[dtype])
    g = torch.tensor(0.5, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(student, teacher, mask, gpu_backend, g, pooling=pooling)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradients = step(student, teacher, mask, gpu_backend, g, pooling=pooling)
    for seed in (3, 4):
        for h, fresh in zip(student, states(6, (8, 64), 768, DTYPES[dtype], seed), strict=True):
            h.copy_(fresh)
        mask[seed] = 0
        g.fill_(seed / 4)
        graph.replay()
        want_loss, want = step(student, teacher, mask, gpu_backend, g, pooling=pooling)
        assert torch.equal(loss, want_loss)
        for got, expected in zip(gradients, want, strict=True):
            assert torch.equal(got, expected)


def test_side_streams_do_not_disturb_each_other(gpu_backend):
    problems = [problem(torch.bfloat16, m=2), problem(torch.bfloat16, m=4)]
    want = [step(*p, gpu_backend) for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(20):
        got = []
        for stream, p in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                got.append(step(*p, gpu_backend))
        torch.cuda.synchronize()
        for (loss, gradients), (want_loss, want_gradients) in zip(got, want, strict=True):
            assert torch.equal(loss, want_loss)
            assert all(map(torch.equal, gradients, want_gradients))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_inputs(gpu_backend):
    student, teacher, mask = problem(torch.bfloat16)
    want, _ = step(student, teacher, mask, gpu_backend)
    with torch.cuda.device(0):
        loss, gradients = step([h.to("cuda:1") for h in student], [h.to("cuda:1") for h in teacher], mask.to("cuda:1"),
                               gpu_backend)  # fmt: skip
        assert torch.cuda.current_device() == 0
    assert loss.device.index == gradients[0].device.index == 1
    torch.testing.assert_close(loss.cpu(), want.cpu())


@pytest.mark.parametrize("pooling", ["token", "cls", "last", "mean"])
def test_never_waits_for_the_device(gpu_backend, pooling):
    student, teacher, mask = problem(torch.float16)
    scale = torch.tensor(0.1, device="cuda", requires_grad=True)
    options = {"pooling": pooling, "scale": scale, "normalizer": torch.tensor(50.0, device="cuda")}
    step(student, teacher, mask, gpu_backend, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(student, teacher, mask, gpu_backend, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_deterministic(gpu_backend, dtype):
    inputs = problem(DTYPES[dtype])
    loss, gradients = step(*inputs, gpu_backend)
    for _ in range(10):
        again, more = step(*inputs, gpu_backend)
        assert torch.equal(loss, again)
        assert all(map(torch.equal, gradients, more))


def test_second_backward_of_a_kept_graph(gpu_backend):
    student, teacher, mask = problem(torch.float16)
    student = [h.requires_grad_() for h in student]
    loss = alpkd_fast.alp_loss(student, teacher, mask, backend=gpu_backend)
    first = torch.autograd.grad(2 * loss, student, retain_graph=True)
    second = torch.autograd.grad(2 * loss, student)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


def test_memory_beyond_inputs_and_gradients(gpu_backend):
    student, teacher, mask = problem(torch.bfloat16, rows=(32, 128))
    student = [h.requires_grad_() for h in student]
    inputs = sum(h.nbytes for h in (*student, *teacher))
    alpkd_fast.alp_loss(student, teacher, mask, backend=gpu_backend).backward()
    for h in student:
        h.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    alpkd_fast.alp_loss(student, teacher, mask, backend=gpu_backend).backward()
    extra = torch.cuda.max_memory_allocated() - before - sum(h.nbytes for h in student)
    assert extra <= 0.01 * inputs


def kernels_of(call) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in e.name]


def test_cls_takes_one_launch_each_way(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # it takes launches of its own
    reason = alpkd_fast.backends()["cuda"]
    if reason is not None:
        pytest.skip(f"cuda: {reason}")
    student, teacher, mask = problem(torch.bfloat16, rows=(32, 16))
    student = [h.requires_grad_() for h in student]
    g = torch.ones((), device="cuda")

    def call():
        loss = alpkd_fast.alp_loss(student, teacher, mask, pooling="cls", backend="cuda")
        torch.autograd.grad(loss, student, g)

    call()
    found = kernels_of(call)
    assert len(found) == 2, found
    assert "alp_few_rows" in found[0]
    assert "alp_scale_gradients" in found[1]


@pytest.mark.parametrize(("m", "n", "D"), [(6, 12, 768), (2, 12, 768), (4, 12, 768), (12, 24, 1024), (16, 32, 4096)])
def test_the_kernels_agree(monkeypatch, m, n, D):
    """The fast kernel against the generic one, at the sizes that matter."""
    reason = alpkd_fast.backends()["cuda"]
    if reason is not None:
        pytest.skip(f"cuda: {reason}")
    student, teacher, mask = problem(torch.bfloat16, D, m, n, (5, 100))
    loss, gradients = step(student, teacher, mask, "cuda")
    monkeypatch.setenv("ALPKD_FAST_CUDA_KERNEL", "generic")
    want, want_gradients = step(student, teacher, mask, "cuda")
    torch.testing.assert_close(loss, want, rtol=2.0**-15, atol=0)
    for got, expected in zip(gradients, want_gradients, strict=True):
        size = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=2.0**-7, atol=2.0**-12 * size)  # two roundings to bf16
