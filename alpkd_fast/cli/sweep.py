"""``alpkd sweep``: methods × depths × seeds on one task, into one table and one plot."""

from __future__ import annotations

import argparse
from typing import Any

from ..hf.extras import require
from ..hf.methods import METHODS
from . import options

NAME = "sweep"
HELP = "compare methods over depths and seeds"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", required=True, help="a folder with the fine-tuned teacher, or a hub name")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["kd", "pkd-skip", "rail", "alp-no", "alp-po", "alp", "uniform"],
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
    unused = options.HIDDEN_STATE_OPTIONS if METHODS[name].layer_map is None else ()
    allowed = [option for option in _VARIANT_OPTIONS if option not in unused]
    changes: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        option, _, value = part.partition("=")
        if option not in allowed:
            raise ValueError(f"--methods: {text!r} sets {option!r}; allowed are {', '.join(allowed)}")
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
    require("transformers", "alpkd sweep")
    from .sweep_report import report
    from .sweep_runs import Sweep

    sweep = Sweep(args, layers, {text: configs[text, args.seeds[0]] for text in methods})
    planned = [(text, depth, seed) for seed in args.seeds for depth in args.depths for text in methods]
    for number, (text, depth, seed) in enumerate(planned, start=1):
        title = f"[{number}/{len(planned)}] {text}, {depth} layers, seed {seed}"
        if not sweep.train(text, configs[text, seed], depth, seed, title):
            print(f"interrupted in {title}; the same command goes on with that run")
            return 130
    return report(args, list(methods), sweep.work)
