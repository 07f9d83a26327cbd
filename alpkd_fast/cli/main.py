"""``alpkd``: parses the command line and calls one module per command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..hf.extras import MissingExtraError
from . import distill, finetune, info, sweep
from .options import with_config_file

COMMANDS = {module.NAME: module for module in (distill, finetune, sweep, info)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alpkd", description="Distillation with fused intermediate-layer losses.")
    parser.add_argument("--version", action="version", version=f"alpkd-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_options(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 1 for an error, 2 for wrong options, 130 after Ctrl-C."""
    parser = make_parser()
    try:
        args = parser.parse_args(with_config_file(list(sys.argv[1:] if argv is None else argv)))
        status: int = COMMANDS[args.command].run(args)
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (MissingExtraError, ValueError) as error:
        print(f"alpkd: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
