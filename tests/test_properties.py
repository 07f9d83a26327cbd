"""Random problems: any shapes, strides, dtypes, maps, masks and options together."""

import torch
from common import DTYPE_PAIRS, assert_as_exact, dtype_pair, hidden_states
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st


@st.composite
def problems(draw):
    m, n = draw(st.integers(1, 7)), draw(st.integers(1, 8))
    D = draw(st.integers(1, 40) | st.sampled_from([32, 64]))
    pooling = draw(st.sampled_from(["token", "token", "cls", "last", "mean"]))
    lead = draw(st.lists(st.integers(1, 4), min_size=1 if pooling == "token" else 2, max_size=3))
    dtypes = draw(st.sampled_from(DTYPE_PAIRS))
    options = {
        "pooling": pooling,
        "scale": draw(st.sampled_from([None, 0.0, 0.1, 1.0, "tensor"])),
        "normalize": draw(st.booleans()),
        "detach_attention": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["mean", "sum"])),
        "grad": draw(st.sampled_from([1.0, 1.0, -0.5, 64.0])),
    }
    assume(D > 1 or not options["normalize"])  # numbers over their absolute values: the loss is 0, but for rounding
    if draw(st.booleans()):
        options["layer_map"] = [draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True).map(sorted))
                                for _ in range(m)]  # fmt: skip
    if draw(st.booleans()):
        options["layer_weights"] = [draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])) for _ in range(m)]
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["normalizer"] = draw(st.sampled_from([0.5, 3.0, 100.0]))
    mask = None
    if draw(st.booleans()):
        count = torch.Size(lead).numel()
        kind = draw(st.sampled_from([torch.bool, torch.int64, torch.float32, torch.bfloat16]))
        values = draw(st.lists(st.sampled_from([0, 0, 1, 1, 1, 2]), min_size=count, max_size=count))
        mask = torch.tensor(values).reshape(lead).to(kind)
    if options["detach_attention"] and options["scale"] == "tensor":
        options["scale"] = 0.3  # the gradient is None or 0, as the backend likes
    view = draw(st.sampled_from(["plain", "columns", "steps", "transposed", "expanded"]))
    wanted = [draw(st.booleans()) for _ in range(2)]
    return m, n, tuple(lead), D, dtypes, mask, options, view, wanted, draw(st.integers(0, 1000))


def as_view(h, view):
    h = h.detach()
    if view == "columns":
        return torch.cat([h, h], -1)[..., : h.shape[-1]]
    if view == "steps":
        return h.repeat_interleave(2, 0)[::2]
    if view == "transposed":
        return h.transpose(0, -1).contiguous().transpose(0, -1)
    if view == "expanded":
        return h[:1].expand(h.shape)
    return h


def check(backend, problem):
    m, n, lead, D, dtypes, mask, options, view, (student_grad, teacher_grad), seed = problem
    s, t = dtype_pair(dtypes)
    student = [
        as_view(h, view).to(backend.device).requires_grad_(student_grad) for h in hidden_states(m, lead, D, s, seed)
    ]
    teacher = [as_view(h, view).to(backend.device).requires_grad_(teacher_grad)
               for h in hidden_states(n, lead, D, t, seed + 1)]  # fmt: skip
    mask = None if mask is None else mask.to(backend.device)
    if options["scale"] == "tensor":
        options = options | {"scale": torch.tensor(0.3, device=backend.device, requires_grad=True)}
    assert_as_exact(backend, student, teacher, mask, **options)


def test_random_problems(backend):
    count = 15 if backend.interpreted else 150

    @settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(problems())
    def random_problem(problem):
        check(backend, problem)

    random_problem()
