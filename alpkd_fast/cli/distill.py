"""``alpkd distill``: train a student on a teacher."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from . import options

NAME = "distill"
HELP = "distil a teacher into a student"
# Options of a student made from the teacher, and their defaults.
_MADE: dict[str, Any] = {"depth": 4, "layers": ["skip"], "hidden_size": None}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="a folder with the fine-tuned teacher, or a hub name")
    parser.add_argument("--student", help="a folder with a student; else one is made from the teacher's layers")
    parser.add_argument("--depth", type=int, help=f"layers of the student made from the teacher; {_MADE['depth']}")
    options.add_method(parser)
    options.add_config(parser)
    options.add_data(parser)
    options.add_run(parser)
    options.add_student(parser)
    options.add_losses(parser)
    options.add_training(parser, epochs=3, learning_rate=5e-5)
    parser.set_defaults(**dict.fromkeys(_MADE))  # to tell what was given


def complete(args: argparse.Namespace) -> None:
    """Fill in the options of a student made from the teacher; refuse them beside --student, which would ignore them."""
    for name, default in _MADE.items():
        if getattr(args, name) is None:
            setattr(args, name, default if args.student is None else None)
        elif args.student is not None:
            raise ValueError(
                f"--{name.replace('_', '-')}: --student {args.student} has its own layers; leave one of the two out"
            )


def run(args: argparse.Namespace) -> int:
    from ..hf.extras import require

    # Wrong options are refused before any loading.
    complete(args)
    options.refuse_unused(args)
    config = options.distillation_config(args, args.method, args.seed)
    layers = [] if args.student is not None else options.chosen_layers(args)
    require("transformers", "alpkd distill").set_seed(args.seed)
    from ..hf.students import student_from_teacher
    from ..hf.trainer import DistillationTrainer
    from .runs import check_output, train_and_report
    from .training import load_model, load_work

    check_output(args)
    work = load_work(args, args.teacher)
    teacher = load_model(args.teacher, work, new_head=False)
    if args.student is not None:
        task = replace(work.task, num_labels=teacher.config.num_labels)  # the data may lack the last class
        student = load_model(args.student, replace(work, task=task), new_head=True)
    else:
        student = student_from_teacher(teacher, args.depth, layers, hidden_size=args.hidden_size)

    def make_trainer(**arguments: Any) -> DistillationTrainer:
        return DistillationTrainer(student, teacher, distillation=config, **arguments)

    return train_and_report(args, work, f"distill {args.task}, {args.method}", make_trainer)
