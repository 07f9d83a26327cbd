"""One training run that ends in an output folder: used by finetune and distill."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hf.extras import require
from ..info import report
from .report import plot_attention, plot_curves, print_table, write_json
from .training import Work, final_score, metrics_function, training_arguments

if TYPE_CHECKING:
    from transformers import Trainer

INTERRUPTED = 130
NOT_OF_THE_RESULT = ("output", "save_steps")  # a resumed run may change these


def check_output(args: argparse.Namespace) -> str | None:
    """Return the checkpoint to resume from, or None; refuse a folder that holds another run."""
    output = Path(args.output)
    utils = require("transformers.trainer_utils", "training")
    checkpoints = output / "checkpoints"
    last = utils.get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    if args.resume and last is None:
        raise ValueError(f"--resume: {checkpoints} holds no checkpoint; leave --resume out to start anew")
    if not args.resume and (last is not None or (output / "metrics.json").exists()):
        remedy = "pass --resume to go on" if last is not None else "it is finished"
        raise ValueError(f"--output: {output} holds a run already: {remedy}, or choose another folder")
    if args.resume:
        check_settings(checkpoints / "settings.json", plain(args, without=NOT_OF_THE_RESULT))
    return last


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Refuse settings other than those in ``path``, if it is there: the results would be a mixture of both."""
    if not path.exists():
        return
    begun = json.loads(path.read_text(encoding="utf-8"))["settings"]
    for name, value in settings.items():
        if begun.get(name) != value:
            raise ValueError(
                f"--{name.replace('_', '-')}: {path.parent} was begun with {begun.get(name)!r}, got {value!r}; use "
                "the same value to go on, or another --output"
            )


def train_and_report(args: argparse.Namespace, work: Work, title: str, make_trainer: Callable[..., Trainer]) -> int:
    """Train, save the model, write metrics.json, curves.png and attention.png; return the exit status."""
    from rich.console import Console
    from transformers import PrinterCallback

    from .callbacks import CheckpointOnInterrupt, ProgressBar

    checkpoint = check_output(args)
    output = Path(args.output)
    arguments = training_arguments(args, output / "checkpoints", args.seed, args.save_steps)
    arguments.eval_strategy = "epoch"
    interrupt = CheckpointOnInterrupt()
    trainer = make_trainer(
        args=arguments,
        train_dataset=work.train,
        eval_dataset=work.validation,
        data_collator=work.collator,
        processing_class=work.tokenizer,
        compute_metrics=metrics_function(work.task),
        callbacks=[interrupt, ProgressBar(title, Console())],
    )
    trainer.remove_callback(PrinterCallback)
    if checkpoint is None and trainer.is_world_process_zero():
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(output / "checkpoints" / "settings.json", {"settings": plain(args)})
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        interrupt.restore()
    seconds = time.perf_counter() - started
    if interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps:
        Console(stderr=True).print(
            f"interrupted after step {trainer.state.global_step} of {trainer.state.max_steps}; "
            "the same command with --resume goes on"
        )
        return INTERRUPTED
    metrics, _ = final_score(trainer, work)
    trainer.save_model(str(output))
    if not trainer.is_world_process_zero():
        return 0
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    attention = getattr(trainer, "layer_attention", None)
    write_json(
        output / "metrics.json",
        {
            "metrics": metrics,
            "steps": trainer.state.global_step,
            "train_seconds": seconds,
            "settings": plain(args),
            "environment": report(),
            "layer_attention": None if attention is None else attention.tolist(),
            "history": trainer.state.log_history,
        },
    )
    plot_curves(output / "curves.png", trainer.state.log_history)
    if attention is not None:
        plot_attention(output / "attention.png", attention.tolist(), trainer.attended_layers)  # type: ignore[attr-defined]
    rows = [(name, f"{value:.4f}") for name, value in metrics.items() if isinstance(value, float)]
    print_table(title, ("metric", "validation"), [*rows, ("train time", f"{seconds:.1f} s"), ("model", str(output))])
    return 0


def plain(args: argparse.Namespace, without: Sequence[str] = ()) -> dict[str, Any]:
    """The options as JSON values, but those ``without``."""
    left_out = ("command", "config", "resume", *without)
    return {name: value for name, value in vars(args).items() if name not in left_out}
