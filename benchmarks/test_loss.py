"""The loss over tokens, and over [CLS] rows, against its rivals and the floor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from .cases import CLS, LOSS, POOLING, PROJECTION
from .runner import run_case

FORWARD, BOTH = "forward", "forward+backward"
QUICK = {("bert-base-6", "fp32"), ("bert-base-6", "bf16"), ("cls-6", "fp32")}


ON_GPU = torch.cuda.is_available()


def least_level(case: str, dtype: str, mode: str) -> str:
    """Quick: the main case. Default: BERT-base in fp32 and bf16, the other sizes once. Full: everything.

    On a CPU a rival takes most of a second for a call in bf16 or on a large case, so that only the main case has
    them by default.
    """
    if mode == BOTH and (case, dtype) in QUICK:
        return "quick"
    if not ON_GPU and (dtype == "bf16" or case == "bert-large-12" or mode == FORWARD):
        in_default = False
    elif case.startswith("bert-base"):
        in_default = dtype != "fp16" and (mode == BOTH or (case, dtype) == ("bert-base-6", "fp32"))
    elif case in CLS:
        in_default = mode == BOTH and case in ("cls-6", "cls-6-dense", "cls-6-pkd") and dtype == "fp32"
        in_default |= mode == BOTH and case == "cls-6" and dtype == "bf16" and ON_GPU
    else:
        large = ("decoder-16", "bert-large-12") if ON_GPU else ("decoder-16",)  # the sizes of the speed table
        in_default = mode == BOTH and dtype == ("bf16" if case in large else "fp32") and case != "bert-large-6"
    return "default" if in_default else "full"


def parameters(cases):
    return [
        pytest.param(case, dtype, mode, marks=pytest.mark.level(least_level(case, dtype, mode)))
        for case in cases for dtype in ("fp32", "bf16", "fp16") for mode in (BOTH, FORWARD)
    ]  # fmt: skip


def hand_over(rows, session, report):
    """Give the times of our best version to pytest-benchmark; the test fails if none of ours is right."""
    wrong = [f"{row.provider}: {row.status}" for row in rows if row.kind == "ours" and row.status.startswith("wrong")]
    assert not wrong, wrong
    mine = [row for row in rows if row.kind == "ours" and row.median_s and "graph" not in row.mode]
    best = min((row for row in mine if row.gradient == mine[0].gradient), key=lambda row: row.median_s)
    report(
        session.times[best.mode, best.gradient, best.provider],
        provider=best.provider, x_floor=best.x_floor, best_rival=best.best_rival, x_best_rival=best.x_best_rival,
    )  # fmt: skip


@pytest.mark.loss
@pytest.mark.parametrize(("case", "dtype", "mode"), parameters(LOSS))
def test_loss(case, dtype, mode, record, report, done):
    done(suite="loss", case=case, dtype=dtype, mode=mode, padding=0.0)
    hand_over(run_case(record, LOSS[case], dtype, mode), record, report)


@pytest.mark.loss
@pytest.mark.level("full")
@pytest.mark.parametrize("padding", [0.3, 0.6])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", LOSS)
def test_padding(case, dtype, padding, record, report, done):
    done(suite="loss", case=case, dtype=dtype, mode=BOTH, padding=padding)
    hand_over(run_case(record, replace(LOSS[case], padding=padding), dtype, BOTH), record, report)


@pytest.mark.cls
@pytest.mark.parametrize(("case", "dtype", "mode"), parameters(CLS))
def test_cls(case, dtype, mode, record, report, done):
    done(suite="cls", case=case, dtype=dtype, mode=mode)
    hand_over(run_case(record, CLS[case], dtype, mode), record, report)


@pytest.mark.pooling
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.level("full"))])
@pytest.mark.parametrize("case", ["mean-6", pytest.param("last-6", marks=pytest.mark.level("full"))])
def test_pooling(case, dtype, record, report, done):
    done(suite="pooling", case=case, dtype=dtype)
    hand_over(run_case(record, POOLING[case], dtype, BOTH), record, report)


@pytest.mark.projection
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.level("full"))])
@pytest.mark.parametrize(
    "case",
    [case if case == "projection-6" else pytest.param(case, marks=pytest.mark.level("full")) for case in PROJECTION],
)  # fmt: skip
def test_projection(case, dtype, record, report, done):
    done(suite="projection", case=case, dtype=dtype)
    hand_over(run_case(record, PROJECTION[case], dtype, BOTH), record, report)
