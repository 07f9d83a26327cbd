"""The figures of docs/results.md are those of the committed results."""

import json
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_table_holds_the_committed_figures():
    results = json.loads((DOCS / "results" / "sst2-e5-small.json").read_text(encoding="utf8"))
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (\d) \| ([\d.]+) ± ([\d.]+) \|", (DOCS / "results.md").read_text(), re.M)
    committed = [
        (run["method"], str(run["seed"]), f"{run['accuracy']:.4f}", f"{run['standard_error']:.4f}")
        for run in results["runs"]
    ]
    assert sorted(rows) == sorted(committed)
