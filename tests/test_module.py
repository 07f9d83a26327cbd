"""ALPLoss: alp_loss with its options, and the projection where one is held."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from common import both_sides, hidden_states

from alpkd_fast import ALPLoss, ALPOutput, alp_loss


def problem(wide=6, narrow=9):
    return hidden_states(2, (3, 4), wide), [t.detach() for t in hidden_states(3, (3, 4), narrow, seed=2)]


def test_equals_the_function(backend):
    student, teacher = both_sides(2, 3, (3, 4), 6, device=backend.device)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], device=backend.device)
    options = {"pooling": "mean", "layer_map": [(0,), (1, 2)], "scale": 1.0, "normalize": True, "layer_weights": [1, 2]}
    module = ALPLoss(**options, backend=backend.name)
    assert torch.equal(module(student, teacher, mask), backend(student, teacher, mask, **options))
    assert list(module.parameters()) == []


@pytest.mark.parametrize("projections", [None, 2], ids=["shared", "per-layer"])
def test_projection_is_held_where_the_widths_differ(projections):
    student, teacher = problem()
    module = ALPLoss(6, 9, projections=projections)
    leading = () if projections is None else (projections,)
    assert module.proj_weight.shape == (*leading, 6, 9)
    assert module.proj_bias.shape == (*leading, 6)
    loss = module(student, teacher)
    want = alp_loss(student, teacher, proj_weight=module.proj_weight, proj_bias=module.proj_bias)
    assert torch.equal(loss, want)
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())


def test_projection_when_asked_and_when_not():
    assert ALPLoss(6, 6).proj_weight is None
    assert ALPLoss(6, 9, projection=False).proj_weight is None
    assert ALPLoss(6, 6, projection=True).proj_weight.shape == (6, 6)
    assert ALPLoss(6, 9, bias=False).proj_bias is None


def test_one_width_is_enough_to_learn_the_scale():
    module = ALPLoss(student_dim=16, learn_scale=True)
    assert module.proj_weight is None
    assert module.log_scale.exp().item() == pytest.approx(0.25)
    assert ALPLoss(teacher_dim=16).proj_weight is None
    with pytest.raises(ValueError, match=r"starting at 1/sqrt\(D\) needs student_dim"):
        ALPLoss(learn_scale=True)
    with pytest.raises(ValueError, match="student_dim and teacher_dim, got 16 and None"):
        ALPLoss(student_dim=16, projections=2)


def test_a_scale_that_would_be_no_parameter_is_refused():
    parameter = torch.nn.Parameter(torch.tensor(0.1))
    for scale in (parameter, parameter.exp()):
        with pytest.raises(ValueError, match=r"scale: got a tensor that requires a gradient, .* learn_scale=True"):
            ALPLoss(scale=scale)
    assert [name for name, _ in ALPLoss(scale=0.1, learn_scale=True).named_parameters()] == ["log_scale"]
    student, teacher = problem(6, 6)
    want = alp_loss(student, teacher, scale=0.1)
    torch.testing.assert_close(ALPLoss(scale=parameter.detach())(student, teacher), want)


def test_projection_starts_as_the_identity_or_orthonormal():
    square = ALPLoss(6, 6, projection=True)
    assert torch.equal(square.proj_weight, torch.eye(6))
    wide, tall = ALPLoss(9, 6).proj_weight, ALPLoss(6, 9).proj_weight
    torch.testing.assert_close(wide.T @ wide, torch.eye(6))
    torch.testing.assert_close(tall @ tall.T, torch.eye(6))
    per_layer = ALPLoss(6, 9, projections=2).proj_weight
    for weight in per_layer:
        torch.testing.assert_close(weight @ weight.T, torch.eye(6))
    assert bool((ALPLoss(6, 9).proj_bias == 0).all())


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_copies(through):
    student, teacher = problem()
    options = {"projections": 2, "pooling": "mean", "scale": 0.5, "layer_map": [(0, 1), (2,)]}
    module = ALPLoss(6, 9, **options, layer_weights=[0.1, 0.7])
    torch.nn.init.normal_(module.proj_bias)
    if through == "deepcopy":
        other = copy.deepcopy(module)
    elif through == "pickle":
        other = pickle.loads(pickle.dumps(module))
    elif through == "torch.save":
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        assert set(module.state_dict()) == {"proj_weight", "proj_bias", "layer_weights"}
        other = ALPLoss(6, 9, **options, layer_weights=[1, 1])
        other.load_state_dict(module.state_dict())
    assert torch.equal(other(student, teacher), module(student, teacher))
    assert other.proj_weight is not module.proj_weight
    assert repr(other) == repr(module)


def moved_through_meta(module):
    return module.to("meta").to_empty(device="cpu")


@pytest.mark.parametrize("move", [lambda m: m.to(torch.float64), lambda m: m.bfloat16().float(), moved_through_meta])
def test_layer_weights_are_not_rounded_by_casts(move):
    student, teacher = problem(6, 6)
    module = ALPLoss(layer_weights=[0.1, 0.7])
    want = module(student, teacher)
    torch.testing.assert_close(want, alp_loss(student, teacher, layer_weights=[0.1, 0.7]))
    moved = move(module)
    assert torch.equal(moved(student, teacher), want)
    assert torch.equal(moved.state_dict()["layer_weights"], torch.tensor([0.1, 0.7]))


@pytest.mark.parametrize("assign", [False, True])
def test_layer_weights_load_into_a_model_that_holds_the_loss(assign):
    student, teacher = problem(6, 6)
    saved, model = (torch.nn.ModuleDict({"loss": ALPLoss(layer_weights=w)}) for w in ([0.1, 0.7], [2, 3]))
    model.load_state_dict(saved.state_dict(), assign=assign)
    assert torch.equal(model["loss"](student, teacher), saved["loss"](student, teacher))
    with pytest.raises(RuntimeError, match="layer_weights"):
        torch.nn.ModuleDict({"loss": ALPLoss(layer_weights=[1, 1, 1])}).load_state_dict(saved.state_dict())
    with pytest.raises(RuntimeError, match="layer_weights"):
        torch.nn.ModuleDict({"loss": ALPLoss()}).load_state_dict(saved.state_dict())


def test_wrong_layer_weights_fail_at_once():
    with pytest.raises(TypeError, match=r"layer_weights: got 3\.0; pass m floats"):
        ALPLoss(layer_weights=3.0)
    with pytest.raises(ValueError, match=r"layer_weights\[1\] must be finite"):
        ALPLoss(layer_weights=[1, -1])


def test_repr_shows_the_options():
    text = repr(ALPLoss(6, 9, pooling="mean", layer_map="skip", normalize=True))
    for part in ("ALPLoss", "pooling='mean'", "layer_map='skip'", "normalize=True", "(6, 9)", "bias=True"):
        assert part in text
    assert repr(ALPLoss()) == "ALPLoss()"


def test_every_option_of_the_function_is_an_option_of_the_module():
    names = [n for n, p in inspect.signature(alp_loss).parameters.items() if p.kind is p.KEYWORD_ONLY]
    for name in names:
        if not name.startswith("proj_"):
            default = inspect.signature(alp_loss).parameters[name].default
            assert ALPLoss(**{name: default}).options == {name: default}


def test_normalizer_of_a_call_and_details():
    student, teacher = problem(6, 6)
    module = ALPLoss(return_details=True)
    output = module(student, teacher, normalizer=5.0)
    assert isinstance(output, ALPOutput)
    assert torch.equal(output.loss, alp_loss(student, teacher, normalizer=5.0))
    assert torch.equal(ALPLoss(normalizer=2.0)(student, teacher, normalizer=5.0), output.loss)


def test_to_dtype_moves_the_projection():
    student, teacher = problem()
    module = ALPLoss(6, 9).to(torch.bfloat16)
    assert module.proj_weight.dtype == torch.bfloat16
    module(student, teacher).backward()
    assert module.proj_weight.grad.dtype == torch.bfloat16


def test_training_a_projection_lowers_the_loss():
    student, teacher = problem()
    module = ALPLoss(6, 9)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = module([s.detach() for s in student], teacher)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
