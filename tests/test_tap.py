"""The tap's gradients are those of plain autograd, whoever else holds the gradient that it adds into."""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import layer_norm, linear

from alpkd_fast.capture import tap as tap_module
from alpkd_fast.capture.tap import Pooling, sole_owner_counts, tap

B, S, D = 3, 5, 4
SHARE = torch.tensor([[0.5, 0.5, 0, 0, 0], [0.2] * 5, [0, 0, 0, 0, 0]], dtype=torch.float64)
POOLINGS = {
    "cls": Pooling("cls"),
    "last": Pooling("last", torch.tensor([1, 4, 0])),
    "mean": Pooling("mean", SHARE),
}


def plain(h, pooling):
    """What the tap replaces, differentiated by autograd."""
    if pooling.kind == "cls":
        return h, h[:, 0]
    if pooling.kind == "last":
        return h, h.take_along_dim(pooling.where[:, None, None], dim=1).squeeze(1)
    return h, torch.einsum("bs,bsd->bd", pooling.where, h.to(pooling.where.dtype))


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class KeepsItsGradient(torch.autograd.Function):
    """Hands out a tensor that it keeps, as a fused loss does that computes its gradient in the forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.cos(x))
        return torch.sin(x).sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0]


# Each case takes x, w and a split of h into (flow, rows), and returns the loss. ``x`` is the leaf before the tap.
def sole_layer_norm(x, w, split):
    flow, rows = split(x * 2)
    return (layer_norm(flow, (D,)) @ w).square().sum() + rows.square().sum()


def sole_linear(x, w, split):
    flow, rows = split(x * 2)
    return linear(flow, w).square().sum() + rows.square().sum()


def sibling_before(x, w, split):
    y = x * 3
    flow, rows = split(x * 2)
    return linear(flow + y, w).square().sum() + rows.square().sum()


def sibling_after(x, w, split):
    flow, rows = split(x * 2)
    return linear(flow + x * 3, w).square().sum() + rows.square().sum()


def sibling_through_a_view(x, w, split):
    y = (x * 3).view(B * S, D)
    flow, rows = split(x * 2)
    return linear(flow.view(B * S, D) + y, w).square().sum() + rows.square().sum()


def sibling_is_a_leaf(x, w, split):
    flow, rows = split((x * 2).detach().requires_grad_() * 1)
    return ((flow + x) * 2).square().sum() + rows.square().sum()


def sibling_of_another_dtype(x, w, split):
    y = (x * 3).bfloat16()
    flow, rows = split((x * 2).bfloat16())
    return linear(flow + y, w.bfloat16()).square().sum().double() + rows.double().square().sum()


def pre_norm_block(x, w, split):
    flow, rows = split(x * 2)
    return (flow + linear(layer_norm(flow, (D,)), w)).square().sum() + rows.square().sum()


def post_norm_block(x, w, split):
    flow, rows = split(x * 2)
    return (layer_norm(flow + linear(flow, w), (D,)) ** 3).sum() + rows.square().sum()


def block_of_residuals_only(x, w, split):
    flow, rows = split(x * 2)
    return linear(flow + flow, w).square().sum() + rows.square().sum()


def expanded_gradient(x, w, split):
    flow, rows = split(x * 2)
    return flow.sum() + rows.square().sum()


def broadcast_gradient(x, w, split):
    flow, rows = split(x * 2)
    return (flow.expand(2, B, S, D) * rand(2, 1, 1, D)).sum() + rows.square().sum()


def transposed_gradient(x, w, split):
    flow, rows = split(x * 2)
    return (flow.transpose(0, 1).reshape(S, B * D) ** 2).sum() + rows.square().sum()


def stacked_gradients(x, w, split):
    flow, rows = split(x * 2)
    return (torch.stack([x * 3, flow]) ** 3).sum() + rows.square().sum()


def split_gradients(x, w, split):
    flow, rows = split(x * 2)
    return (torch.cat([x * 3, flow], 0) ** 3).sum() + rows.square().sum()


def tap_behind_tap(x, w, split):
    flow, first = split(x * 2)
    flow, second = split(flow)
    return (layer_norm(flow, (D,)) @ w).square().sum() + first.square().sum() + second.pow(3).sum()


def flow_unused(x, w, split):
    _, rows = split(x * 2)
    return (rows @ w.to(rows.dtype)).square().sum()


def rows_unused(x, w, split):
    flow, _ = split(x * 2)
    return (flow @ w).square().sum()


def flow_changed_in_place(x, w, split):
    flow, rows = split(x * 2)
    return (flow.add_(x).mul_(2) @ w).square().sum() + rows.square().sum()


def gradient_kept_by_its_function(x, w, split):
    flow, rows = split(x * 2)
    return KeepsItsGradient.apply(flow) + rows.square().sum()


def autocast(x, w, split):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        flow, rows = split(linear(x.float(), w.float()))
        return linear(flow, w.float()).float().square().sum().double() + rows.double().square().sum()


CASES = {f.__name__: f for f in (
    sole_layer_norm, sole_linear, sibling_before, sibling_after, sibling_through_a_view, sibling_is_a_leaf,
    sibling_of_another_dtype, pre_norm_block, post_norm_block, block_of_residuals_only, expanded_gradient,
    broadcast_gradient, transposed_gradient, stacked_gradients, split_gradients, tap_behind_tap, flow_unused,
    rows_unused, flow_changed_in_place, gradient_kept_by_its_function, autocast,
)}  # fmt: skip


def gradients(case, split, backwards=1):
    x, w = rand(B, S, D).requires_grad_(), rand(D, D, seed=1).requires_grad_()
    loss = case(x, w, split)
    for left in range(backwards, 0, -1):
        loss.backward(retain_graph=left > 1)
    return x.grad, w.grad


def assert_same(got, expected, low_precision=False):
    for a, b in zip(got, expected, strict=True):
        if b is None:
            assert a is None
        else:
            # bfloat16: the sum of the two gradients is rounded once or twice, each by 2^-8 of at most its size
            tolerance = {"rtol": 2**-7, "atol": 2**-7 * b.abs().max().item()} if low_precision else {}
            torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-13, "atol": 1e-13}))


@pytest.mark.parametrize("backwards", [1, 2])
@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_autograd(name, kind, backwards):
    if name == "flow_changed_in_place":  # the tap's rows are a copy, which the change does not reach
        expected = gradients(CASES[name], lambda h: (h, plain(h.clone(), POOLINGS[kind])[1]), backwards)
    else:
        expected = gradients(CASES[name], lambda h: plain(h, POOLINGS[kind]), backwards)
    got = gradients(CASES[name], lambda h: tap(h, POOLINGS[kind]), backwards)
    assert_same(got, expected, low_precision=name in ("sibling_of_another_dtype", "autocast"))


@pytest.fixture
def in_place(monkeypatch):
    """Returns, per backward of a tap, whether it added into the gradient from above itself."""
    came, went = [], []
    add_gradient = Pooling.add_gradient

    def spy(self, dense, grad):
        went.append(dense.data_ptr())
        return add_gradient(self, dense, grad)

    def split(h):
        flow, rows = tap(h, POOLINGS["cls"])
        flow.register_hook(lambda grad: came.append(grad.data_ptr()))
        return flow, rows

    monkeypatch.setattr(Pooling, "add_gradient", spy)
    split.decisions = lambda: [a == b for a, b in zip(came, went, strict=True)]
    return split


@pytest.mark.parametrize("name", ["sole_layer_norm", "sole_linear", "pre_norm_block", "post_norm_block"])
def test_adds_in_place_where_it_is_the_only_holder(name, in_place):
    gradients(CASES[name], in_place)
    assert in_place.decisions() == [True]


@pytest.mark.parametrize(
    "name",
    ["sibling_before", "sibling_through_a_view", "expanded_gradient", "transposed_gradient"],
)
def test_copies_where_it_may_not_be(name, in_place):
    gradients(CASES[name], in_place)
    assert in_place.decisions() == [False]


@pytest.mark.parametrize("consumer", ["norm", "linear"])
@pytest.mark.parametrize(
    "keep",
    [
        lambda grad: grad,
        lambda grad: grad.detach(),
        lambda grad: grad.view(-1),
        lambda grad: grad.data,
        lambda grad: grad.numpy(),
        lambda grad: memoryview(grad.numpy()),  # a buffer
        lambda grad: torch.utils.dlpack.from_dlpack(grad),
        lambda grad: grad.untyped_storage(),
        lambda grad: grad if grad._base is None else grad._base,
    ],
)
def test_kept_gradients_stay_as_they_were(keep, consumer):
    kept, before = [], []
    x = rand(B, S, D).requires_grad_()
    flow, rows = tap(x * 2, POOLINGS["cls"])
    flow.register_hook(lambda grad: kept.append(keep(grad)))
    flow.register_hook(lambda grad: before.append(grad.clone()))
    out = layer_norm(flow, (D,)).pow(3) if consumer == "norm" else linear(flow, rand(D, D)).pow(3)
    (out.sum() + rows.square().sum()).backward()
    (now,) = kept
    if isinstance(now, torch.UntypedStorage):
        now = torch.empty(0, dtype=torch.float64).set_(now, 0, (B, S, D))
    elif isinstance(now, memoryview):
        now = torch.frombuffer(now, dtype=torch.float64)
    assert torch.equal(torch.as_tensor(now).reshape(B, S, D), before[0])


def test_retained_and_requested_gradients_of_the_flow():
    def run(split):
        x = rand(B, S, D).requires_grad_()
        flow, rows = split(x * 2)
        flow = flow * 1 if split is plain_cls else flow  # plain: the flow's own part only
        flow.retain_grad()
        loss = layer_norm(flow, (D,)).pow(3).sum() + rows.square().sum()
        requested = torch.autograd.grad(loss, [flow, x], retain_graph=True)
        loss.backward()
        return *requested, flow.grad, x.grad

    def plain_cls(h):
        return h, h[:, 0]

    assert_same(run(lambda h: tap(h, POOLINGS["cls"])), run(plain_cls))


def test_gradient_given_by_the_user_is_not_touched():
    x, given = rand(B, S, D).requires_grad_(), rand(B, S, D, seed=3)
    before = given.clone()
    flow, rows = tap(x * 2, POOLINGS["cls"])
    torch.autograd.backward([flow, rows], [given, rand(B, D)])
    assert torch.equal(given, before)


def test_hooks_on_the_node_see_what_autograd_shows_them():
    x, seen = rand(B, S, D).requires_grad_(), []
    flow, rows = tap(x * 2, POOLINGS["cls"])
    flow.grad_fn.register_prehook(lambda grads: seen.append([g.clone() for g in grads]))
    flow.grad_fn.register_prehook(lambda grads: seen.append(grads))
    flow.grad_fn.register_hook(lambda _, grads: seen.append(grads))
    (layer_norm(flow, (D,)).pow(3).sum() + rows.square().sum()).backward()
    for grads in seen[1:]:
        assert_same(grads, seen[0])


@pytest.mark.parametrize("kind", POOLINGS)
def test_first_and_second_derivatives(kind):
    def loss(x, w):
        flow, rows = tap(x * 2, POOLINGS[kind])
        return (torch.tanh(flow) @ w).sum(), rows.pow(3).sum(), (rows.sum() * flow.sum()).sin()

    inputs = rand(B, S, D).requires_grad_(), rand(D, D, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_create_graph_gives_the_second_derivative_of_autograd():
    def run(split):
        x, w = rand(B, S, D).requires_grad_(), rand(D, D, seed=1).requires_grad_()
        (grad,) = torch.autograd.grad(pre_norm_block(x, w, split), x, create_graph=True)
        grad.square().sum().backward()
        return grad, x.grad, w.grad

    assert_same(run(lambda h: tap(h, POOLINGS["mean"])), run(lambda h: plain(h, POOLINGS["mean"])))


def test_without_the_counts_it_copies(monkeypatch, in_place):
    monkeypatch.setattr(tap_module, "_counts", lambda *_: (_ for _ in ()).throw(AttributeError("no _use_count")))
    sole_owner_counts.cache_clear()
    try:
        assert sole_owner_counts() == frozenset()
        monkeypatch.undo()
        assert_same(
            gradients(sole_linear, lambda h: tap(h, POOLINGS["cls"])),
            gradients(sole_linear, lambda h: plain(h, POOLINGS["cls"])),
        )
    finally:
        sole_owner_counts.cache_clear()


def test_the_counts_do_not_depend_on_who_evaluates_frames():
    """Where a compiler has set its own evaluator, Python runs no call inline, and a call holds its arguments twice."""
    assert torch._dynamo.run(sole_owner_counts.__wrapped__)() == sole_owner_counts() != frozenset()


def test_the_first_tap_of_a_process_may_be_checkpointed():
    """What the counting saves for its own backward must not be taken for the checkpointed function's."""
    script = """
import torch
from torch.utils.checkpoint import checkpoint
from alpkd_fast.capture.tap import Pooling, tap
x = torch.ones(2, 3, 4, requires_grad=True)
flow, rows = checkpoint(lambda x: tap(torch.tanh(x), Pooling("cls")), x, use_reentrant=False)
(flow.sum() + rows.sum()).backward()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_nothing_weighs_in_from_tokens_of_weight_zero():
    h = rand(B, S, D)
    h[SHARE == 0] = torch.nan
    h.requires_grad_()
    flow, rows = tap(h * 1, POOLINGS["mean"])
    assert torch.equal(rows[2], torch.zeros(D, dtype=torch.float64))
    (torch.zeros_like(flow) * flow.detach().nan_to_num() + flow * 0).nan_to_num()
    rows.square().sum().backward()
    assert torch.equal(h.grad[SHARE == 0], torch.zeros(int((SHARE == 0).sum()), D, dtype=torch.float64))
    assert not rows.isnan().any()


@pytest.mark.parametrize("kind", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype, kind):
    pooling = Pooling("mean", SHARE.float()) if kind == "mean" else POOLINGS[kind]
    h = rand(B, S, D, dtype=dtype).requires_grad_()
    flow, rows = tap(h, pooling)
    assert flow.dtype == dtype
    assert rows.dtype == (torch.float32 if kind == "mean" else dtype)
    (flow.float().square().sum() + rows.float().square().sum()).backward()
    assert h.grad.dtype == dtype
    other = h.detach().clone().requires_grad_()
    flow, rows = plain(other, pooling)
    (flow.float().square().sum() + rows.float().square().sum()).backward()
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(h.grad, other.grad, rtol=unit, atol=unit * other.grad.abs().max().item())


@pytest.mark.parametrize("kind", POOLINGS)
def test_compiled(kind):
    pooling = POOLINGS[kind]

    def step(x, w):
        flow, rows = tap(x * 2, pooling)
        return (layer_norm(flow, (D,)) @ w).square().sum() + rows.square().sum()

    def run(f):
        x, w = rand(B, S, D).requires_grad_(), rand(D, D, seed=1).requires_grad_()
        f(x, w).backward()
        return x.grad, w.grad

    torch._dynamo.reset()
    assert_same(run(torch.compile(step, fullgraph=True, backend="aot_eager")), run(step))
