"""The operator: its schema, fake and registration, and the autograd.Function around it.

One schema serves every fused backend: ``alpkd_fast::alp_<backend>`` computes, in one pass over the
hidden states, the loss and its gradients. The backward only scales those by the incoming gradient.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .layer_maps import counts_and_layers
from .problem import POOLINGS, Problem
from .reference import last_position, row_index

_SCHEMA = (
    "(Tensor[] student, Tensor[] teacher, Tensor? row_weights, int pooling, int[] map_counts, int[] map_layers,"
    " Tensor? scale_tensor, float scale, float[] layer_weights, bool normalize, bool detach_attention,"
    " bool mean, Tensor? normalizer_tensor, float normalizer, bool details,"
    " bool[] student_grad, bool[] teacher_grad, bool scale_grad)"
    " -> (Tensor loss, Tensor layer_losses, Tensor attention, Tensor entropy,"
    " Tensor grad_factor, Tensor d_scale, Tensor[] d_student, Tensor[] d_teacher)"
)
FUSED_BACKENDS = ("cpu", "triton", "cuda")
LIBRARY = torch.library.Library("alpkd_fast", "DEF")
for _name in FUSED_BACKENDS:
    LIBRARY.define(f"alp_{_name}{_SCHEMA}")
# gradients *= factor * grad_factor in place, in one launch that does nothing where the product is 1; with pooling "cls"
# and "last" only the one row of a sequence that is not zeros, which for "last" the row weights decide
SCALING_BACKENDS = ("triton", "cuda")
for _name in SCALING_BACKENDS:
    LIBRARY.define(
        f"scale_gradients_{_name}(Tensor(a!)[] gradients, Tensor factor, Tensor? grad_factor=None,"
        " int pooling=0, Tensor? row_weights=None) -> ()"
    )
    torch.library.register_fake(f"alpkd_fast::scale_gradients_{_name}", lambda *_: None, lib=LIBRARY)


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def _fake(
    student: list[Tensor],
    teacher: list[Tensor],
    row_weights: Tensor | None,
    pooling: int,
    map_counts: list[int],
    map_layers: list[int],
    scale_tensor: Tensor | None,
    scale: float,
    layer_weights: list[float],
    normalize: bool,
    detach_attention: bool,
    mean: bool,
    normalizer_tensor: Tensor | None,
    normalizer: float,
    details: bool,
    student_grad: list[bool],
    teacher_grad: list[bool],
    scale_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    m, n = len(student), len(teacher)
    dtype = compute_dtype(student[0], teacher[0])
    rows = student[0].shape[:-1] if POOLINGS[pooling] == "token" else student[0].shape[:-2]
    new = student[0].new_empty
    return (
        new((), dtype=dtype),
        new((m,), dtype=dtype),
        new((m, *rows, n) if details else (0,), dtype=dtype),
        new((m,) if details else (0,), dtype=dtype),
        new((), dtype=dtype),
        new((), dtype=dtype),
        fake_gradients(student, student_grad),
        fake_gradients(teacher, teacher_grad),
    )


def fake_gradients(layers: list[Tensor], wanted: list[bool]) -> list[Tensor]:
    return [h.new_empty(h.shape) for h, w in zip(layers, wanted, strict=True) if w]


for _name in FUSED_BACKENDS:
    torch.library.register_fake(f"alpkd_fast::alp_{_name}", _fake, lib=LIBRARY)


def _load_binary(name: str, cause: str, switch: str) -> str | None:
    """Load a compiled library, which registers its kernels; return why it cannot be, or None."""
    found = sorted(Path(__file__).parent.glob(f"{name}.*so"))
    if not found:
        return (
            f"the compiled library is missing: at installation no {cause} was found, or it failed; with one, install "
            f"again under {switch}=1, which makes a failure an error that says why"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"the compiled library does not load with torch {torch.__version__}, which must be >= 2.10: {error}"
    return None


# By backend. The CUDA library needs no driver to load.
_BINARY_PROBLEMS = {
    "cpu": _load_binary("_C", "C++ compiler (g++ >= 11 or clang >= 14)", "ALPKD_FAST_CPU"),
    "cuda": _load_binary("_C_cuda", "nvcc (the CUDA toolkit)", "ALPKD_FAST_CUDA"),
}


def binary_problem(backend: str = "cpu") -> str | None:
    """Why the backend's compiled library cannot be used, with the remedy; None where it can."""
    return _BINARY_PROBLEMS[backend]


