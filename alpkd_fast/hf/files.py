"""Rows from the files of a folder: jsonl, csv, tsv or parquet, each cell as it stands there."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from .extras import require

Rows = list[dict[str, Any]]
_UTF8 = "utf-8-sig"  # with or without the mark that some programs put in front


def read_split(folder: Path, split: str) -> tuple[Rows, Path]:
    """Return the rows of ``{split}`` with the first suffix that is there, and the file."""
    for suffix, read in _READERS.items():
        path = folder / f"{split}{suffix}"
        if path.is_file():
            try:
                return read(path), path
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"data: {path} is not in UTF-8 ({error.reason}); convert it, for example with "
                    "iconv -f LATIN1 -t UTF-8"
                ) from error
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise ValueError(f"data: {folder} has no {split} with one of {', '.join(_READERS)}; it holds {found}")


def _read_jsonl(path: Path) -> Rows:
    rows = []
    with path.open(encoding=_UTF8) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(
                    f"data: {path}, line {number}: got {line.strip()[:40]!r}; each line must be one JSON object, a "
                    "row; jq -c '.[]' FILE makes such lines of an array"
                )
            rows.append(row)
    return rows


def _read_csv(path: Path) -> Rows:
    return _read_table(path, "quote a cell that holds a comma, a line break or quotation marks", strict=True)


def _read_tsv(path: Path) -> Rows:
    # Nothing is quoted, as in GLUE's files: a quotation mark is text.
    remedy = "a cell that holds a tab or a line break needs a .csv or .jsonl"
    return _read_table(path, remedy, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_table(path: Path, remedy: str, **form: Any) -> Rows:
    rows: Rows = []
    with path.open(encoding=_UTF8, newline="") as lines:
        reader = csv.reader(lines, **form)
        try:
            header = next(reader, [])
            for cells in filter(None, reader):  # without empty lines
                if len(cells) != len(header):
                    raise csv.Error(f"{len(cells)} cells, the header has {len(header)}")
                rows.append(dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise ValueError(f"data: {path}, row {len(rows) + 1}: {error}; {remedy}") from error
    return rows


def _read_parquet(path: Path) -> Rows:
    datasets = require("datasets", "reading parquet")
    rows: Rows = datasets.Dataset.from_parquet(str(path)).to_list()
    return rows


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
