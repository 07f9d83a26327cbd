"""torch.compile(fullgraph=True): static and dynamic shapes give what eager gives."""

import pytest
import torch
import torch._dynamo.testing  # torch alone does not load it
from common import both_sides, hidden_states

OPTIONS = {
    "plain": {},
    "map-normalize": {"layer_map": "partial-overlap", "normalize": True, "scale": 1.0},
    "mean-weights": {"pooling": "mean", "layer_weights": [1.0, 0.5], "reduction": "sum"},
    "cls": {"pooling": "cls", "normalizer": 3.0},
    "last-detach": {"pooling": "last", "detach_attention": True},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare(function, compiled, *inputs):
    flat = [x for side in inputs for x in (side if isinstance(side, list) else [side])]
    wanted = [x for x in flat if x is not None and x.requires_grad]
    want, got = function(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, want)
    for one, other in zip(torch.autograd.grad(got, wanted), torch.autograd.grad(want, wanted), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtypes", ["f32-f32", "f16-bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_eager(fused, options, dtypes, dynamic):
    def function(student, teacher, mask):
        return 0.5 * fused([2 * s for s in student], teacher, mask, **options)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lead in ((2, 4), (3, 5), (2, 7)):
        student, teacher = both_sides(2, 6, lead, 8, dtypes, device=fused.device)
        mask = torch.ones(lead, device=fused.device)
        mask[0, 2:] = 0
        compare(function, compiled, student, teacher, mask)


def test_dynamic_shapes_compile_once(fused):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda student, teacher, mask: fused(student, teacher, mask), fullgraph=True, dynamic=True, backend=counter
    )
    for lead in ((2, 4), (3, 5), (7, 9)):
        student, teacher = both_sides(2, 3, lead, 8, device=fused.device)
        compiled(student, teacher, torch.ones(lead, device=fused.device)).backward()
    assert counter.frame_count == 1


@pytest.mark.large
def test_inductor(fused):
    def function(student, teacher, mask):
        return 0.5 * fused([s.tanh() for s in student], teacher, mask)

    student, teacher = both_sides(2, 3, (2, 4), 8, device=fused.device)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]], device=fused.device)
    compare(function, torch.compile(function, fullgraph=True), student, teacher, mask)


def test_projection_scale_tensor_and_details(fused, form):
    weight = hidden_states(1, (6,), 8, device=fused.device, seed=9)[0]
    scale = torch.tensor(0.3, device=fused.device, requires_grad=True)

    def function(student, teacher, weight, scale):
        output = fused.details(student, teacher, proj_weight=weight, scale=scale)
        return output.loss + output.attention.sum() + output.entropy.sum() + output.layer_losses.sum()

    student = hidden_states(2, (4,), 6, device=fused.device)
    teacher = hidden_states(3, (4,), 8, device=fused.device)
    compare(function, torch.compile(function, fullgraph=True, backend="aot_eager"), student, teacher, weight, scale)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("options", [OPTIONS["map-normalize"], OPTIONS["cls"]], ids=["map-normalize", "cls"])
def test_projection(fused, form, options, dynamic):
    def function(student, teacher, mask, weight):
        return fused([2 * s for s in student], teacher, mask, proj_weight=weight, **options)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    weight = hidden_states(1, (2, 8), 5, device=fused.device, seed=9)[0]
    for lead in ((2, 4), (3, 5)):
        student, _ = both_sides(2, 6, lead, 8, device=fused.device)
        teacher = hidden_states(6, lead, 5, torch.bfloat16, device=fused.device)
        mask = torch.ones(lead, device=fused.device)
        mask[0, 2:] = 0
        compare(function, compiled, student, [*teacher[:5], teacher[0]], mask, weight)


def test_the_same_tensor_as_two_layers(fused):
    """A known trap of compiled autograd.Functions: half the gradient."""

    def function(a, b):
        return fused([a, a], [b, a, b], layer_weights=[1.0, 3.0])

    a, b = hidden_states(2, (4,), 6, device=fused.device)
    for backend in ("aot_eager", "eager"):
        compare(function, torch.compile(function, fullgraph=True, backend=backend), a, b)


def test_mask_values_are_checked_inside_the_operator(fused):
    if fused.device != "cpu":
        pytest.skip("values are not checked on a GPU")
    compiled = torch.compile(lambda s, t, m: fused(s, t, m), fullgraph=True, backend="aot_eager")
    student, teacher = both_sides(2, 3, (4,), 6, device=fused.device)
    compiled(student, teacher, torch.ones(4))
    with pytest.raises((RuntimeError, ValueError), match="attention_mask holds -1"):
        compiled(student, teacher, -torch.ones(4))


def test_autocast_and_inference_mode_under_compile(fused):
    compiled = torch.compile(lambda s, t: fused(s, t), fullgraph=True, backend="aot_eager")
    student, teacher = both_sides(2, 3, (4,), 6, "f32-bf16", device=fused.device)
    want = fused(student, teacher)
    with torch.autocast(fused.device, dtype=torch.bfloat16):
        assert torch.equal(compiled(student, teacher), want)
    with torch.inference_mode():
        assert torch.equal(compiled(student, teacher), want)


def test_reference_compiles(fused):
    from backend import Backend

    reference = Backend("reference")
    compiled = torch.compile(lambda s, t, m: reference(s, t, m), fullgraph=True, backend="aot_eager")
    student, teacher = both_sides(2, 3, (2, 4), 6)
    compare(lambda s, t, m: reference(s, t, m), compiled, student, teacher, torch.ones(2, 4))


def test_module_under_compile(fused):
    from alpkd_fast import ALPLoss

    loss = ALPLoss(6, 8, backend=fused.name).to(fused.device)
    student = hidden_states(2, (4,), 6, device=fused.device)
    teacher = hidden_states(3, (4,), 8, device=fused.device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), loss(student, teacher))


def test_layer_weights_of_a_compiled_module_follow_its_state_dict(fused):
    from alpkd_fast import ALPLoss

    loss, other = (ALPLoss(layer_weights=w, backend=fused.name).to(fused.device) for w in ([1.0, 0.5], [0.25, 3.0]))
    student, teacher = both_sides(2, 3, (4,), 6, device=fused.device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), loss(student, teacher))
    loss.load_state_dict(other.state_dict())
    torch.testing.assert_close(compiled(student, teacher), other(student, teacher))
