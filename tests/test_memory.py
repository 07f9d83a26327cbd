"""The teacher is free after the forward, nothing is copied, and little extra memory is taken."""

import gc
import os
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from common import both_sides


def test_teacher_and_student_are_free_after_the_forward(fused):
    student, teacher = both_sides(2, 3, (4,), 8, device=fused.device)
    teacher = [t.detach() for t in teacher]
    inner = [2 * s for s in student]  # hidden states as a model makes them
    loss = fused(inner, teacher)
    alive = [weakref.ref(h) for h in teacher + inner]
    storages = [weakref.ref(h.untyped_storage()) for h in teacher + inner]
    assert all(ref() is not None for ref in alive + storages)
    del teacher, inner
    gc.collect()
    assert not any(ref() is not None for ref in alive + storages), "the graph keeps hidden states"
    loss.backward()
    assert student[0].grad is not None


def test_gradients_are_free_after_the_backward(fused):
    student, teacher = both_sides(2, 3, (4,), 8, device=fused.device)
    loss = fused(student, teacher)
    loss.backward()
    storage = weakref.ref(student[0].grad.untyped_storage())
    assert storage() is not None
    for h in student:
        h.grad = None
    gc.collect()
    assert storage() is None, "the graph keeps a gradient"


@pytest.mark.large
def test_extra_memory(fused):
    """Beyond inputs and gradients at most 1 MiB a thread, read from the peak of a process of its own."""
    if fused.name != "cpu":
        pytest.skip("measured on the GPU by the benchmarks")
    script = textwrap.dedent("""
        import resource, torch, alpkd_fast
        torch.set_num_threads(1)
        def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        def sides(rows): return ([torch.randn(rows, 768).requires_grad_() for _ in range(6)],
                                 [torch.randn(rows, 768) for _ in range(12)])
        alpkd_fast.alp_loss(*sides(8), backend="cpu").backward()  # code and threads
        student, teacher = sides(2048)
        before = peak()
        loss = alpkd_fast.alp_loss(student, teacher, backend="cpu")
        loss.backward()
        print(peak() - before - sum(s.grad.nbytes for s in student))
    """)
    # Without the poison of this suite: the process reads what a user's process takes.
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    extra = int(output.stdout)
    assert extra <= 1 << 20, f"{extra / 2**20:.2f} MiB beyond inputs and gradients"


@pytest.mark.large
def test_the_backward_of_gradient_1_copies_nothing(fused):
    if fused.device != "cpu" or fused.interpreted:
        pytest.skip("eager CPU mode only")
    for dtypes in ("f32-f32", "bf16-bf16", "f64-f64"):
        student, teacher = both_sides(2, 3, (64,), 768, dtypes, device=fused.device)
        with torch.profiler.profile(profile_memory=True) as profile:
            fused(student, teacher).backward()
        names = {event.key for event in profile.key_averages()}
        assert not names & {"aten::clone", "aten::stack", "aten::cat", "aten::contiguous"}, names
        made = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
        wanted = sum(h.nbytes for h in student + teacher)
        assert wanted <= made <= wanted + 4096, f"{made} bytes made for {wanted} bytes of gradients"
        assert "aten::mul_" not in names
