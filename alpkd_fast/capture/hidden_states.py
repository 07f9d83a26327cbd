"""HiddenStates: collects a model's hidden states, already pooled, while it runs its own forward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..problem import POOLINGS
from ..reference import last_position
from .blocks import find_blocks, unwrap
from .tap import Pooling, tap


class HiddenStates:
    """Collect the hidden states of ``model`` by forward hooks, pooled to the rows that the loss needs.

    Inside the ``with`` block every forward of the model is collected; :meth:`take` hands over the last one's::

        with HiddenStates(teacher, pooling="cls") as t, HiddenStates(student, pooling="cls") as s:
            for batch in loader:
                with torch.no_grad():
                    teacher(**batch)
                outputs = student(**batch)
                loss = outputs.loss + alp_loss(s.take(), t.take(), s.row_weights)

    The rows are pooled already, so ``alp_loss`` keeps its default pooling. With pooling="token" they equal
    ``model(..., output_hidden_states=True).hidden_states[1:]``. Of a model that needs no gradient only the rows
    are kept, each layer's tokens can be freed as the model moves on; for one that does, the rows' gradient is
    added into the gradient from above without a dense zero tensor.

    Args:
        model: a transformers encoder or decoder, with or without a task head, also inside
            DistributedDataParallel, FSDP or torch.compile; or any module, with ``layers`` as module names.
        layers: indices of blocks, from 0, negative ones from the end; or names of modules whose output (or the
            first element of it) is a hidden state (..., S, D); None for every block.
        pooling: "token", "cls", "last" or "mean", as in :func:`alpkd_fast.alp_loss`.
        attention_mask: the name of the model's argument that holds the mask (batch, S), or the mask. Without
            a mask every token counts 1.
        final_norm: take the last block's hidden state after the backbone's final norm (GPT-2, Llama, ModernBERT),
            as transformers does; False for the raw block output.

    Attributes:
        row_weights: the weights of the last forward's rows for ``alp_loss``: (batch, S) for "token", else
            (batch,); None where the model was given no mask.

    A compiled model has to be compiled, that is to run for the first time, inside the block: torch.compile does not
    look for hooks again. Its gradients are added by the compiled graph, not in place.

    Raises:
        ValueError, TypeError: an argument that is not allowed, or blocks that cannot be told.
        RuntimeError: ``take`` without a complete forward; gradients lost to reentrant checkpointing.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | Sequence[str] | None = None,
        pooling: str = "token",
        attention_mask: str | Tensor = "attention_mask",
        final_norm: bool = True,
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: got {pooling!r}; known poolings are {', '.join(POOLINGS)}")
        self.model, prefix = unwrap(model)
        self.blocks, norm = find_blocks(self.model, layers, final_norm, prefix)
        self._final_norm = list(self.blocks).index(norm) if norm in self.blocks else None
        self.pooling = pooling
        self.row_weights: Tensor | None = None
        self._mask_argument = attention_mask
        self._mask_position = self._position_of_mask(attention_mask) if isinstance(attention_mask, str) else None
        self._mask: Tensor | None = None
        self._pooled: Pooling | None = None
        self._rows: list[tuple[int, Tensor]] = []  # (index of the block, its rows)
        self._without_grad: set[int] = set()
        self._running = False
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> HiddenStates:
        if self._handles:
            raise RuntimeError("HiddenStates: this object is active already; make a second one for a nested block")
        self._handles = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward),
            *(block.register_forward_hook(partial(self._collect, i)) for i, block in enumerate(self.blocks.values())),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self) -> list[Tensor]:
        """Return the last forward's rows, one tensor per layer, and let go of them.

        (..., S, D) for "token", else (..., D), each on its layer's device. Their dtype is the layers'; where these
        differ, it is the one that all of them promote to. "mean" is computed and kept in at least float32.
        """
        names = list(self.blocks)
        missing = sorted(set(range(len(names))) - {index for index, _ in self._rows})
        if not self._rows:
            raise RuntimeError(
                f"HiddenStates: no forward of {type(self.model).__name__} ran inside the with block since the last "
                "take(); run the model first, and take() once after each forward; a model that torch.compile has "
                "compiled before the with block does not see it: enter the block first, or call torch.compiler.reset()"
            )
        if missing:
            raise RuntimeError(
                f"HiddenStates: {names[missing[0]]} did not run in the last forward; leave it out of layers, or see "
                "why the forward ended early"
            )
        rows = [rows for _, rows in sorted(self._rows, key=lambda entry: entry[0])]
        self._rows = []
        # Of a bf16 GPT-2 under CUDA's autocast only the final norm gives float32; the loss takes one dtype per model.
        dtype = reduce(torch.promote_types, (h.dtype for h in rows))
        return [h.to(dtype) for h in rows]

    def _position_of_mask(self, name: str) -> int | None:
        parameters = inspect.signature(self.model.forward).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        if name not in parameters and not takes_any and name != "attention_mask":
            raise ValueError(
                f"attention_mask: {type(self.model).__name__}.forward has no argument {name!r}; it has "
                f"{', '.join(parameters)}"
            )
        return list(parameters).index(name) if name in parameters else None

    def _before_forward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _in_backward():  # a checkpointed forward is being recomputed
            return
        self._rows, self._without_grad, self._pooled, self._running = [], set(), None, True
        name, position = self._mask_argument, self._mask_position
        if isinstance(name, Tensor):
            self._mask = name
        elif name in kwargs or position is None or position >= len(args):
            self._mask = kwargs.get(name)
        else:
            self._mask = args[position]

    def _after_forward(self, *_: object) -> None:
        self._running = False

    def _collect(self, index: int, _: nn.Module, args: object, output: Any) -> Any:
        h = _hidden_state(output)
        if not self._running:
            # A part of the model is called by itself, or a checkpointed block is being recomputed. The first run's
            # graph has the tap, which saves no tensor, so the recomputation does without.
            if index in self._without_grad and h.requires_grad and _in_backward():
                raise RuntimeError(
                    f"HiddenStates: {list(self.blocks)[index]} is checkpointed with use_reentrant=True, which hides "
                    "its gradient from the loss; pass use_reentrant=False"
                )
            return None
        if not h.requires_grad:
            self._without_grad.add(index)
        if index == self._final_norm:  # NanoChat runs it in front of the blocks too
            self._rows = [entry for entry in self._rows if entry[0] != index]
        pooling = self._pooled = self._pooled.on(h.device) if self._pooled else self._prepare(h)
        if pooling.kind == "token":
            self._rows.append((index, h))
        elif h.requires_grad:
            flow, rows = tap(h, pooling)
            self._rows.append((index, rows))
            return _with_hidden_state(output, flow)
        else:
            self._rows.append((index, pooling.rows(h)))
        return None

    def _prepare(self, h: Tensor) -> Pooling:
        """Set this forward's row weights and return its pooling; ``h`` is its first hidden state."""
        if self.pooling != "token" and h.dim() < 3:
            raise ValueError(f"pooling={self.pooling!r} needs hidden states (..., S, D), got {tuple(h.shape)}")
        mask = self._mask
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != h.shape[:-1]):
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask: got {got}, the hidden states need one weight per token, {tuple(h.shape[:-1])}; pass "
                "attention_mask=the tokenizer's mask to HiddenStates"
            )
        mask = None if mask is None else mask.to(h.device)
        self.row_weights, pooling = _pooling(self.pooling, mask, h)
        return pooling


