"""DistillationConfig: every choice of a distillation run that is not the Trainer's."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..layer_maps import KINDS
from ..problem import POOLINGS
from .methods import METHODS, Method

PROJECTIONS = ("auto", "none", "shared", "per-layer")
SIDES = ("teacher", "student")


@dataclass
class DistillationConfig:
    """The losses, the method and its options.

    The training loss is ``ce_weight * CE + kd_weight * KD + alp_weight * ALP``. CE and KD are means over the
    labelled targets and ALP is :func:`alpkd_fast.alp_loss`, each over the whole global batch: all
    accumulation steps and all ranks.

    Args:
        method: "kd" (no loss on hidden states), "pkd-skip", "pkd-last", "rail", "alp", "alp-no", "alp-po",
            "prefix" or "uniform".
        ce_weight: weight of the loss against the labels (cross-entropy; squared error for regression).
        kd_weight: weight of the loss against the teacher's logits: temperature² × KL(teacher ‖ student), or
            the squared error for regression.
        alp_weight: weight of the loss on hidden states.
        temperature: divides both sides' logits in KD.
        pooling: rows of the loss on hidden states: "cls", "mean", "last" or "token"; None for "token" where the
            student predicts tokens (language models, token classification), "last" for other decoders, else "cls".
        layer_map: overrides the method's: a kind of :func:`alpkd_fast.make_layer_map`, or one list of teacher
            layers per student layer, all counted from 0.
        scale: of the attention: None for 1/sqrt(D), or a float >= 0. "uniform" fixes it to 0.
        normalize: compare L2-normalised rows; None for the method's own form (PKD and RAIL-KD normalise).
        detach_attention: treat the attention as constant in the backward.
        layer_weights: one weight per student layer that takes part; None for 1 each.
        student_layers, teacher_layers: which layers take part, counted from 0 without the embeddings; None for
            all. The layer map then counts within them.
        drop_last_layer: leave the last student layer and its row of the map out; None for the method's own way
            (PKD leaves it out).
        learn_scale: learn the scale, starting at ``scale``.
        projection: between the widths: "auto" (one, where they differ), "none", "shared" (one) or "per-layer" (one
            per student layer that takes part).
        projected_side: "teacher" (φ, to the student's width) or "student" (to the teacher's width).
        projection_bias: whether the projection has a bias.
        teacher_batch_size: run the teacher on this many sequences at a time; its hidden states are freed after each
            part. The same loss and gradients. None for the whole batch.
        seed: of the random layer maps of "rail".
        backend: of :func:`alpkd_fast.alp_loss`.

    Raises:
        ValueError: a value that is not allowed; the message names it and what is.
    """

    method: str = "alp"
    ce_weight: float = 0.5
    kd_weight: float = 0.5
    alp_weight: float = 1.0
    temperature: float = 5.0
    pooling: str | None = None
    layer_map: str | list[list[int]] | None = None
    scale: float | None = None
    normalize: bool | None = None
    detach_attention: bool = False
    layer_weights: list[float] | None = None
    student_layers: list[int] | None = None
    teacher_layers: list[int] | None = None
    drop_last_layer: bool | None = None
    learn_scale: bool = False
    projection: str = "auto"
    projected_side: str = "teacher"
    projection_bias: bool = True
    teacher_batch_size: int | None = None
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        _one_of("method", self.method, tuple(METHODS))
        _one_of("projection", self.projection, PROJECTIONS)
        _one_of("projected_side", self.projected_side, SIDES)
        if self.pooling is not None:
            _one_of("pooling", self.pooling, POOLINGS)
        if self.layer_map is not None and METHODS[self.method].layer_map is None:
            raise ValueError(f"layer_map: method {self.method!r} uses no hidden states; leave it out, or use another")
        if isinstance(self.layer_map, str):
            _one_of("layer_map", self.layer_map, KINDS)
        for name in ("ce_weight", "kd_weight", "alp_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}; 0 leaves the loss out")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and > 0, got {self.temperature}")
        if self.scale is not None and not 0 <= self.scale < math.inf:
            raise ValueError(f"scale must be finite and >= 0, got {self.scale}; None stands for 1/sqrt(D)")
        size = self.teacher_batch_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(
                f"teacher_batch_size: got {size!r}; allowed are whole numbers >= 1, and None for the whole batch"
            )
        fixed = METHODS[self.method].scale
        if fixed is not None and self.scale not in (None, fixed):
            raise ValueError(f'scale: method {self.method!r} fixes it to {fixed:g}, got {self.scale}; use method "alp"')
        if fixed is not None and self.learn_scale:
            raise ValueError(f'learn_scale: method {self.method!r} fixes the scale to {fixed:g}; use method "alp"')
        if not self.uses_logits and not self.uses_hidden_states:
            raise ValueError("ce_weight, kd_weight and alp_weight leave no loss; set one of them above 0")

    @property
    def uses_hidden_states(self) -> bool:
        return self.alp_weight > 0 and self.resolved_layer_map is not None

    @property
    def uses_logits(self) -> bool:
        return self.ce_weight > 0 or self.kd_weight > 0

    @property
    def resolved_layer_map(self) -> str | list[list[int]] | None:
        """The layer map of the run; None for the method "kd"."""
        method = METHODS[self.method]
        return method.layer_map if method.layer_map is None or self.layer_map is None else self.layer_map

    @property
    def drops_last_layer(self) -> bool:
        return self._method.drops_last_layer if self.drop_last_layer is None else self.drop_last_layer

    @property
    def loss_options(self) -> dict[str, Any]:
        """Options of :class:`alpkd_fast.ALPLoss`; the rows come pooled, so its pooling is "token"."""
        method = self._method
        return {
            "scale": self.scale if method.scale is None else method.scale,
            "learn_scale": self.learn_scale,
            "normalize": method.normalize if self.normalize is None else self.normalize,
            "detach_attention": self.detach_attention,
            "layer_weights": self.layer_weights,
            "backend": self.backend,
        }

    @property
    def _method(self) -> Method:
        return METHODS[self.method]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; allowed are {', '.join(allowed)}")
