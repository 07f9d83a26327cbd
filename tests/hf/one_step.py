"""The gradient and the logged loss of one optimizer step, however its global batch is cut. Run by torchrun too."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from tiny import bert, make_tokenizer, masked_lm, sentences
from transformers import DataCollatorWithPadding, TrainerCallback, TrainingArguments

from alpkd_fast.hf import DistillationConfig, DistillationTrainer, student_from_teacher
from alpkd_fast.hf.data import encode
from alpkd_fast.hf.tasks import TASKS

GLOBAL_BATCH = 8
CASES: dict[str, dict[str, Any]] = {
    "cls": {"method": "alp"},
    "mean-projected": {"method": "alp-po", "pooling": "mean", "hidden_size": 16},
    "token-projected": {"method": "alp-no", "pooling": "token", "hidden_size": 16},
    "last-per-layer": {"method": "uniform", "pooling": "last", "hidden_size": 16, "projection": "per-layer"},
    "student-projected": {"method": "alp", "hidden_size": 16, "projected_side": "student", "learn_scale": True},
    "pkd": {"method": "pkd-skip", "pooling": "cls"},
    "mlm": {"method": "alp", "mlm": True, "hidden_size": 16},
    "teacher-in-parts": {"method": "alp-po", "pooling": "token", "hidden_size": 16, "teacher_batch_size": 1},
    "half-padding": {"method": "alp", "pooling": "token", "hidden_size": 16, "padding_from": GLOBAL_BATCH // 2},
}


class KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


class PaddingCollator:
    """Pads, and turns the rows that say so into rows of nothing but padding, without a label."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        rows = [dict(row) for row in rows]
        empty = torch.tensor([row.pop("position_ids") for row in rows], dtype=torch.bool)
        batch = self.pad(rows)
        batch["attention_mask"][empty] = 0
        batch["labels"][empty] = -100
        return batch


class TokenLabels:
    """Pads, and asks for every third token."""

    def __init__(self, tokenizer: Any) -> None:
        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.pad([{k: v for k, v in row.items() if k not in ("labels", "position_ids")} for row in rows])
        labels = batch["input_ids"].clone()
        keep = (torch.arange(labels.shape[1]) % 3 == 1) & (batch["attention_mask"] == 1)
        labels[~keep] = -100
        batch["labels"] = labels
        return batch


def one_step(
    case: str, batch_size: int, accumulation: int, folder: Path, **changes: Any
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    options = {**CASES[case], **changes}
    hidden_size, mlm = options.pop("hidden_size", None), options.pop("mlm", False)
    padding_from, compiler = options.pop("padding_from", GLOBAL_BATCH), options.pop("torch_compile_backend", None)
    tokenizer = make_tokenizer()
    rows = encode(sentences(GLOBAL_BATCH, seed=3), TASKS["sst2"], tokenizer, 32)
    for index, row in enumerate(rows):
        row["position_ids"] = index >= padding_from  # a column that the Trainer keeps
    make = masked_lm if mlm else bert
    teacher = make(seed=1, initializer_range=0.3)  # logits far from equal, so that KD counts
    torch.manual_seed(2)
    student = student_from_teacher(teacher, 2, hidden_size=hidden_size)
    keep = KeepGradients()
    trainer = DistillationTrainer(
        student,
        teacher,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            max_grad_norm=0.0,
            torch_compile_backend=compiler,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        ),
        distillation=DistillationConfig(ce_weight=0.3, kd_weight=0.7, temperature=2.0, alp_weight=1.5, **options),
        train_dataset=rows,
        data_collator=(TokenLabels if mlm else PaddingCollator)(tokenizer),
        callbacks=[keep],
    )
    trainer.train()
    logged = next(log for log in trainer.state.log_history if "loss" in log)
    return keep.gradients, logged


if __name__ == "__main__":
    target, rank_batch = Path(sys.argv[1]), GLOBAL_BATCH // 4
    results = {}
    for case in CASES:
        # half-padding: rank 1 sees nothing but padding, rank 0 nothing but sentences
        batch, accumulation = (2 * rank_batch, 1) if case == "half-padding" else (rank_batch, 2)
        results[case] = one_step(case, batch, accumulation, target / "unused")
    if int(os.environ["RANK"]) == 0:
        torch.save(results, target / "results.pt")
    torch.distributed.barrier()
    os._exit(0)  # not through the end of Gloo's threads: it once aborted a rank whose work was done