def _pooling(kind: str, mask: Tensor | None, h: Tensor) -> tuple[Tensor | None, Pooling]:
    """Return the rows' weights and the pooling of hidden states like ``h`` (..., S, D)."""
    if kind in ("token", "cls"):
        weights = mask if mask is None or kind == "token" else mask[..., 0]
        return weights, Pooling(kind)
    if kind == "last":
        if mask is None:
            return None, Pooling(kind, h.new_full(h.shape[:-2], h.shape[-2] - 1, dtype=torch.int64))
        return (mask != 0).any(-1), Pooling(kind, last_position(mask != 0))
    dtype = torch.promote_types(h.dtype, torch.float32)
    weights = h.new_ones(h.shape[:-1], dtype=dtype) if mask is None else mask.to(dtype)
    total = weights.sum(-1, keepdim=True)
    share = weights / torch.where(total != 0, total, 1.0)
    return None if mask is None else total.squeeze(-1) != 0, Pooling(kind, share)


def _hidden_state(output: Any) -> Tensor:
    """The hidden state of a block's output: itself, or the first element of a tuple or a ModelOutput."""
    if isinstance(output, Tensor):
        return output
    first = output
    if isinstance(output, (tuple, list)):
        first = output[0]
    elif isinstance(output, Mapping):
        first = next(iter(output.values()))
    if not isinstance(first, Tensor):
        raise TypeError(
            f"layers: a block returned {type(first).__name__}; name modules that return a hidden state (..., S, D), "
            "or a tuple that begins with one"
        )
    return first


def _with_hidden_state(output: Any, h: Tensor) -> Any:
    """The same output with its hidden state replaced."""
    if isinstance(output, Tensor):
        return h
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)
        changed[next(iter(output))] = h
        return changed
    rest = (h, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
