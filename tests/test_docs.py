"""Every code block of the documents runs: Python blocks as they are, commands as far as their parts exist."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf8"), re.MULTILINE | re.DOTALL)


def name(document):
    return str(document.relative_to(ROOT))


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=name)
def test_python_blocks_run_in_order(document):
    namespace = {"__name__": "__main__"}
    for block in blocks(document, "python"):
        for needed in re.findall(r"^from (transformers)\b", block, re.MULTILINE):
            pytest.importorskip(needed)
        exec(compile(block, name(document), "exec"), namespace)


def commands():
    for document in DOCUMENTS:
        for block in blocks(document, "(?:sh|bash)"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.split("#")[0].strip():
                    yield pytest.param(shlex.split(line, comments=True), id=f"{name(document)}: {line.strip()}")


@pytest.mark.parametrize("command", list(commands()))
def test_commands_exist(command):
    while re.fullmatch(r"[A-Z_]+=.*", command[0]):  # environment variables in front
        command = command[1:]
    program, *arguments = command
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        assert arguments[0] == "install"
        assert not any("alpkd-fast" in argument for argument in arguments), "no package index has it"
    elif program == "alpkd":
        pytest.importorskip("transformers")
        main = importlib.import_module("alpkd_fast.cli.main")
        main.make_parser().parse_args(arguments)
    elif arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]) is not None
    elif arguments[0] == "examples/distill_glue.py":
        pytest.importorskip("transformers")
        from test_examples import distill_glue

        distill_glue.parse_arguments(arguments[1:])
    else:
        assert (ROOT / arguments[0]).is_file()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf8")):
        assert (document.parent / target).exists(), target


def test_info_reports_every_backend(capsys):
    import alpkd_fast
    from alpkd_fast import info

    info.main()
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    for backend, reason in alpkd_fast.backends().items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"backend {backend} ")]
        assert line.endswith("usable" if reason is None else reason)


def variables(files, pattern):
    return {name for file in files for name in re.findall(pattern, file.read_text(encoding="utf8"))}


def test_every_environment_variable_is_documented():
    """What the sources read, the documents name, and nothing else."""
    sources = [ROOT / "setup.py"]
    for folder in ("alpkd_fast", "kernels", "csrc"):
        sources += [path for suffix in ("py", "cu", "cpp") for path in (ROOT / folder).rglob(f"*.{suffix}")]
    read = variables(sources, r"env\w*\W{1,3}(?:get\W{1,2})?(ALPKD_FAST_\w+)")
    named = variables((ROOT / "README.md", ROOT / "docs" / "usage.md"), r"ALPKD_FAST_[A-Z_]*[A-Z]")
    assert read == named
