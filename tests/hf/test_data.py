"""Rows from folders of every format, subsets, metrics, and batches of like length."""

from __future__ import annotations

import csv
import json
import re
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


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(suffix, tmp_path):
    write(tmp_path, suffix)
    path = tmp_path / f"train{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row["sentence"] for row in load_rows(str(tmp_path), SST2, "train")] == [row["sentence"] for row in ROWS]


def test_quotation_marks_in_a_tsv_are_text(tmp_path):
    texts = ['"good film', "fine", 'a "bad" plot', '"', '"sad"', "it is"]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "".join(f"{text}\t1\n" for text in texts))
    assert [row["sentence"] for row in load_rows(str(tmp_path), SST2, "train")] == texts


def test_quoted_cells_of_a_csv(tmp_path):
    (tmp_path / "train.csv").write_text('sentence,label\n"good, ""very"" good\nfilm",1\n\n"bad",0\n')
    texts = [row["sentence"] for row in load_rows(str(tmp_path), SST2, "train")]
    assert texts == ['good, "very" good\nfilm', "bad"]


@pytest.mark.parametrize("label", [1, 1.0, "1", "1.0", True])
def test_whole_labels_of_every_form(label, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"sentence": "good", "label": label}])
    (row,) = load_rows(str(tmp_path), SST2, "train")
    assert (row["label"], type(row["label"])) == (1, int)


CLASSES = "allowed are whole numbers from 0 to 1: number the classes"


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("label", 0.7, f"got 0.7; {CLASSES}"),
        ("label", "pos", f"got 'pos'; {CLASSES}"),
        ("label", None, f"got None; {CLASSES}"),
        ("label", -1, f"got -1; {CLASSES}"),
        ("label", 2, f"got 2; {CLASSES}"),
        ("label", "nan", f"got 'nan'; {CLASSES}"),
        ("sentence", None, "got None; allowed is text: fill it in"),
        ("sentence", ["good"], "got ['good']; allowed is text"),
    ],
)
def test_refuses_a_cell_and_says_where_it_is(column, cell, message, tmp_path):
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [*ROWS[:3], {**ROWS[3], column: cell}, *ROWS[4:]])
    with pytest.raises(ValueError, match=re.escape(f"data: {path}, row 4, column {column!r}: {message}")):
        load_rows(str(tmp_path), SST2, "train")


@pytest.mark.parametrize("score", ["high", "inf", None])
def test_refuses_a_score_that_is_no_finite_number(score, tmp_path):
    row = {"sentence1": "good", "sentence2": "bad", "label": score}
    write_jsonl(tmp_path / "train.jsonl", [row])
    with pytest.raises(ValueError, match=rf"row 1, column 'label': got {score!r}; allowed are finite numbers"):
        load_rows(str(tmp_path), TASKS["stsb"], "train")


def test_refuses_a_row_without_the_column(tmp_path):
    rows = [dict(row) for row in ROWS]
    del rows[3]["sentence"]
    write_jsonl(tmp_path / "train.jsonl", rows)
    message = r"train\.jsonl, row 4 has no column 'sentence'; it has label, idx; --text-columns"
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path), SST2, "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train.json",
            b'[\n{"sentence": "good", "label": 1}\n]\n',
            "line 1: got '['; each line must be one JSON object",
        ),
        ("train.jsonl", b'{"sentence": "good", "label": 1}\n["bad", 0]\n', "line 2: got '[\"bad\", 0]'"),
        ("train.csv", b"sentence,label\ngood,1\nbad, very bad,0\n", "row 2: 3 cells, the header has 2; quote"),
        ("train.csv", b"sentence,label\ngood,1\nbad\n", "row 2: 1 cells, the header has 2; quote"),
        ("train.csv", b'sentence,label\n"good,1\nbad,0\n"fine,1\n', "row 1: ',' expected after '\"'; quote a cell"),
        ("train.csv", b'sentence,label\ngood,1\n"bad,0\n', "row 2: unexpected end of data; quote a cell"),
        ("train.tsv", b"sentence\tlabel\ngood\t1\nbad\tplot\t0\n", "row 2: 3 cells, the header has 2; a cell that"),
        ("train.csv", b"sentence,label\ncaf\xe9,1\n", "is not in UTF-8 (invalid continuation byte); convert it"),
    ],
)
def test_refuses_a_file_and_says_where(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        load_rows(str(tmp_path), SST2, "train")
    assert f"data: {tmp_path / name}" in str(raised.value)


def test_local_jsonl_needs_no_datasets(tmp_path):
    write(tmp_path, ".jsonl")
    code = (
        "import sys; sys.modules.update(datasets=None, transformers=None)\n"
        "from alpkd_fast.hf.data import load_rows; from alpkd_fast.hf.tasks import TASKS\n"
        "print(len(load_rows(sys.argv[1], TASKS['sst2'], 'train')))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.stdout.strip() == "30", done.stderr


def test_two_sentences_and_regression(tmp_path):
    (tmp_path / "train.csv").write_text("sentence1,sentence2,label\ngood film,bad plot,2.5\n")
    rows = load_rows(str(tmp_path), TASKS["stsb"], "train")
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
