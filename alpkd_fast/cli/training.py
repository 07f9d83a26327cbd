"""What finetune, distill and sweep share: data, models, training arguments, evaluation."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..hf.data import draw_rows, encode, length_order, load_rows
from ..hf.extras import require
from ..hf.files import Rows
from ..hf.losses import hard_loss
from ..hf.tasks import TASKS, Task
from .options import chosen_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments


@dataclass
class Work:
    """The task with its tokenised data."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    collator: Any
    train: Rows
    batches: list[tuple[list[int], dict[str, torch.Tensor]]]  # validation: row indices, padded batch
    validation: Rows


def load_work(args: argparse.Namespace, model_folder: str) -> Work:
    """Load tokenizer and data; fails before any training where one of them does not fit."""
    transformers = require("transformers", "training")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    task = chosen_task(args)
    tokenizer = _pretrained(transformers.AutoTokenizer, model_folder)
    rows, held_out = (load_rows(args.data, task, split) for split in ("train", task.validation_split))
    if task.kind == "classification" and task.num_labels is None:
        # Of all rows: those that --train-rows leaves may lack the last class.
        task = replace(task, num_labels=1 + max(row[task.label_column] for row in (*rows, *held_out)))
    chosen = draw_rows(rows, args.train_rows)
    train, validation = (encode(split, task, tokenizer, args.max_length) for split in (chosen, held_out))
    if task.kind == "mlm":
        collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=args.mask_share)
    else:
        collator = transformers.DataCollatorWithPadding(tokenizer)
    order = length_order(validation)
    cuts = [order[at : at + args.batch_size] for at in range(0, len(order), args.batch_size)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same masked tokens in every evaluation
        batches = [(cut, dict(collator([validation[i] for i in cut]))) for cut in cuts]
    return Work(task, tokenizer, collator, train, batches, validation)


def load_model(folder: str, work: Work, new_head: bool) -> PreTrainedModel:
    """Load a model in float32 with the task's head: a new one for fine-tuning, else the one that was trained.

    transformers would keep the dtype of the file: AdamW on bfloat16 weights loses small steps, and float16's
    GradScaler refuses float16 gradients. --precision is autocast's, over float32 weights.
    """
    transformers = require("transformers", "training")
    task, masked = work.task, work.task.kind == "mlm"
    auto = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForSequenceClassification
    load: dict[str, Any] = {"dtype": torch.float32}
    if new_head and not masked:
        load |= {"num_labels": task.num_labels, "ignore_mismatched_sizes": True}
    model = _pretrained(auto, folder, **load)
    _check_positions(folder, model, work)
    needed, outputs = task.num_labels or 1, model.config.num_labels
    counted = TASKS[task.name].num_labels is None  # in the data, which may lack the teacher's last class
    if not masked and (outputs < needed or (outputs > needed and not counted)):
        raise ValueError(
            f"--teacher: {folder} has {outputs} outputs, task {task.name} needs {needed}; "
            "fine-tune it with alpkd finetune first"
        )
    return model  # type: ignore[no-any-return]


def _check_positions(folder: str, model: PreTrainedModel, work: Work) -> None:
    """Refuse rows that are longer than the model's positions, which would fail deep inside it."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return
    positions = min(positions, work.tokenizer.model_max_length)  # RoBERTa's first two take no token
    longest = max(len(row["input_ids"]) for row in (*work.train, *work.validation))
    if longest > positions:
        raise ValueError(
            f"--max-length: a row of {longest} tokens is left, {folder} takes at most {positions}; pass --max-length "
            f"{positions}"
        )


def _pretrained(auto: Any, folder: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(folder, **options)
    except OSError as error:
        raise ValueError(f"{folder} is neither a folder with a transformers model nor a hub name: {error}") from error


def training_arguments(args: argparse.Namespace, folder: Path, seed: int, save_steps: int | None) -> TrainingArguments:
    transformers = require("transformers", "training")
    return transformers.TrainingArguments(  # type: ignore[no-any-return]
        output_dir=str(folder),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup,
        weight_decay=args.weight_decay,
        bf16=args.precision == "bf16",
        fp16=args.precision == "fp16",
        use_cpu=args.cpu,
        seed=seed,
        train_sampling_strategy="group_by_length",
        save_strategy="no" if save_steps is None else "steps",
        save_steps=save_steps or 500,
        save_total_limit=1,
        logging_steps=10,
        logging_first_step=True,
        report_to="none",
        disable_tqdm=True,
    )


def score(model: Any, work: Work) -> tuple[dict[str, float], list[float]]:
    """Evaluate on the validation rows; return the metrics, and one prediction per row in the file's order.

    For "mlm" the metrics are over the masked tokens, and there is no prediction per row.
    """
    model.eval()
    device = model.device
    if work.task.kind == "mlm":
        return _score_masked(model, work), []
    logits = torch.empty(len(work.validation), model.config.num_labels)
    with torch.no_grad():
        for rows, batch in work.batches:
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            logits[rows] = model(**_known(model, inputs)).logits.float().cpu()
    labels = torch.tensor([row["labels"] for row in work.validation]).numpy()
    predictions = work.task.predictions(logits.numpy())
    return work.task.score(logits.numpy(), labels), predictions.tolist()


def _score_masked(model: Any, work: Work) -> dict[str, float]:
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for _, batch in work.batches:
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            labels = inputs.pop("labels")
            logits = model(**_known(model, inputs)).logits[labels != -100]
            labels = labels[labels != -100]
            loss += hard_loss(logits, labels).item()
            correct += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
    return {"accuracy": correct / max(count, 1), "loss": loss / max(count, 1)}


def _known(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in names}


def final_score(trainer: Trainer, work: Work) -> tuple[dict[str, float], list[float]]:
    """Evaluate after training; on several ranks by the Trainer, which has no prediction per row to give."""
    if trainer.args.world_size == 1:
        return score(trainer.model, work)
    evaluated = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    # For classification the Trainer multiplies the mean loss by the number of ranks: left out.
    unwanted = {"runtime", "samples_per_second", "steps_per_second", "epoch"}
    unwanted |= set() if work.task.kind == "mlm" else {"loss"}
    return {name: value for name, value in evaluated.items() if name not in unwanted}, []


def metrics_function(task: Task) -> Any:
    """compute_metrics of the Trainer; None for "mlm", where its loss is enough."""
    return None if task.kind == "mlm" else lambda output: task.score(output.predictions, output.label_ids)
