"""Rows from folders of every format, subsets, metrics, and batches of like length."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from tiny import make_tokenizer, sentences, write_jsonl

from alpkd_fast.hf.data import encode, length_order, load_rows
from alpkd_fast.hf.tasks import TASKS

ROWS = sentences(30)
SST2 = TASKS["sst2"]


def write(folder, suffix):
    path = folder / f"train{suffix}"
    if suffix in (".jsonl", ".json"):
        write_jsonl(path, ROWS)
    elif suffix == ".parquet":
        pytest.importorskip("datasets").Dataset.from_list(ROWS).to_parquet(str(path))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter="\t" if suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_tokens(suffix, tmp_path):
    write(tmp_path, suffix)
    rows = load_rows(str(tmp_path), SST2, "train")
    tokenizer = make_tokenizer()
    assert encode(rows, SST2, tokenizer, 32) == encode(ROWS, SST2, tokenizer, 32)


def test_folder_of_the_task_comes_first(tmp_path):
    write_jsonl(tmp_path / "sst2" / "train.jsonl", ROWS)
    assert load_rows(str(tmp_path), SST2, "train") == ROWS == load_rows(str(tmp_path / "sst2"), SST2, "train")


def test_a_subset_is_always_the_same_and_mixed(tmp_path):
    write(tmp_path, ".jsonl")
    subset = load_rows(str(tmp_path), SST2, "train", limit=10)
    assert subset == load_rows(str(tmp_path), SST2, "train", limit=10)
    assert len({row["idx"] for row in subset}) == 10
    assert subset != ROWS[:10]
    assert load_rows(str(tmp_path), SST2, "train", limit=99) == ROWS


def test_refuses_what_is_not_there(tmp_path):
    write(tmp_path, ".csv")
    with pytest.raises(ValueError, match=r"has no validation with one of \.jsonl, .*; it holds train\.csv"):
        load_rows(str(tmp_path), SST2, "validation")
    with pytest.raises(ValueError, match="has no column 'sentence1'; it has sentence, label, idx"):
        load_rows(str(tmp_path), TASKS["mrpc"], "train")


def test_local_jsonl_needs_no_datasets(tmp_path):
    write(tmp_path, ".jsonl")
    code = (
        "import sys; sys.modules.update(datasets=None, transformers=None)\n"
        "from alpkd_fast.hf.data import load_rows; from alpkd_fast.hf.tasks import TASKS\n"
        "print(len(load_rows(sys.argv[1], TASKS['sst2'], 'train')))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.stdout.strip() == "30", done.stderr


def test_two_sentences_and_regression():
    rows = [{"sentence1": "good film", "sentence2": "bad plot", "label": "2.5"}]
    (row,) = encode(rows, TASKS["stsb"], make_tokenizer(), 32)
    assert row["labels"] == 2.5
    assert row["input_ids"].count(3) == 2  # a separator after each sentence


def test_length_order_goes_from_long_to_short():
    rows = [{"input_ids": [0] * length} for length in (3, 9, 1, 9)]
    assert length_order(rows) == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("task", "logits", "labels", "expected"),
    [
        ("sst2", [[0, 1], [1, 0], [0, 1], [0, 1]], [1, 0, 0, 1], {"accuracy": 0.75}),
        ("cola", [[0, 1], [1, 0], [0, 1], [0, 1]], [1, 0, 0, 1], {"matthews": 1 / 3**0.5}),
        ("mrpc", [[0, 1], [1, 0], [0, 1], [0, 1]], [1, 0, 0, 1], {"accuracy": 0.75, "f1": 0.8}),
        ("stsb", [[1.0], [2.0], [3.0], [9.0]], [2.0, 4.0, 6.0, 18.0], {"pearson": 1.0, "spearman": 1.0}),
        ("mnli", [[0, 0, 1], [1, 0, 0], [0, 1, 0]], [2, 0, 2], {"accuracy": 2 / 3}),
    ],
)
def test_metrics(task, logits, labels, expected):
    assert TASKS[task].score(np.array(logits, dtype=float), np.array(labels)) == pytest.approx(expected)
    assert TASKS[task].main_metric == next(iter(expected))


def test_glue_folder():
    """The real files, where they are."""
    import os
    from pathlib import Path

    folder = Path(os.environ.get("ALPKD_FAST_GLUE", Path(__file__).parents[2].parent / "shared" / "glue"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set ALPKD_FAST_GLUE")
    for name in ("sst2", "cola", "mrpc", "rte"):
        rows = load_rows(str(folder), TASKS[name], "validation")
        assert {int(row["label"]) for row in rows} == {0, 1}
        assert json.dumps(rows[0])
