"""The named cases, their inputs, and what each costs at least: bytes, operations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alpkd_fast import make_layer_map

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """Student (m layers of width D) and teacher (n layers) over ``batch`` sequences of ``seq`` tokens.

    views: the loss is given [CLS] rows as views h[:, k] of (batch, seq, D) storage, and the gradients stop at the
    views. With pooling="cls" they go down to h, and so through the dense zero gradient.
    """

    name: str
    n: int
    m: int
    D: int
    batch: int
    seq: int = 128
    gpu_batch: int | None = None  # a GPU needs more rows to be busy
    teacher_dim: int | None = None  # width of the teacher where a projection takes it to D
    projections: int = 1  # one for all student layers, or m
    pooling: str = "token"
    views: bool = False
    scale: float | None = None
    normalize: bool = False
    layer_map: str = "all"
    padding: float = 0.0  # share of the tokens whose row weight is 0

    def on(self, device: torch.device) -> Case:
        return self if device.type == "cpu" else replace(self, batch=self.gpu_batch or self.batch)

    @property
    def rows(self) -> int:
        """Rows of the loss, padding included."""
        return self.batch if self.views or self.pooling != "token" else self.batch * self.seq

    @property
    def pairs(self) -> int:
        """Pairs of a student layer and a teacher layer that it attends to."""
        return sum(len(layers) for layers in make_layer_map(self.layer_map, self.m, self.n))

    def lengths(self) -> Tensor:
        """(batch,) valid tokens per sequence: (1 - padding) * seq on average, spread by a quarter around it."""
        mean = round(self.seq * (1 - self.padding))
        spread = min(mean - 1, self.seq - mean, mean // 4)
        return mean + (torch.arange(self.batch) % 3 - 1) * spread if spread > 0 else torch.full((self.batch,), mean)

    @property
    def valid_rows(self) -> int:
        return self.batch if self.rows == self.batch else int(self.lengths().sum())

    def bytes_moved(self, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
        """Bytes read (every row that the loss needs once) and written (every element of every gradient once)."""
        read_rows = self.valid_rows if self.pooling != "mean" else int(self.lengths().sum())
        gradient_rows = self.batch if self.views else self.batch * self.seq
        teacher_dim = self.teacher_dim or self.D
        projection = self.projections * self.D * teacher_dim if self.teacher_dim else 0
        read = (self.n * teacher_dim + self.m * self.D) * read_rows + projection
        written = (self.m * self.D * gradient_rows + projection) * backward
        return read * dtype.itemsize, written * dtype.itemsize

    def operations(self, backward: bool) -> int:
        """Two (forward) or four passes of one multiply-add per pair and column, and the projection's products:
        of the n teacher layers (of each pair with m projections), or of the m queries, whichever is less."""
        products = 0
        if self.teacher_dim:
            projected = self.n if self.projections == 1 else self.pairs
            products = min((2 if backward else 1) * projected, (6 if backward else 2) * self.m) * self.teacher_dim
        return 2 * self.valid_rows * self.D * ((4 if backward else 2) * self.pairs + products)


_LOSS = [
    Case("bert-base-6", n=12, m=6, D=768, batch=32, gpu_batch=128),
    Case("bert-base-4", n=12, m=4, D=768, batch=32, gpu_batch=128),
    Case("bert-base-2", n=12, m=2, D=768, batch=32, gpu_batch=128),
    Case("bert-large-12", n=24, m=12, D=1024, batch=32, gpu_batch=64),
    Case("bert-large-6", n=24, m=6, D=1024, batch=32, gpu_batch=64),
    Case("minilm-6", n=12, m=6, D=384, batch=32, gpu_batch=128),
    Case("decoder-16", n=32, m=16, D=4096, batch=2, gpu_batch=32),
]
_CLS = [
    Case("cls-6", n=12, m=6, D=768, batch=32, views=True),
    Case("cls-4", n=12, m=4, D=768, batch=32, views=True),
    Case("cls-2", n=12, m=2, D=768, batch=32, views=True),
    Case("cls-6-dense", n=12, m=6, D=768, batch=32, pooling="cls"),
    Case("cls-6-scale-1", n=12, m=6, D=768, batch=32, views=True, scale=1.0),
    Case("cls-6-pkd", n=12, m=6, D=768, batch=32, views=True, normalize=True, layer_map="skip"),
]
_POOLING = [
    Case("mean-6", n=12, m=6, D=768, batch=32, gpu_batch=128, pooling="mean", padding=0.3),
    Case("last-6", n=12, m=6, D=768, batch=32, gpu_batch=128, pooling="last", padding=0.3),
]
_PROJECTION = [
    Case("projection-6", n=12, m=6, D=384, batch=32, gpu_batch=128, teacher_dim=768),
    Case("projection-4", n=12, m=4, D=384, batch=32, gpu_batch=128, teacher_dim=768),
    Case("projection-2", n=12, m=2, D=384, batch=32, gpu_batch=128, teacher_dim=768),
    Case("projection-2-square", n=12, m=2, D=768, batch=32, gpu_batch=128, teacher_dim=768),
    Case("projection-6-each", n=12, m=6, D=384, batch=32, gpu_batch=128, teacher_dim=768, projections=6),
]
LOSS = {case.name: case for case in _LOSS}
CLS = {case.name: case for case in _CLS}
POOLING = {case.name: case for case in _POOLING}
PROJECTION = {case.name: case for case in _PROJECTION}


@dataclass
class Inputs:
    """m student tensors that require grad, n teacher tensors, row weights or None, a projection or None."""

    student: list[Tensor]
    teacher: list[Tensor]
    weights: Tensor | None = None
    projection: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return self.student if self.projection is None else [*self.student, self.projection]


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, cache_bytes: int) -> list[Inputs]:
    """Sets of random inputs to rotate through, so that no call finds its own in a cache of ``cache_bytes``."""
    generator = torch.Generator(device).manual_seed(7)

    def layers(count: int, width: int) -> list[Tensor]:  # (batch, seq, width), the layers resemble each other
        common = 0.3 * torch.randn(case.batch, case.seq, width, generator=generator, device=device)
        return [
            (common + torch.randn(common.shape, generator=generator, device=device)).to(dtype) for _ in range(count)
        ]

    teacher_dim = case.teacher_dim or case.D
    sets = max(2, math.ceil(3 * cache_bytes / sum(case.bytes_moved(dtype, backward=True))))
    if case.views:  # other positions of the same storage are other rows
        student, teacher = layers(case.m, case.D), layers(case.n, teacher_dim)
        return [
            Inputs([h[:, k].requires_grad_() for h in student], [h[:, k] for h in teacher])
            for k in range(min(sets, case.seq))
        ]
    weights = projection = None
    if case.padding:
        weights = torch.arange(case.seq, device=device) < case.lengths().to(device)[:, None]  # (batch, seq)
    if case.teacher_dim:
        leading = () if case.projections == 1 else (case.projections,)
        random = torch.randn(*leading, case.D, teacher_dim, generator=generator, device=device)
        projection = (random / math.sqrt(teacher_dim)).to(dtype).requires_grad_()
    return [
        Inputs([h.requires_grad_() for h in layers(case.m, case.D)], layers(case.n, teacher_dim), weights, projection)
        for _ in range(sets)
    ]
