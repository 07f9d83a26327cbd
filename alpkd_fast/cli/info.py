"""``alpkd info``: versions, backends and devices; needs torch alone."""

from __future__ import annotations

import argparse

from .. import info

NAME = "info"
HELP = "show versions, backends and devices"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add none."""


def run(args: argparse.Namespace) -> int:
    info.main()
    return 0
