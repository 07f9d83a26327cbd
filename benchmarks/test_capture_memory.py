"""Peak memory by how the hidden states are had: of a frozen teacher's forward, and of a student's training step.

Each case runs in a process of its own, where large tensors are mapped apart: its peaks hold no freed memory.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import pytest
import torch

from . import measure
from .cases import Case

pytest.importorskip("alpkd_fast.capture", reason="alpkd_fast.capture is not there yet")

TEACHER = Case("teacher-12", n=12, m=12, D=768, batch=32)
STUDENT = Case("student-chain-6", n=12, m=6, D=768, batch=32, pooling="cls")
SLACK = 4 << 20  # scratch memory of the matrix products, which is not the same in each run


def teacher_runs(case: Case, device: torch.device) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Forwards of BERT-base without gradients; each returns the hidden states that it keeps."""
    from transformers import BertConfig, BertModel

    from alpkd_fast.capture import HiddenStates

    teacher = BertModel(BertConfig(num_hidden_layers=case.n)).to(device).eval().requires_grad_(False)
    tokens = torch.randint(1000, 30000, (case.batch, case.seq), device=device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def plain():
        teacher(**inputs)
        return []

    def captured(pooling):
        with HiddenStates(teacher, pooling=pooling) as states:
            teacher(**inputs)
            return states.take()

    return {
        "nothing kept": plain,
        "output_hidden_states=True": lambda: list(teacher(**inputs, output_hidden_states=True).hidden_states),
        **{f"HiddenStates, {pooling}": lambda p=pooling: captured(p) for pooling in ("token", "mean", "cls")},
    }


def teacher_peaks(case, device_name, answer):
    """Put (peak, bytes kept) of each forward."""
    measure.map_large_tensors()
    device = torch.device(device_name)
    with torch.no_grad():
        runs = teacher_runs(case, device)
        runs["HiddenStates, mean"]()  # loads the code
        for name, run in runs.items():
            kept: list[int] = []
            peak = measure.extra_bytes(lambda _, run=run: kept.append(measure.tensor_bytes(run())), device)  # noqa: B023
            answer.put((name, peak, kept[0]))


def student_peaks(case, device_name, answer):
    """Put (peak, 0) of each forward and backward."""
    from .chain import chain_runs

    measure.map_large_tensors()
    device = torch.device(device_name)
    for keep in (False, True):
        for name, run in chain_runs(case, device, keep).items():
            run(0)
            answer.put((name + ", gradients kept" * keep, measure.extra_bytes(run, device), 0))


def in_a_process(target, runs, case, record, mode):
    """Rows of the runs, and their peaks and bytes kept by name."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=target, args=(case, record.device.type, answer))
    process.start()
    found = dict((name, rest) for name, *rest in (answer.get(timeout=300) for _ in range(runs)))
    process.join()
    if any(peak is None for peak, _ in found.values()):
        pytest.skip("this system does not tell a process's peak memory")
    for name, (peak, _) in found.items():
        record.rows.append(record.row(case, "fp32", mode=mode, provider=name, kind="capture", extra_bytes=peak))
    return found


@pytest.mark.memory
def test_of_a_frozen_teacher(record, done):
    pytest.importorskip("transformers", reason="the teacher needs transformers")
    done(suite="memory", case=TEACHER.name)
    found = in_a_process(teacher_peaks, 5, TEACHER, record, "forward")
    layer, pooled = TEACHER.batch * TEACHER.seq * TEACHER.D * 4, TEACHER.batch * TEACHER.D * 4
    kept = {name: held for name, (_, held) in found.items()}
    assert kept == {
        "nothing kept": 0,
        "output_hidden_states=True": 13 * layer,
        "HiddenStates, token": 12 * layer,
        "HiddenStates, mean": 12 * pooled,
        "HiddenStates, cls": 12 * pooled,
    }
    peaks = {name: peak for name, (peak, _) in found.items()}
    assert peaks["HiddenStates, cls"] <= peaks["nothing kept"] + 12 * pooled + SLACK
    # Before its last block the model holds the states of 10 blocks that it no longer needs.
    assert peaks["output_hidden_states=True"] >= peaks["HiddenStates, cls"] + 10 * layer - SLACK


@pytest.mark.memory
def test_of_a_student(record, done):
    done(suite="memory", case=STUDENT.name)
    in_a_process(student_peaks, 8, STUDENT, record, "forward+backward")
