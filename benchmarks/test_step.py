"""What the loss adds: to a whole training step, and to a chain of cheap layers."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from alpkd_fast import alp_loss

from . import measure
from .cases import Case
from .chain import chain_runs
from .peaks import Peak, peaks
from .providers import einsum
from .runner import Session
from .steps import MEMORY_SEQUENCES

capture = pytest.importorskip("alpkd_fast.capture", reason="alpkd_fast.capture is not there yet")

TEACHER_LAYERS, WIDTH, SEQ = 12, 768, 128
PART = 4  # sequences that the teacher runs on at a time


def add_rows(
    session: Session, case: Case, dtype: str, runs: dict[str, measure.Run], rounds: int, found: dict[str, Peak]
) -> None:
    """Time the runs in turns; the first is the one that the others add the loss to. IQR is that of what a run adds."""
    disturbance = measure.Disturbance()
    times = measure.take_turns(runs, session.device, 0.0, rounds)
    disturbed = disturbance.share()
    base, _ = next(iter(times.values()))
    for name, (seconds, wall) in times.items():
        added = [t - b for t, b in zip(seconds, base, strict=True)]
        _, iqr = measure.median_iqr(added if any(added) else base)
        session.rows.append(session.row(
            case, dtype, mode="forward+backward", provider=name, kind="step", rounds=len(seconds),
            median_s=statistics.median(seconds), iqr_s=iqr, wall_s=statistics.median(wall), disturbed=disturbed,
            added_s=statistics.median(added), extra_bytes=found[name].peak if found else None,
        ))  # fmt: skip


def bert(layers: int, device: torch.device) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the training step needs transformers")
    torch.manual_seed(layers)
    return transformers.BertForSequenceClassification(transformers.BertConfig(num_hidden_layers=layers)).to(device)


def training_steps(case: Case, device: torch.device) -> dict[str, measure.Run]:
    """One optimizer step on random tokens: KD alone, with the loss in eager PyTorch, with ours on captured states, and
    for tokens with ours on a part of the teacher's at a time.
    """
    teacher, student = bert(case.n, device).eval().requires_grad_(False), bert(case.m, device).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)
    tokens = torch.randint(1000, 30000, (case.batch, case.seq), device=device)
    labels = torch.randint(0, 2, (case.batch,), device=device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def models(**options):
        with torch.no_grad():
            target = teacher(**inputs, **options)
        return student(**inputs, **options), target

    def step(loss_of):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # at the end, so that a step's peak memory holds all gradients

    def kd(output, teacher_logits):
        soft = kl_div(output.logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="batchmean")
        return cross_entropy(output.logits, labels) + soft

    def alone():
        output, target = models()
        return kd(output, target.logits)

    def eager():
        output, target = models(output_hidden_states=True)
        take = (lambda h: h[:, 0]) if case.pooling == "cls" else (lambda h: h.flatten(0, -2))
        rows = ([take(h) for h in given.hidden_states[1:]] for given in (output, target))
        return kd(output, target.logits) + einsum(case, *rows, None)

    def fused():
        with (
            capture.HiddenStates(teacher, pooling=case.pooling) as teacher_states,
            capture.HiddenStates(student, pooling=case.pooling) as student_states,
        ):
            output, target = models()
            return kd(output, target.logits) + alp_loss(
                student_states.take(), teacher_states.take(), student_states.row_weights
            )

    def fused_in_parts():
        with capture.HiddenStates(teacher) as teacher_states, capture.HiddenStates(student) as student_states:
            output = student(**inputs)
            parts = zip(*(h.split(PART) for h in student_states.take()), strict=True)
            rows, logits, alp = inputs["attention_mask"].sum(), [], 0.0
            for start, student_part in zip(range(0, case.batch, PART), parts, strict=True):
                part = {name: value[start : start + PART] for name, value in inputs.items()}
                with torch.no_grad():
                    logits.append(teacher(**part).logits)
                alp += alp_loss(student_part, teacher_states.take(), part["attention_mask"], normalizer=rows)
            return kd(output, torch.cat(logits)) + alp

    forms = {"KD": alone, "KD + eager ALP": eager, "KD + fused ALP": fused}
    if case.pooling == "token" and case.batch > PART:
        forms[f"KD + fused ALP, teacher in parts of {PART}"] = fused_in_parts
    return {name: lambda _, form=form: step(form) for name, form in forms.items()}


def warm_training_steps(case: Case, device: torch.device) -> dict[str, measure.Run]:
    runs = training_steps(case, device)
    for run in runs.values():  # makes the optimizer's state, loads the code
        run(0)
    return runs


@pytest.mark.step
@pytest.mark.parametrize("pooling", ["token", "cls"])
@pytest.mark.parametrize(
    "m", [pytest.param(6, marks=pytest.mark.level("full")), pytest.param(4, marks=pytest.mark.level("full")), 2]
)
def test_step(m, pooling, record, done):
    done(suite="step", case=f"step-{m}-{pooling}")
    # On two cores a step of 32 sequences takes most of ten seconds; a default run there takes 4.
    batch = 4 if record.device.type == "cpu" and record.level != "full" else 32
    case = Case(f"step-{m}-{pooling}", n=TEACHER_LAYERS, m=m, D=WIDTH, batch=batch, seq=SEQ, pooling=pooling)
    dtype = "fp32" if record.device.type == "cpu" else "bf16"
    # With fewer sequences the peak is in the optimizer's step, whatever the loss takes.
    found = peaks(warm_training_steps, case, record.device) if batch >= MEMORY_SEQUENCES else {}
    add_rows(record, case, dtype, training_steps(case, record.device), 9 if record.level == "full" else 4, found)


@pytest.mark.step
def test_tokens_in_a_chain(record, done):
    """What the loss on tokens adds, where no matrix products of a model hide it in their noise."""
    done(suite="step", case="chain-6-token")
    case = Case("chain-6-token", n=TEACHER_LAYERS, m=6, D=WIDTH, batch=32, seq=SEQ)
    add_rows(record, case, "fp32", chain_runs(case, record.device), 30 if record.level == "full" else 10, {})


@pytest.mark.step
@pytest.mark.parametrize("gradients", ["sole", "kept"])
def test_cls_in_a_chain(gradients, record, done):
    """What the loss on [CLS] rows adds to the forward and backward of a chain of layers, by how it gets the rows.

    The gradient that comes to a hidden state from above has no other holder ("sole"), so the tap adds in place; or a
    hook keeps it, as those do that log gradients ("kept"), and the tap has to copy.
    """
    name = "chain-6-cls" if gradients == "sole" else "chain-6-cls-kept"
    done(suite="step", case=name)
    case = Case(name, n=TEACHER_LAYERS, m=6, D=WIDTH, batch=32, seq=SEQ, pooling="cls")
    runs = chain_runs(case, record.device, keep=gradients == "kept")
    copies = [measure.copies(run, (case.batch, case.seq, case.D)) for run in runs.values()]
    assert copies == [0, 0, 0, case.m if gradients == "kept" else 0], copies
    add_rows(record, case, "fp32", runs, 100 if record.level == "full" else 40, {})
