"""Compile the GPU kernels for cards that are not here, and check what came out: python -m alpkd_fast.kernels.check

Every variant goes through the launch code that training uses; only the launch itself is left out. Prints one line
per kernel. Variants of the speed table fail on any spill, local memory access, or global load under 16 bytes per
thread; the others fail where they exceed their entry of budget.json. --shrink lowers that file to what is reached.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..backends.triton import most_layers
from .cubin import Report, inspect_cubin, inspect_gcn

BUDGET = Path(__file__).with_name("budget.json")
# Bytes of shared memory that a program can have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Variant:
    """One call of the operator; lead is the leading shape, dtypes are student-teacher."""

    n: int
    m: int
    D: int
    dtypes: str = "bf16-bf16"
    lead: tuple[int, ...] = (64,)
    options: dict[str, Any] = field(default_factory=dict)
    table: bool = False

    @property
    def name(self) -> str:
        extra = "".join(f"-{key}" if value is True else f"-{key}={value}" for key, value in self.options.items())
        return f"n{self.n}-m{self.m}-D{self.D}-{self.dtypes}{extra}"


TABLE = [
    Variant(12, 6, 768, table=True),
    *(Variant(12, m, 768, dtypes, table=True) for m in (2, 4) for dtypes in ("bf16-bf16", "f32-f32")),
    Variant(24, 12, 1024, table=True),
    Variant(32, 16, 4096, table=True),
    Variant(12, 6, 768, "f32-f32", (32, 128), {"cls_views": True}, table=True),
    Variant(12, 6, 768, "bf16-bf16", (32, 128), {"cls_views": True}, table=True),
]
OTHERS = [
    Variant(12, 6, 768, "bf16-bf16", options={"mask": True}),
    Variant(12, 6, 768, "bf16-bf16", options={"teacher_grad": True}),
    Variant(12, 6, 768, "f32-f32"),
    Variant(12, 6, 768, "f32-f32", options={"teacher_grad": True, "scale_grad": True}),
    Variant(12, 6, 768, "f16-f16", options={"mask": True}),
    Variant(12, 6, 768, "f64-f64", options={"teacher_grad": True}),
    Variant(12, 6, 768, "f32-bf16"),
    Variant(12, 6, 768, "bf16-bf16", options={"normalize": True, "details": True}),
    Variant(12, 6, 768, "bf16-bf16", options={"detach": True}),
    Variant(12, 6, 768, "bf16-bf16", options={"no_grad": True}),
    Variant(12, 6, 768, "bf16-bf16", options={"map": True, "layer_weights": True}),
    Variant(12, 6, 768, "bf16-bf16", options={"unaligned": True}),
    Variant(12, 6, 768, "bf16-bf16", (4, 32), {"pooling": "last", "mask": True}),
    Variant(12, 6, 768, "bf16-bf16", (4, 32), {"pooling": "mean", "mask": True, "teacher_grad": True}),
    Variant(12, 4, 1000, "bf16-bf16"),
    Variant(12, 4, 312, "f32-f32"),
    Variant(24, 12, 1024, "f32-f32"),
    Variant(64, 32, 768, "bf16-bf16"),
    Variant(64, 32, 768, "f32-f32", options={"teacher_grad": True}),
    Variant(128, 64, 768, "bf16-bf16"),
    Variant(128, 64, 768, "f32-f32", options={"teacher_grad": True}),
]


@dataclass
class Compiled:
    variant: Variant
    kernel: str
    target: str
    report: Report

    @property
    def key(self) -> str:
        return f"{self.target} {self.variant.name} {self.kernel}"

    @property
    def strict(self) -> bool:
        """Whether it must not spill, nor load hidden states in less than 16 bytes per thread."""
        return self.variant.table and self.kernel == "alp_kernel" and self.target.startswith("sm_")

    def problems(self, budget: dict[str, dict[str, int]]) -> list[str]:
        r = self.report
        if r.shared_bytes > SHARED[self.target]:
            return [f"{self.key}: {r.shared_bytes} B of shared memory, the card has {SHARED[self.target]}"]
        measured = {"spilled_bytes": r.spilled_bytes, "local_accesses": r.local_accesses,
                    "narrow_loads": r.narrow_loads}  # fmt: skip
        if self.strict:
            allowed = dict.fromkeys(measured, 0)
        else:
            allowed = budget.get(self.key)
            if allowed is None:
                return [f"{self.key}: no entry in {BUDGET.name}; run with --shrink to add it"]
        return [
            f"{self.key}: {measured[what]} {what}, allowed are {allowed[what]}"
            for what in measured
            if measured[what] > allowed[what]
        ]


def arguments_of(variant: Variant) -> tuple[Any, ...]:
    """The operator's arguments for a variant, with tensors on the CPU: only their shapes and addresses matter."""
    options = variant.options
    student_dtype, teacher_dtype = (DTYPES[name] for name in variant.dtypes.split("-"))
    offset = 1 if options.get("unaligned") else 0

    def layers(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
        shape = (*variant.lead, variant.D)
        size = torch.Size(shape).numel()
        made = [torch.zeros(size + offset, dtype=dtype)[offset:].view(shape) for _ in range(count)]
        return [h[:, 0] for h in made] if options.get("cls_views") else made

    student, teacher = layers(variant.m, student_dtype), layers(variant.n, teacher_dtype)
    lead = student[0].shape[:-1]
    mask = torch.ones(lead, dtype=torch.bool) if options.get("mask") else None
    per_student = variant.n // variant.m
    table = [list(range(i * per_student, (i + 1) * per_student)) for i in range(variant.m)]
    mapped = bool(options.get("map"))
    pooling = ("token", "cls", "last", "mean").index(options.get("pooling", "token"))
    scale_grad = bool(options.get("scale_grad"))
    return (
        student, teacher, mask, pooling,
        [len(layers) for layers in table] if mapped else [], [j for layers in table for j in layers] if mapped else [],
        torch.tensor(0.05) if scale_grad else None, variant.D**-0.5,
        [1.0 + i for i in range(variant.m)] if options.get("layer_weights") else [],
        bool(options.get("normalize")), bool(options.get("detach")), True, None, 0.0, bool(options.get("details")),
        [not options.get("no_grad")] * variant.m, [bool(options.get("teacher_grad"))] * variant.n, scale_grad,
    )  # fmt: skip


class _Driver:
    """Stands in for the driver of a card that is not here: names it, so that kernels are compiled for it."""

    def __init__(self, target: Any, index: int) -> None:
        self.target, self.index = target, index

    def get_current_device(self) -> int:
        return self.index  # Triton keeps one cache of kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextmanager
def compiling_for(target: Any, index: int, found: Callable[[str, Any], None]) -> Any:
    """Within it, launches compile for the target, hand the kernel to ``found`` and run nothing."""
    from triton.runtime import JITFunction, driver

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        found(self.fn.__name__, kernel)
        return kernel

    JITFunction.run = compile_only
    driver.set_active(_Driver(target, index))
    try:
        yield
    finally:
        JITFunction.run = run
        driver.set_active(None)  # the next launch looks for the real one


def targets(names: list[str]) -> dict[str, Any]:
    from triton.backends.compiler import GPUTarget

    return {
        name: GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)
        for name in names
    }


