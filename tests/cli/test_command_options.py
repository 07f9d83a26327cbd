"""Wrong options fail at once and say what is allowed; a missing extra gives the pip command."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from alpkd_fast.cli import distill
from alpkd_fast.cli.main import main, make_parser
from alpkd_fast.cli.options import distillation_config, with_config_file

DISTILL = ["distill", "--teacher", "nowhere", "--task", "sst2", "--data", "nowhere", "--output", "unused"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*DISTILL, "--method", "pkd"], "choose from"),
        ([*DISTILL, "--pooling", "max"], "choose from"),
        ([*DISTILL, "--epochs", "0"], "above 0"),
        ([*DISTILL, "--batch-size", "1.5"], "whole and above 0"),
        ([*DISTILL, "--teacher-batch-size", "0"], "whole and above 0"),
        ([*DISTILL, "--kd-weight", "much"], "of at least 0"),
        ([*DISTILL, "--warmup", "2"], "from 0 to 1"),
        ([*DISTILL, "--methd", "alp"], "unrecognized arguments: --methd"),
        (["distill", "--task", "sst3"], "choose from"),
        (["distill"], "the following arguments are required: --teacher"),
        (["train"], "choose from"),
        ([], "required: COMMAND"),
    ],
)
def test_the_parser_refuses(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*DISTILL, "--method", "uniform", "--scale", "1"], "method 'uniform' fixes it to 0"),
        ([*DISTILL, "--layers", "even"], "allowed are skip, first, last or indices"),
        ([*DISTILL, "--config", "missing.yaml"], "--config: there is no file missing.yaml"),
        ([*DISTILL, "--student", "s", "--depth", "4"], "--depth: --student s has its own layers; leave one of"),
        ([*DISTILL, "--student", "s", "--layers", "skip"], "--layers: --student s has its own layers"),
        ([*DISTILL, "--student", "s", "--hidden-size", "8"], "--hidden-size: --student s has its own layers"),
        ([*DISTILL, "--method", "kd", "--pooling", "cls"], "--pooling: got cls, but method 'kd' uses no hidden states"),
        ([*DISTILL, "--method", "kd", "--alp-weight", "9"], "--alp-weight: got 9.0, but method 'kd'"),
        ([*DISTILL, "--method", "kd", "--layer-map", "skip"], "--layer-map: got skip, but method 'kd'"),
        ([*DISTILL, "--method", "kd", "--no-projection-bias"], "--projection-bias: got False, but method 'kd'"),
        (
            ["sweep", *DISTILL[1:], "--methods", "kd:pooling=mean"],
            "'kd:pooling=mean' sets 'pooling'; allowed are temperature, ce_weight, kd_weight",
        ),
        (["sweep", *DISTILL[1:], "--methods", "pkd"], "--methods: got 'pkd'; allowed are kd"),
        (["sweep", *DISTILL[1:], "--methods", "alp:tau=1"], "sets 'tau'; allowed are scale"),
        (["sweep", *DISTILL[1:], "--methods", "alp:scale=big"], "scale the value 'big'"),
        (["sweep", *DISTILL[1:], "--methods", "alp:pooling=max"], "pooling: got 'max'; allowed are"),
    ],
)
def test_the_commands_refuse_before_loading(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in ("distill", "finetune", "sweep", "info"))])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 0
    assert "usage: alpkd" in capsys.readouterr().out


def test_config_file_comes_before_the_command_line(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    path.write_text("task: sst2\nnormalize: false\ncpu: true\nlayers: [1, 3]\nscale: null\nalp-weight: 10\n")
    argv = with_config_file(["distill", "--config", str(path), "--task", "cola"])
    assert argv == [
        "distill", "--task", "sst2", "--no-normalize", "--cpu", "--layers", "1", "3", "--alp-weight", "10",
        "--task", "cola",
    ]  # fmt: skip


def boolean_options(command):
    """Names as a file has them, of the command's options that take no value."""
    commands = next(action.choices for action in make_parser()._actions if isinstance(action.choices, dict))
    actions = [action for action in commands[command]._actions if action.nargs == 0 and action.dest != "help"]
    return [action.option_strings[0].removeprefix("--") for action in actions]


@pytest.mark.parametrize("command", ["distill", "finetune", "sweep"])
@pytest.mark.parametrize("value", [True, False])
def test_every_boolean_option_can_stand_in_a_file(command, value, tmp_path):
    pytest.importorskip("yaml")
    names = boolean_options(command)
    assert "cpu" in names
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{name}: {str(value).lower()}\n" for name in names))
    argv = [command, *DISTILL[1:], "--config", str(path)]
    if command == "finetune":
        argv[1] = "--model"
    args = vars(make_parser().parse_args(with_config_file(argv)))
    assert [args[name.replace("-", "_")] for name in names] == [value] * len(names)


def test_options_reach_the_configuration(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    path.write_text("teacher-batch-size: 4\npooling: token\n")
    args = make_parser().parse_args(with_config_file([*DISTILL, "--config", str(path), "--pooling", "mean"]))
    config = distillation_config(args, args.method, args.seed)
    assert (config.teacher_batch_size, config.pooling) == (4, "mean")


def test_a_student_made_from_the_teacher_has_its_options_recorded():
    args = make_parser().parse_args(DISTILL)
    distill.complete(args)
    assert (args.depth, args.layers, args.hidden_size) == (4, ["skip"], None)
    args = make_parser().parse_args([*DISTILL, "--student", "s"])
    distill.complete(args)
    assert (args.depth, args.layers, args.hidden_size) == (None, None, None)


def test_config_file_with_a_wrong_name(tmp_path, capsys):
    pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    path.write_text("tasks: sst2\n")
    with pytest.raises(SystemExit):
        main([*DISTILL, "--config", str(path)])
    assert "unrecognized arguments: --tasks" in capsys.readouterr().err


def test_config_file_that_is_no_yaml(tmp_path, capsys):
    pytest.importorskip("yaml")
    path = tmp_path / "run.yaml"
    path.write_text("task: [sst2\nfoo: }")
    assert main([*DISTILL, "--config", str(path)]) == 2
    assert f"--config: {path} is no YAML; write one 'option: value' a line" in capsys.readouterr().err


def run_without(modules, *argv):
    block = f"import sys; sys.modules.update(dict.fromkeys({modules}))"
    code = f"{block}\nfrom alpkd_fast.cli.main import main\nsys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120)


EXTRA = ["transformers", "accelerate", "datasets", "sklearn", "scipy", "matplotlib", "rich", "yaml", "numpy"]


def test_info_needs_torch_alone():
    done = run_without(EXTRA, "info")
    assert done.returncode == 0, done.stderr
    assert re.search("backend reference +usable", done.stdout)


@pytest.mark.parametrize("command", ["distill", "sweep", "finetune"])
def test_missing_extra_gives_the_pip_command(command):
    argv = ["--model" if word == "--teacher" and command == "finetune" else word for word in DISTILL[1:]]
    done = run_without(EXTRA, command, *argv)
    assert done.returncode == 2
    assert 'transformers, which is not installed: pip install "alpkd-fast[hf]"' in done.stderr
    assert "Traceback" not in done.stderr
