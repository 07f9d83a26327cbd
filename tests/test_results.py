"""The figures of docs/results.md are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

from alpkd_fast.cli.sweep_report import cells_of

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_table_holds_the_committed_figures():
    results = json.loads((DOCS / "results" / "sst2-e5-small.json").read_text(encoding="utf8"))
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (\d) \| ([\d.]+) ± ([\d.]+) \|", (DOCS / "results.md").read_text(), re.M)
    committed = [
        (run["method"], str(run["seed"]), f"{run['accuracy']:.4f}", f"{run['standard_error']:.4f}")
        for run in results["runs"]
    ]
    assert sorted(rows) == sorted(committed)


@pytest.mark.parametrize("path", sorted((DOCS / "results").glob("*-sweep.json")), ids=lambda path: path.stem)
def test_a_sweep_is_shown_as_committed(path):
    """Every row of its table and every command, as `alpkd sweep` prints them."""
    text, sweep = (DOCS / "results.md").read_text(), json.loads(path.read_text(encoding="utf8"))
    shown = text[: text.index(path.name)].rpartition("\n## ")[2]  # the section that links to the file
    for row in sweep["rows"]:
        assert "| " + " | ".join(cells_of(row)) + " |" in shown
    assert sum(line.startswith("| ") for line in shown.splitlines()) == len(sweep["rows"]) + 2
    for command in sweep["commands"]:
        assert command in shown
