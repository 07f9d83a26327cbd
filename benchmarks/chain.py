"""A chain of cheap layers whose outputs are compared, on their tokens or their [CLS] rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alpkd_fast import alp_loss
from alpkd_fast.capture import HiddenStates

from . import measure
from .cases import Case
from .providers import einsum


def chain_runs(case: Case, device: torch.device, keep: bool = False) -> dict[str, measure.Run]:
    """Forward and backward of m layers whose outputs are compared, and one behind them; with ``keep`` each gradient of
    these outputs is held by a hook until the run ends. [CLS] rows are also had through the tap."""
    shape = (case.batch, case.seq, case.D)
    x, above, *teacher = (torch.randn(shape, device=device) for _ in range(2 + case.n))
    rows_of = (lambda h: h[:, 0]) if case.pooling == "cls" else (lambda h: h.flatten(0, -2))
    teacher_rows = [rows_of(t) for t in teacher]
    kept: list[Tensor] = []

    def make_chain() -> nn.Sequential:
        chain = nn.Sequential(*(nn.LayerNorm(case.D) for _ in range(case.m + 1))).to(device)
        for layer in chain[1:] if keep else ():
            layer.register_forward_pre_hook(lambda _, inputs: inputs[0].register_hook(kept.append) and None)
        return chain

    plain = make_chain()

    def forward():
        h, found = x, []
        for layer in plain:
            found.append(layer(h))
            # What flows on is another tensor, as behind the tap: without the views the allocator places the backward's
            # buffers otherwise, which by itself is worth a millisecond and has nothing to do with the loss.
            h = found[-1].view_as(found[-1])
        return found

    def backward(chain, last, loss=None):
        kept.clear()
        outputs, gradients = ([last], [above]) if loss is None else ([last, loss], [above, None])
        result = torch.autograd.grad(outputs, list(chain.parameters()), gradients)
        kept.clear()
        return result

    def eager(_):
        *found, last = forward()
        return backward(plain, last, einsum(case, [rows_of(h) for h in found], teacher_rows, None))

    def fused(_):
        *found, last = forward()
        return backward(plain, last, alp_loss(found, teacher, pooling=case.pooling))

    runs = {
        "chain": lambda _: backward(plain, forward()[-1]),
        "chain + eager ALP": eager,
        "chain + fused ALP": fused,
    }
    if case.pooling == "token":
        return runs
    tapped = make_chain()
    names = [name for name, _ in tapped.named_children()][:-1]
    taken = HiddenStates(tapped, layers=names, pooling=case.pooling).__enter__()  # for good

    def through_the_tap(_):
        last = tapped(x)
        return backward(tapped, last, alp_loss(taken.take(), teacher_rows))

    return {**runs, f"chain + fused ALP, tap {'copying' if keep else 'in place'}": through_the_tap}
