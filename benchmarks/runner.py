"""Runs one case: check every provider against float64, time those that are right in turns, return the rows."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import alpkd_fast

from . import measure, providers
from .cases import DTYPES, Case, Inputs, make_inputs
from .floor import Machine
from .providers import Provider
from .results import RIVALS, Row

OTHER_GRADIENT = 0.37
FP16_LOSS_SCALE = 65536.0  # without it most fp16 gradients are zero, whoever computes them


LEVELS = {"quick": (0.5, 3), "default": (1.0, 3), "full": (3.0, 9)}  # seconds and least rounds of each provider
# Forms that take so long in eager mode, and are so far from the best, that only a full run times them.
SLOWEST = ("broadcast", "pairs", "gathered pairs")
LEFT_OUT = {"quick": SLOWEST, "default": SLOWEST, "full": ()}


@dataclass
class Session:
    """One run of the benchmarks."""

    device: torch.device
    level: str
    seconds: float
    rounds: int
    machine: Machine
    stamp: Row  # the fields of the run, to be completed
    ours_only: bool = False
    note: str = ""  # added to the mode of every row
    rows: list[Row] = field(default_factory=list)  # of this run
    times: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)  # by mode, gradient, provider

    def row(self, case: Case, dtype: str, mode: str = "", **values: object) -> Row:
        return replace(
            self.stamp, case=case.name, m=case.m, n=case.n, D=case.D, rows=case.rows, valid_rows=case.valid_rows,
            padding=case.padding, dtype=dtype, threads=torch.get_num_threads(),
            mode=mode + self.note, **values,
        )  # fmt: skip


def run(provider: Provider, inputs: Sequence[Inputs], backward: bool, gradient: Tensor | None) -> measure.Run:
    """The call to time: the loss, and its gradients to every student layer; no incoming gradient means 1."""

    def call(k: int) -> object:
        given = inputs[k % len(inputs)]
        if not backward:
            with torch.no_grad():
                return provider.loss(given)
        loss = provider.loss(given)
        return loss.detach(), torch.autograd.grad(loss, given.leaves, gradient)

    return call


@dataclass
class Truth:
    """Loss and gradients in float64 by the reference backend, a few sequences (or rows) at a time."""

    loss: float
    gradients: list[Tensor]

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> Truth:
        weight = None if inputs.projection is None else inputs.projection.detach().double().requires_grad_()
        step = max(1, (8 << 20) // ((case.n + case.m) * inputs.teacher[0][0].numel()))
        loss, parts = 0.0, []
        for begin in range(0, case.batch, step):
            some = slice(begin, begin + step)
            student = [h.detach()[some].double().requires_grad_() for h in inputs.student]
            part = alpkd_fast.alp_loss(
                student, [h[some].double() for h in inputs.teacher],
                None if inputs.weights is None else inputs.weights[some],
                pooling=case.pooling, layer_map=case.layer_map, scale=case.scale, normalize=case.normalize,
                proj_weight=weight, normalizer=float(case.valid_rows), backend="reference",
            )  # fmt: skip
            parts.append(torch.autograd.grad(part, student if weight is None else [*student, weight]))
            loss += part.item()
        *layers, last = zip(*parts, strict=True)
        if weight is None:
            return cls(loss, [torch.cat(layer) for layer in (*layers, last)])
        return cls(loss, [*(torch.cat(layer) for layer in layers), sum(last)])

    def errors(self, loss: Tensor, gradients: Sequence[Tensor]) -> tuple[float, float]:
        """Relative errors of the loss, and of the worst gradient tensor in the Frobenius norm."""
        worst = max(float((g - true).norm() / true.norm()) for g, true in zip(gradients, self.gradients, strict=True))
        return abs(loss.item() - self.loss) / abs(self.loss), worst if worst == worst else math.inf


def sum_error(case: Case, dtype: torch.dtype) -> float:
    """Relative error that rounding in sums of D terms explains, magnified by the scale inside the softmax."""
    scale = 1 / math.sqrt(case.D) if case.scale is None else case.scale
    return (1 + scale * math.sqrt(case.D)) * math.sqrt(case.D) * torch.finfo(dtype).eps


class Checker:
    """Says whether a provider is right on the benchmark's own input.

    Allowed is twice the error of the first rival, which is the definition written plainly in that dtype, plus one
    rounding to the dtype and the rounding of sums in fp32. That form itself may be wrong by the rounding of sums in
    the dtype.
    """

    def __init__(self, case: Case, dtype: torch.dtype, inputs: Inputs):
        self.case, self.inputs = case, inputs
        scale = FP16_LOSS_SCALE if dtype == torch.float16 else 1.0
        self.gradient = torch.tensor(scale, device=inputs.student[0].device)
        self.truth = Truth.of(case, inputs)
        plain = providers.rivals(case)[0]
        self.allowed = (sum_error(case, dtype),) * 2
        floor = torch.finfo(dtype).eps + sum_error(case, torch.float32)
        *_, reason = self(plain)
        if reason is not None:
            raise AssertionError(f"{case.name}: the plain form {plain.name} is {reason}")
        self.allowed = tuple(2 * e + floor for e in self.last)  # type: ignore[assignment]

    def __call__(self, provider: Provider) -> tuple[float, float, str | None]:
        """Return the gradient's error, what was allowed, and None or what is wrong."""
        loss, gradients = run(provider, [self.inputs], True, self.gradient)(0)  # type: ignore[misc]
        factor = float(self.gradient)
        self.last = self.truth.errors(loss, [g.double() / factor for g in gradients])
        for what, error, allowed in zip(("loss", "gradient"), self.last, self.allowed, strict=True):
            if not error <= allowed:
                return self.last[1], self.allowed[1], f"wrong: {what} off by {error:.2g}, allowed {allowed:.2g}"
        return self.last[1], self.allowed[1], None


