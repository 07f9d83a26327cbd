"""finetune, distill and sweep on a tiny model: what they leave, resume and refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra [hf]")
from tiny import bert, sentences, write_jsonl
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer

from alpkd_fast.cli.main import main


def options(folder, teacher, output, *more, task="sst2"):
    return [
        "--teacher", str(teacher), "--task", task, "--data", str(folder / "data"), "--output", str(output), "--cpu",
        "--batch-size", "16", "--learning-rate", "1e-3", *more,
    ]  # fmt: skip


def test_finetune_makes_a_teacher(teacher):
    result = json.loads((teacher / "metrics.json").read_text())
    assert result["metrics"]["accuracy"] > 0.9
    assert result["settings"]["task"] == "sst2"
    assert {"python", "torch", "transformers"} <= set(result["environment"])
    assert (teacher / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (teacher / "checkpoints").exists()


def test_distill_leaves_student_metrics_and_plots(folder, teacher, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("method: alp-no\ndepth: 2\nepochs: 3\nseed: 3\n")
    assert main(["distill", "--config", str(config), *options(folder, teacher, tmp_path / "student")]) == 0
    result = json.loads((tmp_path / "student" / "metrics.json").read_text())
    assert result["metrics"]["accuracy"] > 0.9
    assert (result["settings"]["method"], result["settings"]["seed"]) == ("alp-no", 3)
    assert result["steps"] == 36
    attention = result["layer_attention"]
    assert [[w > 0 for w in row] for row in attention] == [[True, True, False, False], [False, False, True, True]]
    assert any("eval_accuracy" in log for log in result["history"])
    for name in ("curves.png", "attention.png"):
        assert (tmp_path / "student" / name).read_bytes().startswith(b"\x89PNG")
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert student.config.num_hidden_layers == 2
    assert "accuracy" in capsys.readouterr().out
    assert main(["distill", "--config", str(config), *options(folder, teacher, tmp_path / "student")]) == 2
    assert "holds a run already: it is finished" in capsys.readouterr().err


def test_distill_masked_language_model(folder, tmp_path):
    argv = options(folder, folder / "masked", tmp_path / "student", "--epochs", "1", "--depth", "2", task="mlm")
    assert main(["distill", *argv]) == 0
    result = json.loads((tmp_path / "student" / "metrics.json").read_text())
    assert set(result["metrics"]) == {"accuracy", "loss"}
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "student").config.num_hidden_layers == 2


def test_regression_with_two_sentences(folder, tmp_path):
    data = ["--task", "stsb", "--data", str(folder / "data"), "--cpu", "--epochs", "2", "--batch-size", "16"]
    assert main(["finetune", "--model", str(folder / "model"), "--output", str(tmp_path / "t"), *data]) == 0
    argv = options(folder, tmp_path / "t", tmp_path / "s", "--epochs", "1", "--depth", "2", task="stsb")
    assert main(["distill", *argv]) == 0
    assert set(json.loads((tmp_path / "s" / "metrics.json").read_text())["metrics"]) == {"pearson", "spearman"}


def test_ctrl_c_leaves_a_checkpoint_that_resume_takes_up(folder, teacher, tmp_path, capsys):
    more = ["--depth", "2", "--epochs", "20", "--save-steps", "5"]
    argv = ["distill", *options(folder, teacher, tmp_path / "run", *more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "alpkd_fast.cli.main", *argv]
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first = tmp_path / "run" / "checkpoints" / "checkpoint-5" / "trainer_state.json"
    deadline = time.monotonic() + 120
    while not first.exists() and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert f"interrupted after step {step} of 240" in " ".join(err.split())
    assert not (tmp_path / "run" / "metrics.json").exists()

    assert main(argv) == 2  # neither overwritten nor taken up without being asked
    assert "pass --resume to go on" in capsys.readouterr().err
    assert main([*argv, "--resume"]) == 0
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    steps = [log["step"] for log in result["history"] if "loss" in log]
    assert steps == [1, *range(10, 241, 10)]
    assert result["steps"] == 240
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_resume_without_a_checkpoint(folder, teacher, tmp_path, capsys):
    assert main(["distill", *options(folder, teacher, tmp_path / "run"), "--resume"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def interrupt_at(step, monkeypatch):
    """Ctrl-C in that training step, counted over all runs."""
    calls = []
    training_step = Trainer.training_step

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", interrupted)


def test_resume_refuses_other_settings(folder, teacher, tmp_path, monkeypatch, capsys):
    common = ["--epochs", "1", "--train-rows", "64"]
    distill = ["distill", *options(folder, teacher, tmp_path / "student", "--depth", "2", *common)]
    finetune = ["finetune", *options(folder, folder / "model", tmp_path / "tuned", *common)]
    finetune[finetune.index("--teacher")] = "--model"
    for argv, changes in (
        (distill, [["--method", "pkd-last"], ["--epochs", "2"], ["--seed", "9"], ["--layers", "first"]]),
        (finetune, [["--learning-rate", "1"]]),
    ):
        with monkeypatch.context() as patch:
            interrupt_at(2, patch)
            assert main(argv) == 130
        output = Path(argv[argv.index("--output") + 1])
        for name, value in changes:
            assert main([*argv, name, value, "--resume"]) == 2
            message = capsys.readouterr().err
            assert f"{name}: {output / 'checkpoints'} was begun with" in message
            assert "use the same value to go on, or another --output" in message
        # What does not change the result may differ, and the remedy of the message works.
        output.rename(output.with_name("moved"))
        argv[argv.index("--output") + 1] = str(output.with_name("moved"))
        assert main([*argv, "--save-steps", "3", "--resume"]) == 0
        result = json.loads((output.with_name("moved") / "metrics.json").read_text())
        assert (result["steps"], result["settings"]["epochs"]) == (4, 1)
        assert not (output.with_name("moved") / "checkpoints").exists()
        output.with_name("moved").rename(output)


def test_sweep_goes_on_after_ctrl_c(folder, teacher, tmp_path, monkeypatch, capsys):
    methods = ["kd", "alp", "alp:scale=1,pooling=mean"]
    argv = ["sweep", *options(folder, teacher, tmp_path / "out", "--epochs", "1"), "--methods", *methods]
    argv += ["--depths", "1", "2", "--seeds", "0", "1", "--resamples", "50"]
    interrupt_at(15, monkeypatch)  # in the second run
    assert main(argv) == 130
    runs = tmp_path / "out" / "runs"
    (done,) = runs.iterdir()
    written = done.stat().st_mtime_ns
    assert not (tmp_path / "out" / "summary.json").exists()

    assert main([*argv, "--temperature", "2"]) == 2
    assert "was begun with 5.0, got 2.0" in capsys.readouterr().err

    assert main(argv) == 0
    assert len(list(runs.iterdir())) == 3 * 2 * 2
    assert done.stat().st_mtime_ns == written
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(row["method"], row["depth"]) for row in summary["rows"]] == [(m, d) for d in (1, 2) for m in methods]
    for row in summary["rows"]:
        assert len(row["values"]) == 2
        assert (row["interval"] is None) == (row["method"] == "kd")
    assert len((tmp_path / "out" / "table.md").read_text().splitlines()) == 2 + 6
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--depths", "2", "9"], "--depths: got 9; allowed are 1 to the teacher's 4"),
        (
            ["--depths", "2", "1"],
            "--methods: pkd-skip at depth 1: method 'pkd-skip' leaves the last student layer out",
        ),
        (["--depths", "2", "3", "--layers", "0", "1"], "3 student layers need 3 teacher layers"),
    ],
)
def test_sweep_refuses_before_any_training(folder, teacher, tmp_path, more, message, capsys):
    argv = ["sweep", *options(folder, teacher, tmp_path / "out", *more)]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--depth", "9"], "num_layers: got 9; allowed are 1 to the teacher's 4"),
        (["--depth", "1", "--method", "pkd-skip"], "leaves the last student layer out"),
        (["--text-columns", "text"], "has no column 'text'; it has sentence, label, idx"),
        (["--text-columns", "a", "b", "c"], "a task takes at most two"),
    ],
)
def test_distill_refuses(folder, teacher, tmp_path, more, message, capsys):
    assert main(["distill", *options(folder, teacher, tmp_path / "run", *more)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_distill_refuses_missing_folders(folder, teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = options(folder, teacher, tmp_path / "run")
    argv[argv.index("--data") + 1] = str(tmp_path)
    assert main(["distill", *argv]) == 2
    assert "has no train with one of .jsonl" in capsys.readouterr().err
    assert main(["distill", *options(folder, tmp_path / "nothing", tmp_path / "run")]) == 2
    assert "is neither a folder with a transformers model" in capsys.readouterr().err


def test_rows_longer_than_the_model_s_positions(folder, teacher, tmp_path, capsys):
    rows = sentences(32)
    rows[7]["sentence"] = "good " * 99
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    argv = options(folder, teacher, tmp_path / "run", "--depth", "2", "--epochs", "1")
    argv[argv.index("--data") + 1] = str(tmp_path / "data")
    assert main(["distill", *argv]) == 2
    assert f"a row of 101 tokens is left, {teacher} takes at most 32; pass --max-length 32" in capsys.readouterr().err
    assert main(["distill", *argv, "--max-length", "32"]) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_trained_is_float32_whatever_the_file_holds(folder, teacher, tmp_path, dtype):
    for name, source in (("model", folder / "model"), ("teacher", teacher)):
        model = AutoModelForSequenceClassification.from_pretrained(source).to(dtype)
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / name)
    common = ["--task", "sst2", "--data", str(folder / "data"), "--cpu", "--epochs", "1", "--train-rows", "32"]
    argv = ["finetune", "--model", str(tmp_path / "model"), *common]
    assert main([*argv, "--output", str(tmp_path / "tuned")]) == 0
    outputs = ["tuned"]
    for precision, made in (("fp32", ["--depth", "2"]), ("bf16", ["--student", str(tmp_path / "model")])):
        outputs.append(precision)
        argv = ["distill", "--teacher", str(tmp_path / "teacher"), *common, *made, "--precision", precision]
        assert main([*argv, "--output", str(tmp_path / precision)]) == 0
    for name in outputs:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name, dtype="auto")
        assert {p.dtype for p in model.parameters()} == {torch.float32}, name


def test_a_class_that_the_chosen_rows_lack(folder, tmp_path):
    """The last class stands in one row of 192; --train-rows 4 leaves it out, and the validation rows lack it."""
    rows = sentences(192)
    write_jsonl(tmp_path / "data" / "train.jsonl", [*rows[:-1], {**rows[-1], "label": 2}])
    write_jsonl(tmp_path / "data" / "validation.jsonl", sentences(20))
    data = ["--task", "classification", "--text-columns", "sentence", "--data", str(tmp_path / "data"), "--cpu"]
    data += ["--train-rows", "4", "--epochs", "1"]
    assert main(["finetune", "--model", str(folder / "model"), *data, "--output", str(tmp_path / "t")]) == 0
    teacher = AutoModelForSequenceClassification.from_pretrained(tmp_path / "t")
    assert teacher.config.num_labels == 3
    # Where no row has the class, the teacher's outputs count.
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    for name, made in (("s", ["--depth", "2"]), ("s2", ["--student", str(folder / "model")])):
        argv = ["distill", "--teacher", str(tmp_path / "t"), *data, *made, "--output", str(tmp_path / name)]
        assert main(argv) == 0
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path / name).config.num_labels == 3


def test_a_class_of_the_validation_rows_alone(folder, tmp_path):
    write_jsonl(tmp_path / "data" / "train.jsonl", sentences(32))
    rows = sentences(20)
    write_jsonl(tmp_path / "data" / "validation.jsonl", [*rows, {**rows[0], "label": 2}])
    data = ["--task", "classification", "--text-columns", "sentence", "--data", str(tmp_path / "data"), "--cpu"]
    argv = ["finetune", "--model", str(folder / "model"), *data, "--epochs", "1", "--output", str(tmp_path / "t")]
    assert main(argv) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "t").config.num_labels == 3


def test_a_task_with_fixed_classes_refuses_a_teacher_of_more(folder, tmp_path, capsys):
    bert(num_labels=3).save_pretrained(tmp_path / "three")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "three")
    assert main(["distill", *options(folder, tmp_path / "three", tmp_path / "run")]) == 2
    assert "has 3 outputs, task sst2 needs 2" in capsys.readouterr().err


def test_teacher_of_another_task(folder, tmp_path, capsys):
    rows = [{**row, "label": index % 3} for index, row in enumerate(sentences(30))]
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    argv = ["distill", *options(folder, folder / "model", tmp_path / "run", "--text-columns", "sentence")]
    argv[argv.index("--data") + 1] = str(tmp_path / "data")
    argv[argv.index("--task") + 1] = "classification"
    assert main(argv) == 2
    assert "has 2 outputs, task classification needs 3" in capsys.readouterr().err
