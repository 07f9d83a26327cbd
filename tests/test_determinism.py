"""Bitwise the same result from run to run and for any number of threads."""

import pytest
import torch
from common import both_sides, evaluate

PROBLEMS = {
    "f32": ((4, 6, (300,), 40), "f32-f32", {}),
    "bf16": ((4, 6, (300,), 40), "bf16-bf16", {}),
    "f16": ((4, 6, (300,), 40), "f16-f16", {}),
    "f64": ((4, 6, (300,), 40), "f64-f64", {}),
    "mixed-normalize": ((4, 6, (300,), 40), "f32-bf16", {"normalize": True}),
    "mean": ((3, 5, (70, 4), 24), "f32-f32", {"pooling": "mean"}),
    "map": ((4, 6, (300,), 40), "f32-f32", {"layer_map": [(0,), (0, 1, 2), (3, 4, 5), (0, 1, 2)]}),
    "one-row": ((4, 6, (1,), 40), "f32-f32", {}),
}


def results(backend, shape, dtypes, options):
    student, teacher = both_sides(*shape, dtypes, device=backend.device)
    mask = torch.ones(shape[2], device=backend.device)
    mask[::3] = 0.5
    mask[1::7] = 0
    scale = torch.tensor(0.3, device=backend.device, requires_grad=True)
    return evaluate(backend.details, student, teacher, mask, scale=scale, **options)


def assert_same(got, want):
    for name, value in want.items():
        assert torch.equal(got[name], value), f"{name} differs by {(got[name] - value).abs().max()}"


@pytest.mark.parametrize(("shape", "dtypes", "options"), PROBLEMS.values(), ids=PROBLEMS)
def test_from_run_to_run(fused, shape, dtypes, options):
    want = results(fused, shape, dtypes, options)
    for _ in range(3):
        assert_same(results(fused, shape, dtypes, options), want)


@pytest.mark.parametrize(("shape", "dtypes", "options"), PROBLEMS.values(), ids=PROBLEMS)
def test_over_thread_counts(fused, shape, dtypes, options):
    if fused.device != "cpu" or fused.interpreted:
        pytest.skip("one device has one way to run it")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = results(fused, shape, dtypes, options)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert_same(results(fused, shape, dtypes, options), want)
    finally:
        torch.set_num_threads(before)


def test_a_row_does_not_depend_on_the_others(backend):
    """The gradient of a row, for one and the same N, is the same in any batch."""
    student, teacher = both_sides(3, 4, (130,), 24, device=backend.device)
    options = {"normalizer": 10.0}
    whole = evaluate(backend.details, student, teacher, **options)["d_student"]
    part = evaluate(backend.details, [s[17:19] for s in student], [t[17:19] for t in teacher], **options)["d_student"]
    torch.testing.assert_close(part, whole[:, 17:19], rtol=1e-5, atol=1e-8)
