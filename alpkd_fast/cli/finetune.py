"""``alpkd finetune``: train a model on a task, to serve as a teacher."""

from __future__ import annotations

import argparse
from typing import Any

from . import options

NAME = "finetune"
HELP = "fine-tune a model on a task: this makes the teacher"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="a folder with a transformers model, or a hub name")
    options.add_config(parser)
    options.add_data(parser)
    options.add_run(parser)
    options.add_training(parser, epochs=3, learning_rate=5e-5)


def run(args: argparse.Namespace) -> int:
    from ..hf.extras import require
    from .runs import check_output, train_and_report
    from .training import load_model, load_work

    require("transformers", "alpkd finetune").set_seed(args.seed)  # the new head
    check_output(args)
    work = load_work(args, args.model)
    model = load_model(args.model, work, new_head=True)
    from ..hf.sampling import LengthGroupedTrainer

    def make_trainer(**arguments: Any) -> LengthGroupedTrainer:
        return LengthGroupedTrainer(model=model, **arguments)

    return train_and_report(args, work, f"finetune {args.task}", make_trainer)