@dataclass
class Candidate:
    """A provider that was checked, and what is known of it."""

    provider: Provider
    error: float
    tolerance: float
    compile_s: float | None = None


def check_all(
    session: Session, case: Case, dtype: str, mode: str, inputs: list[Inputs]
) -> tuple[list[Candidate], list[Row]]:
    """The providers that are right on this input, and a row for each that cannot be timed."""
    torch._dynamo.reset()  # what other cases compiled; not between the forms, which are timed together
    checker = Checker(case, DTYPES[dtype], inputs[0])
    right: list[Candidate] = []
    refused: list[Row] = []

    def refuse(name: str, kind: str, status: str, **values: object) -> None:
        refused.append(session.row(case, dtype, mode, provider=name, kind=kind, status=status, **values))

    def consider(provider: Provider, compile_s: float | None = None) -> None:
        try:
            error, tolerance, reason = checker(provider)
        except torch.OutOfMemoryError:
            refuse(provider.name, provider.kind, "skipped: out of memory")
            return
        if reason is None:
            right.append(Candidate(provider, error, tolerance, compile_s))
        else:
            refuse(provider.name, provider.kind, reason, error=error, tolerance=tolerance)

    mine, reasons = providers.ours(case, session.device)
    for name, reason in reasons.items():
        refuse(name, "ours", f"skipped: {reason}")
    for provider in mine:
        try:
            consider(provider)
        except RuntimeError as error:
            if "cannot run" not in str(error):
                raise
            refuse(provider.name, "ours", f"skipped: {error}")
    if session.ours_only:
        return right, refused
    forms = [form for form in providers.rivals(case) if form.name not in LEFT_OUT[session.level]]
    for form in forms:
        consider(form)
    for name, how in forms_to_compile(session, case, dtype, mode):
        compiled = providers.compiled(case, name, how)
        start = time.perf_counter()
        try:
            run(compiled, inputs, mode != "forward", None)(0)
        except Exception as error:  # whatever the compiler raises, the run goes on
            refuse(compiled.name, "compiled", f"skipped: does not compile, {type(error).__name__}")
        else:
            consider(compiled, time.perf_counter() - start)
    return right, refused


def forms_to_compile(session: Session, case: Case, dtype: str, mode: str) -> list[tuple[str, str | None]]:
    """Forms and compile modes. A full run compiles every form; a default run those that may be the best."""
    names = list(providers.rival_forms(case))
    if session.level == "full":
        modes: list[str | None] = [None]
        if session.device.type == "cuda":
            modes.append("max-autotune-no-cudagraphs")  # graphs would copy the rotated inputs; [CLS] has its own
        return [(name, how) for name in names for how in modes]
    if session.level == "quick" or mode == "forward" or case.pooling != "token" or case.teacher_dim:
        return []
    return [(name, None) for name in names if name in best_compiled(case, dtype, session.device)]


def best_compiled(case: Case, dtype: str, device: torch.device) -> tuple[str, ...]:
    """The best forms under torch.compile, as full runs show on a CPU (on AMD others than on Intel: its matrix products
    are slow); on a GPU the better of the two that were tried: for [CLS] rows, and for few and many pairs of layers. For
    hundreds of pairs the form with a product for each takes minutes to compile."""
    few = case.pairs <= 100
    if case.views:
        return ("broadcast",) if device.type == "cuda" else ("broadcast", "public A", "public B", "PKD")
    if device.type == "cuda":
        return ("pairs",) if few else ("einsum",)
    if dtype == "fp32":
        return ("einsum", "broadcast", "pairs") if case.pairs <= 30 else ("einsum", "broadcast")
    return ("bmm", "pairs") if few else ("bmm", "einsum")


