"""Rows from a local folder or the hub, tokenised."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .extras import require
from .files import Rows, read_split
from .tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GLUE_ON_THE_HUB = "nyu-mll/glue"


def load_rows(source: str, task: Task, split: str, limit: int | None = None) -> Rows:
    """Return the rows of a split, or ``limit`` of them drawn with a fixed seed; labels are numbers.

    Args:
        source: a folder with ``{split}.jsonl``, ``.json`` (one row a line), ``.csv``, ``.tsv`` (nothing quoted) or
            ``.parquet``, or with a folder of the task's name that holds them; else a name for
            ``datasets.load_dataset``.

    Raises:
        ValueError: a file or a cell that cannot be used; the message says where it is. Rows count from 1, without
            a header and empty lines.
    """
    folder = Path(source)
    if folder.is_dir():
        rows, path = read_split(folder / task.name if (folder / task.name).is_dir() else folder, split)
        origin = str(path)
    else:
        rows, origin = _from_hub(source, task, split), f"{source} ({split})"
    if not rows:
        raise ValueError(f"data: {origin} holds no row")
    for number, row in enumerate(rows, start=1):
        _check(row, task, f"data: {origin}, row {number}")
    return draw_rows(rows, limit)


def _check(row: dict[str, Any], task: Task, place: str) -> None:
    """Refuse a row that the task cannot use, and make its label a number."""
    label_columns = () if task.kind == "mlm" else (task.label_column,)
    for column in (*task.text_columns, *label_columns):
        if column not in row:
            raise ValueError(
                f"{place} has no column {column!r}; it has {', '.join(row)}; --text-columns and --label-column name "
                "others"
            )
    for column in task.text_columns:
        if not isinstance(row[column], str):
            raise ValueError(
                f"{place}, column {column!r}: got {row[column]!r}; allowed is text: fill it in, or leave the row out"
            )
    for column in label_columns:
        row[column] = _label(row[column], task, f"{place}, column {column!r}")


def _label(cell: Any, task: Task, place: str) -> float:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        value = math.nan
    if task.kind == "regression":
        if not math.isfinite(value):
            raise ValueError(f"{place}: got {cell!r}; allowed are finite numbers: fill it in, or leave the row out")
        return value
    if not value.is_integer() or not 0 <= value < (task.num_labels or math.inf):
        last = "" if task.num_labels is None else f" to {task.num_labels - 1}"
        raise ValueError(
            f"{place}: got {cell!r}; allowed are whole numbers from 0{last}: number the classes, and leave out rows "
            "without one"
        )
    return int(value)


def draw_rows(rows: Rows, limit: int | None) -> Rows:
    """Return ``limit`` rows drawn with a fixed seed; all where there are no more, or no limit."""
    if limit is None or limit >= len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return [rows[i] for i in order[:limit].tolist()]


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
    texts = [[row[column] for row in rows] for column in task.text_columns]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    columns = {name: encoded[name] for name in encoded}
    if task.kind != "mlm":
        columns["labels"] = [row[task.label_column] for row in rows]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def length_order(rows: Rows) -> list[int]:
    """Indices of the rows from the longest to the shortest."""
    return sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