def fused_loss(backend: str, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a fused backend on the problem; return loss, layer_losses, attention and entropy."""
    m = len(problem.student)
    scale, normalizer = problem.scale, problem.normalizer
    scale_tensor = scale if isinstance(scale, Tensor) else None
    normalizer_tensor = normalizer if isinstance(normalizer, Tensor) else None
    options = (
        problem.row_weights,
        POOLINGS.index(problem.pooling),
        *counts_and_layers(problem.layer_map),
        0.0 if scale_tensor is not None else scale,
        [] if problem.layer_weights is None else list(problem.layer_weights),
        problem.normalize,
        problem.detach_attention,
        problem.reduction == "mean",
        normalizer_tensor,
        0.0 if normalizer is None or normalizer_tensor is not None else normalizer,
        problem.details,
    )
    layers = [*problem.student, *problem.teacher]
    if not torch.is_grad_enabled():  # autograd tells its functions what requires a gradient, not whether it is on
        layers = [h.detach() if h.requires_grad else h for h in layers]
        scale_tensor = None if scale_tensor is None else scale_tensor.detach()
    if torch.compiler.is_compiling():  # which takes no tensor twice, but a layer may be given twice: aliases
        layers = [h.view_as(h) for h in layers]
    inputs = (backend, m, options, scale_tensor, *layers)
    parts: tuple[Tensor, Tensor, Tensor, Tensor]
    try:
        parts = _FusedLoss.apply(*inputs)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        # The operator checks values, and C++ can only raise RuntimeError: "function, file:line, message".
        refused = re.search(r":\d+, ((?:attention_mask|scale|normalizer) .*)", str(error))
        if refused is not None:
            raise ValueError(refused[1]) from None
        _explain(error, [*layers, problem.row_weights, scale, normalizer])
        raise
    return parts


def _explain(error: RuntimeError, inputs: list[Any]) -> None:
    """Raise an error with a remedy for what PyTorch refuses to hand to an operator, or return."""
    if any(type(x).__name__ == "DTensor" for x in inputs):
        raise TypeError(
            "alp_loss: got a DTensor; pass x.to_local() where rows are sharded, with the sum of all ranks' row weights "
            "as normalizer, and x.full_tensor() where columns are"
        ) from error
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "alp_loss: the fused backends do not run under torch.func (grad, vmap, jvp, ...); call "
            'alp_loss(..., backend="reference")'
        ) from error


class _FusedLoss(torch.autograd.Function):
    """Loss and gradients in the forward; the backward scales the gradients by the incoming one."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, m: int, options: tuple[Any, ...], scale_tensor: Tensor | None, *layers: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row_weights, pooling, map_counts, map_layers, *rest = options
        _, _, _, scale_grad, *wanted = ctx.needs_input_grad
        operator = getattr(torch.ops.alpkd_fast, f"alp_{backend}").default
        loss, layer_losses, attention, entropy, grad_factor, d_scale, d_student, d_teacher = operator(
            layers[:m], layers[m:], row_weights, pooling, map_counts, map_layers, scale_tensor, *rest,
            wanted[:m], wanted[m:], scale_grad,
        )  # fmt: skip
        ctx.mark_non_differentiable(layer_losses, attention, entropy)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.pooling = backend, pooling
        ctx.row_weights = None
        if (
            POOLINGS[pooling] == "last"
            and row_weights is not None
            and any(wanted)
            and not torch.compiler.is_compiling()
        ):
            # A copy: the caller may change its mask before the backward.
            ctx.row_weights = row_weights.clone(memory_format=torch.contiguous_format)
        ctx.scale_dtype = None if scale_tensor is None else scale_tensor.dtype
        ctx.save_for_backward(grad_factor, d_scale, *d_student, *d_teacher)
        return loss, layer_losses, attention, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_factor, d_scale, *stored = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if grad_loss is None:
            return (None,) * len(wanted)
        gradients = _scaled(ctx, stored, grad_loss, grad_factor)
        if wanted[3]:
            gradients = [(d_scale * grad_loss).to(ctx.scale_dtype), *gradients]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = forbid_second_derivative(gradients)
        remaining = iter(gradients)
        return None, None, None, *(next(remaining) if w else None for w in wanted[3:])


def _scaled(ctx: Any, stored: list[Tensor], grad_loss: Tensor, grad_factor: Tensor) -> list[Tensor]:
    """Multiply the stored gradients by the incoming gradient and the factor left out of fp16 storage.

    Outside a compiled graph, for a single incoming gradient, and only while the graph is being freed (a kept one
    needs the stored tensors again), they are handed over as they are where the factor is 1, and multiplied in
    place where it is not. Where one token of a sequence is compared, the gradients of the others are zeros: no
    pass over them. On a GPU one launch reads the factor there and ends at once if it is 1.
    """
    single = not torch.compiler.is_compiling() and not is_batched(grad_loss)
    freed = single and not torch._C._autograd._get_current_graph_task_keep_graph()
    if freed and stored and ctx.backend in SCALING_BACKENDS:
        scale = getattr(torch.ops.alpkd_fast, f"scale_gradients_{ctx.backend}").default
        # Only fp16 leaves out a factor; without one there is one number less to wait for.
        left_out = grad_factor if any(g.dtype == torch.float16 for g in stored) else None
        scale(stored, grad_loss, left_out, ctx.pooling, ctx.row_weights)
        return stored
    factor = grad_loss * grad_factor
    has_value = single and factor.device.type == "cpu" and type(factor) is Tensor  # a fake tensor has none
    if not has_value:
        return [(g * factor).to(g.dtype) if g.dtype == factor.dtype else (g.to(factor.dtype) * factor).to(g.dtype)
                for g in stored]  # fmt: skip
    value = factor.item()
    if not freed:
        return [g * value for g in stored]
    if value != 1.0:
        _multiply(stored, value, POOLINGS[ctx.pooling], ctx.row_weights)
    return stored


def is_batched(gradient: Tensor) -> bool:
    """Whether it stands for several: under torch.vmap, or autograd.grad(..., is_grads_batched=True), the older one."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)


def _multiply(stored: list[Tensor], value: float, pooling: str, row_weights: Tensor | None) -> None:
    """Multiply in place, on the CPU."""
    if pooling == "last" and row_weights is not None:
        index = row_index(last_position(row_weights != 0))
        for g in stored:
            g[index] *= value
        return
    if pooling in ("cls", "last"):
        stored = [g.select(-2, 0 if pooling == "cls" else -1) for g in stored]
    for g in stored:
        g.mul_(value)


def forbid_second_derivative(gradients: list[Tensor]) -> list[Tensor]:
    """Return the gradients as tensors whose differentiation raises."""
    anchor = torch.zeros((), requires_grad=True)
    return list(_NotTwiceDifferentiable.apply(anchor, *gradients))  # type: ignore[no-untyped-call]


class _NotTwiceDifferentiable(torch.autograd.Function):
    """Passes gradients on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "alp_loss: the fused backends compute first derivatives only; to differentiate the gradient, call "
            'alp_loss(..., backend="reference")'
        )
