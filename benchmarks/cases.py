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
    """Student (m layers) and teacher (n layers) of width D over ``batch`` sequences of ``seq`` tokens.

    rows: "token" takes every token; "cls" takes views h[:, k] of (batch, seq, D) storage as inputs; "cls-dense"
    differentiates through the view down to h, with the dense zero gradient that this makes.
    """

    name: str
    n: int
    m: int
    D: int
    batch: int
    seq: int = 128
    gpu_batch: int | None = None  # a GPU needs more rows to be busy
    rows: str = "token"
    scale: float | None = None
    normalize: bool = False
    layer_map: str = "all"
    padding: float = 0.0  # share of the tokens whose row weight is 0

    def on(self, device: torch.device) -> Case:
        return self if device.type == "cpu" else replace(self, batch=self.gpu_batch or self.batch)

    @property
    def tokens(self) -> int:
        """Rows that the loss is given, padding included."""
        return self.batch * self.seq if self.rows == "token" else self.batch

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
        return int(self.lengths().sum()) if self.rows == "token" else self.batch

    def bytes_moved(self, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
        """Bytes read (every valid row once) and written (every element of every gradient once)."""
        row = self.D * dtype.itemsize
        gradient_rows = self.batch * self.seq if self.rows == "cls-dense" else self.tokens
        return (self.n + self.m) * self.valid_rows * row, self.m * gradient_rows * row * backward

    def operations(self, backward: bool) -> int:
        """Two (forward) or four passes of one multiply-add per pair and column."""
        return (8 if backward else 4) * self.pairs * self.valid_rows * self.D


_LOSS = [
    Case("bert-base-6", n=12, m=6, D=768, batch=32, gpu_batch=128),
    Case("bert-base-4", n=12, m=4, D=768, batch=32, gpu_batch=128),
    Case("bert-base-2", n=12, m=2, D=768, batch=32, gpu_batch=128),
    Case("bert-large-12", n=24, m=12, D=1024, batch=32, gpu_batch=64),
    Case("bert-large-6", n=24, m=6, D=1024, batch=32, gpu_batch=64),
    Case("minilm-6", n=12, m=6, D=384, batch=32, gpu_batch=128),
    Case("decoder-16", n=32, m=16, D=4096, batch=4, gpu_batch=32),
]
_CLS = [
    Case("cls-6", n=12, m=6, D=768, batch=32, rows="cls"),
    Case("cls-4", n=12, m=4, D=768, batch=32, rows="cls"),
    Case("cls-2", n=12, m=2, D=768, batch=32, rows="cls"),
    Case("cls-6-dense", n=12, m=6, D=768, batch=32, rows="cls-dense"),
    Case("cls-6-scale-1", n=12, m=6, D=768, batch=32, rows="cls", scale=1.0),
    Case("cls-6-pkd", n=12, m=6, D=768, batch=32, rows="cls", normalize=True, layer_map="skip"),
]
LOSS = {case.name: case for case in _LOSS}
CLS = {case.name: case for case in _CLS}


@dataclass
class Inputs:
    """One set of inputs: m student tensors that require grad, n teacher tensors, row weights or None."""

    student: list[Tensor]
    teacher: list[Tensor]
    weights: Tensor | None


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, cache_bytes: int) -> list[Inputs]:
    """Sets of random inputs to rotate through, so that no call finds its own in a cache of ``cache_bytes``."""
    generator = torch.Generator(device).manual_seed(7)
    shape = (case.batch, case.seq, case.D)

    def layers(count: int, common: Tensor) -> list[Tensor]:
        noise = torch.empty(shape, device=device)
        return [(common + noise.normal_(generator=generator)).to(dtype) for _ in range(count)]

    def storage() -> tuple[list[Tensor], list[Tensor]]:
        common = 0.3 * torch.randn(shape, generator=generator, device=device)  # layers resemble each other
        return layers(case.m, common), layers(case.n, common)

    read, written = case.bytes_moved(dtype, backward=True)
    sets = max(2, math.ceil(3 * cache_bytes / (read + written)))
    if case.rows == "cls":  # other positions of the same storage are other rows
        student, teacher = storage()
        return [
            Inputs([h[:, k].requires_grad_() for h in student], [h[:, k] for h in teacher], None)
            for k in range(min(sets, case.seq))
        ]
    weights = None
    if case.padding:
        weights = torch.arange(case.seq, device=device) < case.lengths().to(device)[:, None]  # (batch, seq)
    return [
        Inputs([h.requires_grad_() for h in student], teacher, weights)
        for student, teacher in (storage() for _ in range(sets))
    ]
