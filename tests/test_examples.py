"""The example that users copy: it runs from files to table, and its parts do what their names say."""

import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the examples need pip install 'alpkd-fast[examples]'")
pytest.importorskip("sklearn", reason="the examples need pip install 'alpkd-fast[examples]'")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import distill_glue  # noqa: E402
import generated_task  # noqa: E402
from tiny_models import make_model  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher of 4 small layers, and two tasks in GLUE's form, of one and of two sentences."""
    base = tmp_path_factory.mktemp("glue")
    tokenizer = generated_task.make_tokenizer()
    torch.manual_seed(0)
    generated_task.make_bert(len(tokenizer), layers=4).save_pretrained(base / "teacher")
    tokenizer.save_pretrained(base / "teacher")
    for task, columns in (("sst2", ["sentence"]), ("mrpc", ["sentence1", "sentence2"])):
        (base / "data" / task).mkdir(parents=True)
        for split, count, seed in (("train", 48, 1), ("validation", 24, 2)):
            ((texts,), labels) = generated_task.make_rows(count, seed)
            rows = [dict.fromkeys(columns, t) | {"label": label} for t, label in zip(texts, labels, strict=True)]
            (base / "data" / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    return base


def run(folders, output, *arguments):
    common = ["--teacher", folders / "teacher", "--data", folders / "data", "--output", output, "--batch-size", 16]
    return distill_glue.main([str(a) for a in (*common, *arguments)])


def test_every_method_from_files_to_table_and_picture(folders, tmp_path, capsys):
    methods = list(distill_glue.METHODS)
    results = run(folders, tmp_path, "--student-layers", 2, "--method", *methods)
    assert list(results) == ["teacher", "student before", *methods]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    printed = capsys.readouterr().out
    for method in methods:
        assert f"\n{method} " in printed
        student = distill_glue.AutoModelForSequenceClassification.from_pretrained(tmp_path / method)
        assert student.config.num_hidden_layers == len(student.bert.encoder.layer) == 2
        picture = tmp_path / f"attention_{method}.png"
        assert picture.exists() == (method != "kd")
        if picture.exists():
            assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(results["pkd-skip"]["entropy"]) == 1  # PKD leaves the last layer out
    assert 0 < results["alp"]["entropy"][0] < torch.tensor(4.0).log().item() + 1e-6


def test_the_generated_task_ends_with_the_command(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--train-rows", "128", "--batch-size", "32", "--student-layers", "1"]
    for _ in range(2):  # again into the same folder
        results = distill_glue.main(arguments)
    last = distill_glue.BY_COMMAND
    assert list(results) == ["teacher", "student before", "kd", "alp", last]
    assert set(results[last]) == {"accuracy", "standard_error", "seconds"}
    printed = capsys.readouterr().out
    assert f"\n{last} " in printed
    assert f"alpkd distill --teacher {tmp_path / 'teacher'} " in printed
    for picture in ("attention_alp.png", "alpkd_distill/attention.png", "alpkd_distill/curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    student = distill_glue.AutoModelForSequenceClassification.from_pretrained(tmp_path / "alpkd_distill")
    assert student.config.num_hidden_layers == 1


def test_the_same_seed_gives_the_same_student(folders, tmp_path):
    again = [run(folders, tmp_path, "--student-layers", 2, "--method", "alp", "--seed", seed) for seed in (0, 0, 1)]
    weights = [result["alp"]["entropy"] for result in again]
    assert weights[0] == weights[1] != weights[2]


def test_fine_tuning_writes_a_teacher(folders, tmp_path):
    results = run(folders, tmp_path, "--fine-tune", "--task", "mrpc", "--train-rows", 32)
    assert set(results["teacher"]) == {"accuracy", "standard_error", "F1", "seconds"}
    again = distill_glue.main(
        [str(a) for a in ("--teacher", tmp_path, "--data", folders / "data", "--task", "mrpc", "--method", "alp-po",
                          "--student-layers", 2, "--output", tmp_path / "out", "--train-rows", 16)]
    )  # fmt: skip
    assert again["teacher"]["F1"] == results["teacher"]["F1"]


@pytest.mark.parametrize("name", ["distilbert", "modernbert", "roberta"])
def test_other_encoders(name, folders, tmp_path):
    """Also one whose file holds bfloat16."""
    model = make_model(name, "ForSequenceClassification", vocab_size=50).bfloat16()
    model.save_pretrained(tmp_path / "teacher")
    tokenizer = generated_task.make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "teacher")
    data = ["--teacher", tmp_path / "teacher", "--data", folders / "data", "--output", tmp_path / "out"]
    methods = ["--method", "alp", "pkd-skip", "--student-layers", 2, "--train-rows", 16]
    results = distill_glue.main([str(argument) for argument in (*data, *methods)])
    assert len(results["alp"]["entropy"]) == 2
    student = distill_glue.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "alp")
    assert (student.config.num_hidden_layers, student.dtype) == (2, torch.float32)


def test_batches_hold_every_row_once_and_pad_little():
    tokenizer = generated_task.make_tokenizer()
    texts, labels = generated_task.make_rows(500, 1)
    examples = distill_glue.Examples(tokenizer, texts, labels, 16)
    masks = [inputs["attention_mask"] for inputs, _ in examples.batches(random.Random(0))]
    assert sum(mask.shape[0] for mask in masks) == 500
    assert sum(int(mask.sum()) for mask in masks) == sum(len(row["input_ids"]) for row in examples.rows)
    assert sum(int(mask.sum()) for mask in masks) > 0.9 * sum(mask.numel() for mask in masks)


def test_generated_labels_follow_the_rules():
    (texts,), labels = generated_task.make_rows(200, 3)
    assert sum(labels) == 100
    for text, label in zip(texts, labels, strict=True):
        flip = -1 if text.startswith("wrong : ") else 1
        score = 0
        for weight, part in zip((1, 3), text.removeprefix("wrong : ").split(" but "), strict=False):
            for phrase in part.split(" , "):
                *modifiers, word = phrase.split()
                sign = 1 if word in generated_task.GOOD else -1
                score += weight * sign * (-1 if "not" in modifiers else 1)
        assert (flip * score > 0) == bool(label), text


@pytest.mark.parametrize("arguments", [["--teacher", "x"], ["--data", "x"], ["--fine-tune"], ["--method", "alp-xx"]])
def test_wrong_options_fail_at_once(arguments):
    with pytest.raises(SystemExit):
        distill_glue.parse_arguments(arguments)


GLUE = Path(os.environ.get("ALPKD_FAST_GLUE", ROOT.parent / "shared" / "glue"))


@pytest.mark.skipif(not GLUE.is_dir(), reason="ALPKD_FAST_GLUE names no folder of GLUE tasks")
@pytest.mark.parametrize("task", distill_glue.TASKS)
def test_real_tasks_are_read(task):
    examples = distill_glue.read_glue(generated_task.make_tokenizer(), GLUE, task, "validation", 16)
    assert set(examples.labels) == {0, 1}
    inputs, labels = next(examples.batches())
    assert inputs["input_ids"].shape[0] == len(labels) == 16
