"""Peak memory by how the hidden states are had: of a frozen teacher's forward, and of a student's training step."""

from __future__ import annotations

import pytest
import torch

from . import measure
from .cases import Case
from .peaks import SLACK, peaks

pytest.importorskip("alpkd_fast.capture", reason="alpkd_fast.capture is not there yet")

TEACHER = Case("teacher-12", n=12, m=12, D=768, batch=32)
STUDENT = Case("student-chain-6", n=12, m=6, D=768, batch=32, pooling="cls")


def teacher_runs(case: Case, device: torch.device) -> dict[str, measure.Run]:
    """Forwards without gradients of BERT-base, with small feed-forward layers to save time; each returns the hidden
    states that it keeps."""
    from transformers import BertConfig, BertModel

    from alpkd_fast.capture import HiddenStates

    config = BertConfig(num_hidden_layers=case.n, intermediate_size=case.D)
    teacher = BertModel(config).to(device).eval().requires_grad_(False)
    tokens = torch.randint(1000, 30000, (case.batch, case.seq), device=device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    @torch.no_grad()
    def asked(_):
        return teacher(**inputs, output_hidden_states=True).hidden_states

    @torch.no_grad()
    def captured(pooling):
        with HiddenStates(teacher, pooling=pooling) as states:
            teacher(**inputs)
            return states.take()

    @torch.no_grad()
    def plain(_):
        teacher(**inputs)

    captured("mean")  # loads the code
    return {
        "nothing kept": plain,
        "output_hidden_states=True": asked,
        "HiddenStates, token": lambda _: captured("token"),
        "HiddenStates, mean": lambda _: captured("mean"),
        "HiddenStates, cls": lambda _: captured("cls"),
    }


def student_runs(case: Case, device: torch.device) -> dict[str, measure.Run]:
    from .chain import chain_runs

    runs = {f"{name}{', gradients kept' * keep}": run
            for keep in (False, True) for name, run in chain_runs(case, device, keep).items()}  # fmt: skip
    for run in runs.values():
        run(0)
    return runs


def add_rows(record, case, mode, found):
    for name, (peak, _) in found.items():
        record.rows.append(record.row(case, "fp32", mode=mode, provider=name, kind="capture", extra_bytes=peak))


@pytest.mark.memory
def test_of_a_frozen_teacher(record, done):
    pytest.importorskip("transformers", reason="the teacher needs transformers")
    done(suite="memory", case=TEACHER.name)
    found = peaks(teacher_runs, TEACHER, record.device)
    add_rows(record, TEACHER, "forward", found)
    layer, pooled = TEACHER.batch * TEACHER.seq * TEACHER.D * 4, TEACHER.batch * TEACHER.D * 4
    assert {name: kept for name, (_, kept) in found.items()} == {
        "nothing kept": 0,
        "output_hidden_states=True": 13 * layer,
        "HiddenStates, token": 12 * layer,
        "HiddenStates, mean": 12 * pooled,
        "HiddenStates, cls": 12 * pooled,
    }
    asked, cls = found["output_hidden_states=True"].peak, found["HiddenStates, cls"].peak
    assert cls <= found["nothing kept"].peak + 12 * pooled + SLACK
    # The peak is inside the last block, where the states of 10 blocks are kept that the model itself no longer needs.
    assert asked >= cls + 10 * layer - SLACK


@pytest.mark.memory
def test_of_a_student(record, done):
    done(suite="memory", case=STUDENT.name)
    found = peaks(student_runs, STUDENT, record.device)
    add_rows(record, STUDENT, "forward+backward", found)
    through_the_tap = found["chain + fused ALP, tap in place"].peak
    rows = (STUDENT.n + 2 * STUDENT.m) * STUDENT.batch * STUDENT.D * 4
    assert through_the_tap <= found["chain"].peak + rows + SLACK
