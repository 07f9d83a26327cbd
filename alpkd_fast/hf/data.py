"""Rows from a local folder or the hub, tokenised."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .extras import require
from .tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[dict[str, Any]]
GLUE_ON_THE_HUB = "nyu-mll/glue"


def load_rows(source: str, task: Task, split: str, limit: int | None = None) -> Rows:
    """Return the rows of a split, or ``limit`` of them drawn with a fixed seed.

    Args:
        source: a folder with ``{split}.jsonl``, ``.json`` (one row a line), ``.csv``, ``.tsv`` or ``.parquet``, or
            with a folder of the task's name that holds them; else a name for ``datasets.load_dataset``.
    """
    folder = Path(source)
    if folder.is_dir():
        rows = _from_folder(folder / task.name if (folder / task.name).is_dir() else folder, split)
    else:
        rows = _from_hub(source, task, split)
    for column in (*task.text_columns, *(() if task.kind == "mlm" else (task.label_column,))):
        if rows and column not in rows[0]:
            raise ValueError(f"data: {source} ({split}) has no column {column!r}; it has {', '.join(rows[0])}")
    if not rows:
        raise ValueError(f"data: {source} holds no row in {split}")
    return draw_rows(rows, limit)


def draw_rows(rows: Rows, limit: int | None) -> Rows:
    """Return ``limit`` rows drawn with a fixed seed; all where there are no more, or no limit."""
    if limit is None or limit >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [rows[i] for i in order[:limit].tolist()]


def _from_folder(folder: Path, split: str) -> Rows:
    for suffix, read in _READERS.items():
        path = folder / f"{split}{suffix}"
        if path.is_file():
            return read(path)
    found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise ValueError(f"data: {folder} has no {split} with one of {', '.join(_READERS)}; it holds {found}")


def _read_jsonl(path: Path) -> Rows:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _read_csv(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as lines:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        return [dict(row) for row in csv.DictReader(lines, delimiter=delimiter)]


def _read_parquet(path: Path) -> Rows:
    datasets = require("datasets", "reading parquet")
    rows: Rows = datasets.Dataset.from_parquet(str(path)).to_list()
    return rows


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _from_hub(source: str, task: Task, split: str) -> Rows:
    datasets = require("datasets", f"data {source!r}, which is not a local folder,")
    name = "nyu-mll/glue" if source == "glue" else source
    try:
        data = datasets.load_dataset(name, task.name if name == GLUE_ON_THE_HUB else None, split=split)
    except Exception as error:
        raise ValueError(
            f"data: {source!r} is neither a local folder nor a data set that could be loaded: {error}"
        ) from error
    rows: Rows = data.to_list()
    return rows


def encode(rows: Rows, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Rows:
    """Return one row of ``input_ids``, masks and ``labels`` per row of text, without padding."""
    texts = [[str(row[column]) for row in rows] for column in task.text_columns]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    columns = {name: encoded[name] for name in encoded}
    if task.kind == "regression":
        columns["labels"] = [float(row[task.label_column]) for row in rows]
    elif task.kind == "classification":
        columns["labels"] = [int(row[task.label_column]) for row in rows]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def length_order(rows: Rows) -> list[int]:
    """Indices of the rows from the longest to the shortest."""
    return sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