def run_case(session: Session, case: Case, dtype: str, mode: str) -> list[Row]:
    """Check, time and describe every provider on the case; the rows are also kept in the session."""
    case = case.on(session.device)
    backward = mode != "forward"
    inputs = make_inputs(case, DTYPES[dtype], session.device, measure.cache_bytes(session.device))
    right, rows = check_all(session, case, dtype, mode, inputs)
    one = "65536" if dtype == "fp16" else "1"
    rows += time_all(session, case, dtype, mode, one, right, inputs)
    if backward and dtype != "fp16" and not case.teacher_dim:  # beside a projection's products one pass is nothing
        timed = [row for row in rows if row.status == "ok"]
        best = timed[0].best_rival if timed else ""
        again = [c for c in right if c.provider.kind == "ours" or c.provider.name == best]
        rows += time_all(session, case, dtype, mode, str(OTHER_GRADIENT), again, inputs)
    if case.views and session.device.type == "cuda":
        rows += time_all(session, case, dtype, f"{mode} (CUDA graph)", one, right, inputs)
    session.rows += rows
    return rows


def time_all(
    session: Session, case: Case, dtype: str, mode: str, gradient: str, right: list[Candidate], inputs: list[Inputs]
) -> list[Row]:
    """Time the candidates in turns; one row each."""
    backward = mode != "forward"
    incoming = None if gradient == "1" else torch.tensor(float(gradient), device=session.device)
    runs = {c.provider.name: run(c.provider, inputs, backward, incoming) for c in right}
    rows: list[Row] = []
    in_graph = "CUDA graph" in mode
    if in_graph:
        for c in right:
            try:
                runs[c.provider.name] = measure.as_cuda_graph(runs[c.provider.name], len(inputs))
            except RuntimeError as error:
                status = f"skipped: not captured, {error}".splitlines()[0]
                rows.append(session.row(case, dtype, mode, gradient=gradient, provider=c.provider.name,
                                        kind=c.provider.kind, status=status))  # fmt: skip
                del runs[c.provider.name]
        right = [c for c in right if c.provider.name in runs]
    disturbance = measure.Disturbance()
    cold = case.views and session.device.type == "cpu"  # on a GPU the processor's time is hidden behind the forward
    times = measure.take_turns(runs, session.device, session.seconds, session.rounds, cold)
    kind = DTYPES[dtype]
    read, written = case.bytes_moved(kind, backward)
    operations = case.operations(backward)
    floor, bound = session.machine.floor(read, written, operations, kind)
    disturbed = max(disturbance.share(), session.machine.disturbed)
    for c in right:
        on_device, wall = times[c.provider.name]
        session.times[mode + session.note, gradient, c.provider.name] = on_device
        median, iqr = measure.median_iqr(on_device)
        call = runs[c.provider.name]
        rows.append(session.row(
            case, dtype, mode, gradient=gradient, provider=c.provider.name, kind=c.provider.kind,
            error=c.error, tolerance=c.tolerance, compile_s=c.compile_s,
            disturbed=disturbed, rounds=len(wall), median_s=median, iqr_s=iqr, wall_s=measure.median_iqr(wall)[0],
            bytes_read=read, bytes_written=written, operations=operations,
            bandwidth=(read + written) / session.machine.stream_seconds(read, written),
            copy_bandwidth=session.machine.copy_bandwidth, peak=session.machine.peak(kind),
            floor_s=floor, floor_bound=bound, x_floor=median / floor, achieved=(read + written) / median,
            extra_bytes=None if in_graph else measure.extra_bytes(call, session.device),
            launches=measure.kernel_launches(call, session.device),
        ))  # fmt: skip
    compare(rows, by_wall=case.views)
    return rows


def compare(rows: list[Row], by_wall: bool) -> None:
    """Fill in the best rival and every row's speed-up over it; [CLS] rows are bound by launches: by wall time."""

    def seconds(row: Row) -> float:
        return (row.wall_s if by_wall else row.median_s) or math.inf

    opponents = [row for row in rows if row.kind in RIVALS and row.status == "ok"]
    if not opponents:
        return
    best = min(opponents, key=seconds)
    for row in (row for row in rows if row.status == "ok"):
        row.best_rival, row.x_best_rival = best.provider, seconds(best) / seconds(row)