def compile_variant(variant: Variant, name: str, target: Any, index: int) -> list[Compiled]:
    """Every kernel that the variant launches, forward and backward, compiled for the target."""
    from .launch import alp, scale_gradients

    compiled = []

    def found(kernel: str, binary: Any) -> None:
        if name.startswith("sm_"):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "kernel.cubin"
                path.write_bytes(binary.asm["cubin"])
                (report,) = inspect_cubin(path, binary.metadata.shared).values()
        else:
            report = inspect_gcn(binary.asm["amdgcn"], binary.metadata.shared)
        compiled.append(Compiled(variant, kernel, name, report))

    with compiling_for(target, index, found):
        arguments = arguments_of(variant)
        loss, _, _, _, factor, _, d_student, d_teacher = alp(*arguments)
        _, _, row_weights, pooling, *_ = arguments
        scale_gradients([*d_student, *d_teacher], loss, factor, pooling, row_weights)
    return compiled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="only the speed table's variants, for sm_90")
    parser.add_argument("--all", action="store_true", help="every variant for every target")
    parser.add_argument("--target", action="append", choices=SHARED, help="may be repeated")
    parser.add_argument("--match", default="", help="only variants whose name contains this")
    parser.add_argument("--shrink", action="store_true", help="write budget.json: add new entries, lower old ones")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing is compiled under the interpreter; unset it")
    default = ["sm_90"] if options.table or not options.all else list(SHARED)
    variants = [v for v in (TABLE if options.table else TABLE + OTHERS) if options.match in v.name]
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    problems, figures = [], []
    for index, (name, target) in enumerate(targets(options.target or default).items()):
        for variant in variants:
            most_m, most_n = most_layers(SHARED[name])
            if variant.m > most_m or variant.n > most_n:
                print(
                    f"{name} {variant.name}: refused by the backend, over {most_m} student or {most_n} teacher layers"
                )
                continue
            start = time.perf_counter()
            try:
                compiled = compile_variant(variant, name, target, index)
            except Exception as error:
                problems.append(f"{name} {variant.name}: does not compile: {type(error).__name__}: {error}")
                print(f"{name} {variant.name}: does not compile", flush=True)
                continue
            print(f"{name} {variant.name}  ({time.perf_counter() - start:.1f} s)", flush=True)
            for c in compiled:
                print(f"    {c.kernel:16s}{c.report.row()}", flush=True)
                figures.append({"target": name, "variant": variant.name, "kernel": c.kernel, **c.report.as_dict()})
                if options.shrink and not c.strict:
                    _shrink(budget, c)
                problems += c.problems(budget)
    if options.shrink:
        BUDGET.write_text(json.dumps(dict(sorted(budget.items())), indent=1) + "\n")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    for problem in problems:
        print(f"FAILED {problem}", file=sys.stderr)
    print(f"{len(figures)} kernels, {len(problems)} problems")
    return 1 if problems else 0


def _shrink(budget: dict[str, dict[str, int]], compiled: Compiled) -> None:
    r = compiled.report
    reached = {"spilled_bytes": r.spilled_bytes, "local_accesses": r.local_accesses, "narrow_loads": r.narrow_loads}
    old = budget.get(compiled.key, reached)
    budget[compiled.key] = {what: min(value, old[what]) for what, value in reached.items()}


if __name__ == "__main__":
    sys.exit(main())
