"""``alpkd sweep``: methods × depths × seeds on one task, into one table and one plot."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from ..hf.config import DistillationConfig
from ..hf.methods import METHODS
from . import options

NAME = "sweep"
HELP = "compare methods over depths and seeds"
BASELINE = "kd"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="a folder with the fine-tuned teacher, or a hub name")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[BASELINE, "pkd-skip", "rail", "alp-no", "alp-po", "alp", "uniform"],
        metavar="METHOD[:OPTION=VALUE,…]",
        help=f"of {', '.join(METHODS)}, each with its own options where given, as in alp:scale=1,pooling=mean",
    )
    parser.add_argument("--depths", nargs="+", type=int, default=[2, 4], metavar="LAYERS", help="of the students; 2 4")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="0 1 2")
    parser.add_argument("--output", required=True, metavar="DIR", help="one JSON per run, the table and the plot")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap; %(default)s")
    options.add_config(parser)
    options.add_data(parser)
    options.add_student(parser)
    options.add_losses(parser)
    options.add_training(parser, epochs=3, learning_rate=5e-5)


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Split "alp:scale=1,pooling=mean" into the method and its own options."""
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"--methods: got {name!r}; allowed are {', '.join(METHODS)}")
    changes: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        option, _, value = part.partition("=")
        if option not in _VARIANT_OPTIONS:
            raise ValueError(f"--methods: {text!r} sets {option!r}; allowed are {', '.join(_VARIANT_OPTIONS)}")
        try:
            changes[option] = _VARIANT_OPTIONS[option](value)
        except (KeyError, ValueError):
            raise ValueError(f"--methods: {text!r} gives {option} the value {value!r}; it takes no such one") from None
    return name, changes


_BOOL = {"true": True, "false": False}.__getitem__
_VARIANT_OPTIONS: dict[str, Any] = {
    "scale": float,
    "pooling": str,
    "layer_map": str,
    "normalize": _BOOL,
    "detach_attention": _BOOL,
    "drop_last_layer": _BOOL,
    "projection": str,
    "projected_side": str,
    "learn_scale": _BOOL,
    "temperature": float,
    "ce_weight": float,
    "kd_weight": float,
    "alp_weight": float,
}


def run(args: argparse.Namespace) -> int:
    methods = {text: parse_method(text) for text in args.methods}
    layers = options.chosen_layers(args)
    configs = {  # refuses wrong options before any loading
        (text, seed): options.distillation_config(args, name, seed, **changes)
        for text, (name, changes) in methods.items()
        for seed in args.seeds
    }
    from ..hf.extras import require

    require("transformers", "alpkd sweep")
    from ..hf.teacher_cache import ROW_COLUMN, TeacherCache
    from .runs import plain
    from .sweep_report import report
    from .training import load_model, load_work, score

    output = Path(args.output)
    settings = {k: v for k, v in plain(args).items() if k not in ("methods", "depths", "seeds", "output", "resamples")}
    _check_settings(output, settings)
    work = load_work(args, args.teacher)
    teacher = load_model(args.teacher, work.task, new_head=False)
    for depth in args.depths:
        if not 1 <= depth <= (deepest := teacher.config.num_hidden_layers):
            raise ValueError(f"--depths: got {depth}; allowed are 1 to the teacher's {deepest}")
    _start(output, settings, work, score(teacher, work))
    cache = None if work.task.kind == "mlm" else TeacherCache()
    for number, row in enumerate(work.train):
        row[ROW_COLUMN] = number
    runs = [(depth, seed, text) for seed in args.seeds for depth in args.depths for text in methods]
    for number, (depth, seed, text) in enumerate(runs, start=1):
        path = run_path(output, text, depth, seed)
        if path.exists():
            continue
        title = f"[{number}/{len(runs)}] {text}, {depth} layers, seed {seed}"
        config = configs[text, seed]
        shared = None if config.pooling == "token" else cache
        if not _one_run(args, config, teacher, shared, work, layers, depth, seed, path, title):
            print(f"interrupted in {title}; the same command goes on with that run")
            return 130
    return report(args, output, list(methods), work)


def run_path(output: Path, text: str, depth: int, seed: int) -> Path:
    name = text.replace(":", "--").replace("=", "-").replace(",", "--")
    return output / "runs" / f"{name}_depth{depth}_seed{seed}.json"


def _check_settings(output: Path, settings: dict[str, Any]) -> None:
    path = output / "sweep.json"
    if not path.exists():
        return
    known = json.loads(path.read_text())["settings"]
    changed = sorted(name for name in settings if known.get(name) != settings[name])
    if changed:
        name = changed[0]
        raise ValueError(
            f"--{name.replace('_', '-')}: {output} was begun with {known.get(name)!r}, got {settings[name]!r}; use the "
            "same value to go on, or another --output"
        )


def _start(output: Path, settings: dict[str, Any], work: Any, scored: tuple[dict[str, float], list[float]]) -> None:
    from ..info import report as environment
    from .report import write_json

    (output / "runs").mkdir(parents=True, exist_ok=True)
    if (output / "sweep.json").exists():
        return
    metrics, predictions = scored
    labels = [row.get("labels") for row in work.validation] if predictions else []
    teacher = {"metrics": metrics, "predictions": predictions}
    facts = {"settings": settings, "environment": environment(), "teacher": teacher, "labels": labels}
    write_json(output / "sweep.json", facts)


def _one_run(
    args: argparse.Namespace,
    config: DistillationConfig,
    teacher: Any,
    cache: Any,
    work: Any,
    layers: str | list[int],
    depth: int,
    seed: int,
    path: Path,
    title: str,
) -> bool:
    """Train one student and write its JSON; False where Ctrl-C came first."""
    from rich.console import Console
    from transformers import PrinterCallback, set_seed

    from ..hf.students import student_from_teacher
    from ..hf.trainer import DistillationTrainer
    from .callbacks import CheckpointOnInterrupt, ProgressBar
    from .report import write_json
    from .training import final_score, training_arguments

    set_seed(seed)
    student = student_from_teacher(teacher, depth, layers, hidden_size=args.hidden_size)
    interrupt = CheckpointOnInterrupt(save=False)
    with tempfile.TemporaryDirectory() as folder:  # the Trainer wants one, but nothing is saved
        trainer = DistillationTrainer(
            student,
            teacher,
            distillation=config,
            teacher_cache=cache,
            args=training_arguments(args, Path(folder), seed, save_steps=None),
            train_dataset=work.train,
            data_collator=work.collator,
            processing_class=work.tokenizer,
            callbacks=[interrupt, ProgressBar(title, Console())],
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        try:
            trainer.train()
        finally:
            interrupt.restore()
    if interrupt.interrupted:
        return False
    seconds = time.perf_counter() - started
    metrics, predictions = final_score(trainer, work)
    if trainer.is_world_process_zero():
        last = [row for row in trainer.state.log_history if "loss" in row][-1:]
        write_json(
            path,
            {
                "distillation": config.to_dict(),
                "depth": depth,
                "seed": seed,
                "metrics": metrics,
                "predictions": predictions,
                "train_seconds": seconds,
                "steps": trainer.state.global_step,
                "last_log": last[0] if last else None,
                "layer_attention": None if trainer.layer_attention is None else trainer.layer_attention.tolist(),
            },
        )
    return True
