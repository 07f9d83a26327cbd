"""Options that commands share, and ``--config``: a YAML file of the same options."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..hf.config import PROJECTIONS, SIDES, DistillationConfig
from ..hf.extras import require
from ..hf.methods import METHODS
from ..hf.students import CHOICES
from ..hf.tasks import TASKS, Task
from ..layer_maps import KINDS
from ..problem import POOLINGS

PRECISIONS = ("fp32", "bf16", "fp16")


def with_config_file(argv: list[str]) -> list[str]:
    """Put the options of ``--config FILE`` before the others, which therefore override them."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    found, rest = finder.parse_known_args(argv)
    if found.config is None or not rest or rest[0].startswith("-"):
        return argv
    path = Path(found.config)
    if not path.is_file():
        raise ValueError(f"--config: there is no file {path}")
    yaml = require("yaml", "--config")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is no YAML; write one 'option: value' a line: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config: {path} must hold one 'option: value' a line, got {type(values).__name__}")
    return [rest[0], *_as_arguments(values), *rest[1:]]


def _as_arguments(values: dict[str, Any]) -> list[str]:
    arguments: list[str] = []
    for name, value in values.items():
        flag = "--" + str(name).replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            arguments.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            arguments += [flag, *map(str, value)]
        else:
            arguments += [flag, str(value)]
    return arguments


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE.yaml", help="a file of these options; the command line overrides it")


def add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--task", required=True, choices=tuple(TASKS), help="what to learn, and the metric")
    group.add_argument(
        "--data", required=True, help="a folder of {train,validation}.{jsonl,csv,tsv,parquet}, or a hub name; glue"
    )
    group.add_argument("--text-columns", nargs="+", metavar="COLUMN", help="columns of text, one or two; the task's")
    group.add_argument("--label-column", metavar="COLUMN", help="column of labels; the task's")
    group.add_argument("--train-rows", type=_positive, metavar="N", help="train on N rows, always the same; all")
    group.add_argument("--max-length", type=_positive, default=128, metavar="TOKENS", help="cut rows here; %(default)s")


def add_training(parser: argparse.ArgumentParser, epochs: float, learning_rate: float) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=_positive_float, default=epochs, help="%(default)s")
    group.add_argument("--batch-size", type=_positive, default=32, metavar="ROWS", help="per device; %(default)s")
    group.add_argument(
        "--accumulation", type=_positive, default=1, metavar="BATCHES", help="batches per optimizer step; %(default)s"
    )
    group.add_argument("--learning-rate", type=_positive_float, default=learning_rate, help="%(default)s")
    group.add_argument("--warmup", type=_share, default=0.1, help="share of the steps; %(default)s")
    group.add_argument("--weight-decay", type=_weight, default=0.01, help="%(default)s")
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help="%(default)s")
    group.add_argument("--cpu", action=argparse.BooleanOptionalAction, default=False, help="stay on the CPU")
    group.add_argument("--mask-share", type=_share, default=0.15, help="of tokens to mask, task mlm; %(default)s")


def add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output", required=True, metavar="DIR", help="folder of the model, metrics and plots")
    group.add_argument("--seed", type=int, default=0, help="%(default)s")
    group.add_argument("--save-steps", type=_positive, metavar="STEPS", help="leave a checkpoint every so many steps")
    flag = argparse.BooleanOptionalAction  # "resume: false" in a file is --no-resume
    group.add_argument("--resume", action=flag, default=False, help="go on from the checkpoint in the output folder")


