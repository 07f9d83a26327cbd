"""alp_loss: arguments in, loss out. Validation is in problem.py, the work in the backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

from torch import Tensor

from . import backends
from .problem import Layers, make_problem
from .projection import project_teacher


class ALPOutput(NamedTuple):
    """What ``alp_loss(..., return_details=True)`` returns; all but ``loss`` are detached.

    Attributes:
        loss: () the loss, of dtype promote_types(student, teacher, float32).
        layer_losses: (m,) each student layer's share of the loss; they sum to it.
        attention: (m, ..., n) the weights over the teacher layers, with the leading shape after
            pooling; zeros on rows of weight 0, for student layers of weight 0, and outside the layer map.
        entropy: (m,) mean entropy of the attention over the rows, weighted like the rows, in nats.
    """

    loss: Tensor
    layer_losses: Tensor
    attention: Tensor
    entropy: Tensor


@overload
def alp_loss(
    student_hidden_states: Layers,
    teacher_hidden_states: Layers,
    attention_mask: Tensor | None = ...,
    *,
    pooling: str = ...,
    layer_map: str | Tensor | Sequence[Sequence[int]] = ...,
    scale: float | Tensor | None = ...,
    normalize: bool = ...,
    detach_attention: bool = ...,
    layer_weights: Sequence[float] | Tensor | None = ...,
    proj_weight: Tensor | None = ...,
    proj_bias: Tensor | None = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    return_details: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def alp_loss(
    student_hidden_states: Layers,
    teacher_hidden_states: Layers,
    attention_mask: Tensor | None = ...,
    *,
    pooling: str = ...,
    layer_map: str | Tensor | Sequence[Sequence[int]] = ...,
    scale: float | Tensor | None = ...,
    normalize: bool = ...,
    detach_attention: bool = ...,
    layer_weights: Sequence[float] | Tensor | None = ...,
    proj_weight: Tensor | None = ...,
    proj_bias: Tensor | None = ...,
    reduction: str = ...,
    normalizer: float | Tensor | None = ...,
    return_details: Literal[True],
    backend: str = ...,
) -> ALPOutput: ...
def alp_loss(
    student_hidden_states: Layers,
    teacher_hidden_states: Layers,
    attention_mask: Tensor | None = None,
    *,
    pooling: str = "token",
    layer_map: str | Tensor | Sequence[Sequence[int]] = "all",
    scale: float | Tensor | None = None,
    normalize: bool = False,
    detach_attention: bool = False,
    layer_weights: Sequence[float] | Tensor | None = None,
    proj_weight: Tensor | None = None,
    proj_bias: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    return_details: bool = False,
    backend: str = "auto",
) -> Tensor | ALPOutput:
    """Attention-based layer projection loss (ALP-KD) between student and teacher hidden states.

    Each student layer attends over the teacher layers of the same row with a softmax of scaled dot
    products; the teacher layers, combined with those weights, are its regression target::

        a_ij = softmax_j(scale * <s_i, t_j>)
        loss = sum_i w_i sum_r mu_r ||s_i - sum_j a_ij t_j||^2 / (m * D * sum_r mu_r)

    Args:
        student_hidden_states: m tensors (..., D_s) or one stacked tensor (m, ..., D_s); float16, bfloat16,
            float32 or float64, one dtype per side. None entries are dropped, then indices count from 0.
            Embeddings are not dropped: pass ``hidden_states[1:]``.
        teacher_hidden_states: n tensors (..., D_t) or one stacked tensor, with the same leading shape.
        attention_mask: (...) exactly the leading shape; bool, integers, or non-negative row weights mu. A row
            of weight 0 is never read, and its gradient is exactly 0. Not differentiable.
        pooling: "token": every row counts. "cls": index 0 of dim -2, with the weight of index 0. "last": the
            last position of non-zero weight; counts 1. "mean": the weighted mean over dim -2; counts 1, or 0
            where all weights are 0. All but "token" need (..., S, D).
        layer_map: which teacher layers a student layer may attend to: "all" (ALP-KD), "no-overlap" (ALP-NO),
            "partial-overlap" (ALP-PO), "prefix", "skip" (PKD-skip), "last" (PKD-last), a bool tensor (m, n)
            on the CPU, or m sequences of teacher indices; see :func:`make_layer_map`.
        scale: factor of the dot products: None for 1/sqrt(D), a float >= 0, or a 0-dim tensor, which gets its
            gradient if it requires one. On real 12-layer encoders 1/sqrt(D) leaves the attention close to
            uniform (2.06 to 2.48 of at most ln 12 = 2.48 nats), 1.0 nearly picks one layer (0.00 to 0.53
            nats); 0 is the uniform average. Log the entropy of ``return_details`` when choosing.
        normalize: compare L2-normalised student and combined rows (PKD's form); scores use the raw rows.
        detach_attention: treat the attention as constant in the backward.
        layer_weights: (m,) constants >= 0, one per student layer; the normalizer does not change, a layer of
            weight 0 is skipped.
        proj_weight: (D_s, D_t), or (m, D_s, D_t) for one per student layer: projects teacher rows as
            ``torch.nn.functional.linear`` does. Required where the widths differ.
        proj_bias: (D_s,) or (m, D_s), only with proj_weight.
        reduction: "mean" divides by m * D * sum(mu); "sum" by 1.
        normalizer: replaces sum(mu), counted in pooled rows, for gradient accumulation and data parallel:
            float or 0-dim tensor > 0, constant. Only with reduction="mean".
        return_details: return an :class:`ALPOutput` instead of the loss.
        backend: "auto", "cpu" (fused C++ kernel), "cuda", "triton", or "reference" (plain PyTorch, differentiable
            twice). The environment's ALPKD_FAST_BACKEND replaces "auto".

    Returns:
        The 0-dim loss of dtype promote_types(student, teacher, float32), or an :class:`ALPOutput`.
        Gradients have each input's dtype.

    Raises:
        ValueError, TypeError: an argument that is not allowed; the message names it and the remedy. Values that lie
            on a GPU are looked at only with ALPKD_FAST_CHECK=1, which waits for it.
        RuntimeError: an explicit backend that cannot run; the message says why.

    Source: Passban, Wu, Rezagholizadeh, Liu, "ALP-KD: Attention-Based Layer Projection for Knowledge
    Distillation", AAAI 2021, arXiv 2012.14022, equations 3 to 6.
    """
    problem = make_problem(
        student_hidden_states,
        teacher_hidden_states,
        attention_mask,
        pooling,
        layer_map,
        scale,
        normalize,
        detach_attention,
        layer_weights,
        reduction,
        normalizer,
        return_details,
        proj_weight is not None,
    )
    if proj_weight is None and proj_bias is None:
        loss, layer_losses, attention, entropy = backends.choose(backend, problem).run(problem)
    else:
        loss, layer_losses, attention, entropy = project_teacher(problem, proj_weight, proj_bias, backend)
    return ALPOutput(loss, layer_losses, attention, entropy) if return_details else loss