def add_student(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("student")
    group.add_argument(
        "--layers",
        nargs="+",
        default=["skip"],
        metavar="LAYER",
        help=f"which teacher layers it starts from: {', '.join(CHOICES)} or indices from 0; skip",
    )
    group.add_argument("--hidden-size", type=_positive, metavar="D", help="a smaller width; all weights fresh then")


def add_losses(parser: argparse.ArgumentParser) -> None:
    """The fields of DistillationConfig but ``method`` and ``seed``."""
    default = DistillationConfig()
    flag = argparse.BooleanOptionalAction
    group = parser.add_argument_group("losses")
    for name in ("ce", "kd", "alp"):
        weight = getattr(default, f"{name}_weight")
        group.add_argument(f"--{name}-weight", type=_weight, default=weight, help="%(default)s")
    group.add_argument("--temperature", type=_positive_float, default=default.temperature, help="%(default)s")
    group.add_argument("--pooling", choices=POOLINGS, help="rows of the loss on hidden states; the head's")
    group.add_argument("--layer-map", choices=KINDS, help="overrides the method's")
    group.add_argument("--scale", type=_weight, help="of the attention; 1/sqrt(width)")
    group.add_argument("--learn-scale", action=flag, default=False, help="starting at --scale")
    group.add_argument("--normalize", action=flag, help="compare L2-normalised rows; the method's own form")
    group.add_argument("--detach-attention", action=flag, default=False, help="no gradient through the attention")
    group.add_argument("--layer-weights", nargs="+", type=_weight, metavar="W", help="one per student layer; 1 each")
    group.add_argument("--student-layers", nargs="+", type=int, metavar="I", help="that take part, from 0; all")
    group.add_argument("--teacher-layers", nargs="+", type=int, metavar="J", help="that take part, from 0; all")
    group.add_argument("--drop-last-layer", action=flag, help="leave the last student layer out; PKD does")
    group.add_argument("--projection", choices=PROJECTIONS, default=default.projection, help="%(default)s")
    group.add_argument("--projected-side", choices=SIDES, default=default.projected_side, help="%(default)s")
    group.add_argument("--projection-bias", action=flag, default=True, help="whether the projection has one")
    group.add_argument(
        "--teacher-batch-size",
        type=_positive,
        metavar="ROWS",
        help="run the teacher on so many at a time, for less memory; the whole batch",
    )
    group.add_argument("--backend", default=default.backend, help="of the loss; %(default)s")


def add_method(parser: argparse.ArgumentParser) -> None:
    listed = "; ".join(f"{name}: {method.about}" for name, method in METHODS.items())
    parser.add_argument("--method", choices=tuple(METHODS), default="alp", help=f"{listed}; %(default)s")


CONFIG_OPTIONS = tuple(name for name in DistillationConfig.__dataclass_fields__ if name not in ("method", "seed"))

_OF_EVERY_METHOD = ("ce_weight", "kd_weight", "temperature", "teacher_batch_size", "backend")
HIDDEN_STATE_OPTIONS = tuple(name for name in CONFIG_OPTIONS if name not in _OF_EVERY_METHOD)


def refuse_unused(args: argparse.Namespace) -> None:
    """Refuse what a method without a loss on hidden states would ignore."""
    default = DistillationConfig()
    for name in HIDDEN_STATE_OPTIONS:
        value = getattr(args, name)
        if METHODS[args.method].layer_map is None and value != getattr(default, name):
            raise ValueError(
                f"--{name.replace('_', '-')}: got {value}, but method {args.method!r} uses no hidden states; leave it "
                "out, or use another method"
            )


def distillation_config(args: argparse.Namespace, method: str, seed: int, **changes: Any) -> DistillationConfig:
    values = {name: getattr(args, name) for name in CONFIG_OPTIONS}
    return DistillationConfig(method=method, seed=seed, **{**values, **changes})


def chosen_layers(args: argparse.Namespace) -> str | list[int]:
    """--layers as student_from_teacher takes it."""
    if len(args.layers) == 1 and args.layers[0] in CHOICES:
        return str(args.layers[0])
    try:
        return [int(layer) for layer in args.layers]
    except ValueError:
        raise ValueError(
            f"--layers: got {' '.join(args.layers)}; allowed are {', '.join(CHOICES)} or indices from 0"
        ) from None


def chosen_task(args: argparse.Namespace) -> Task:
    task = TASKS[args.task]
    changes: dict[str, Any] = {}
    if args.text_columns is not None:
        if len(args.text_columns) > (1 if task.kind == "mlm" else 2):
            raise ValueError(f"--text-columns: got {len(args.text_columns)}; a task takes at most two, mlm one")
        changes["text_columns"] = tuple(args.text_columns)
    if args.label_column is not None:
        changes["label_column"] = args.label_column
    task = replace(task, **changes)
    if not task.text_columns:
        raise ValueError(f"--text-columns: task {task.name} needs the names of its one or two columns of text")
    return task


def _number(text: str, low: float, high: float, open_low: bool, rule: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; pass a number {rule}") from None
    if not (low < value if open_low else low <= value) or not value <= high:
        raise argparse.ArgumentTypeError(f"got {text}; pass a number {rule}")
    return value


def _positive(text: str) -> int:
    value = _number(text, 0, 2**31, True, "that is whole and above 0")
    if value != int(value):
        raise argparse.ArgumentTypeError(f"got {text}; pass a number that is whole and above 0")
    return int(value)


def _positive_float(text: str) -> float:
    return _number(text, 0, 1e30, True, "above 0")


def _weight(text: str) -> float:
    return _number(text, 0, 1e30, False, "of at least 0")


def _share(text: str) -> float:
    return _number(text, 0, 1, False, "from 0 to 1")
