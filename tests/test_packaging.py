"""What is shipped: the sources are complete, a wheel holds one package, and it works without a compiler."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("alpkd_fast", "csrc", "kernels", "tests", "examples", "docs", "benchmarks")


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source distribution and a wheel built from a copy of the sources, without a compiler."""
    if not (ROOT / "setup.py").exists() or not (ROOT / ".git").exists():
        pytest.skip("the sources are not a git checkout")
    tree = tmp_path_factory.mktemp("sources")
    files = tracked()
    for name in files:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "bdist_wheel"],
        cwd=tree,
        check=True,
        capture_output=True,
        env={**os.environ, "ALPKD_FAST_CPU": "0", "ALPKD_FAST_CUDA": "0"},
    )
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    (wheel,) = (tree / "dist").glob("*.whl")
    return sdist, wheel


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def test_the_source_distribution_holds_every_source(archives):
    with tarfile.open(archives[0]) as archive:
        shipped = {name.split("/", 1)[-1] for name in archive.getnames()}
    missing = [name for name in tracked() if name.split("/")[0] in PARTS and name not in shipped]
    assert not missing
    assert {"setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE"} <= shipped


def test_a_wheel_installs_one_top_level_package(archives):
    names = zipfile.ZipFile(archives[1]).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"alpkd_fast"}
    assert "alpkd_fast/py.typed" in names
    for name in tracked():
        folder, *rest = name.split("/")
        if folder in ("alpkd_fast", "kernels") and name.endswith(".py"):
            assert "/".join(["alpkd_fast", *(["kernels"] if folder == "kernels" else []), *rest]) in names


def test_without_a_compiler_the_reference_runs_and_warns_once(archives, tmp_path):
    zipfile.ZipFile(archives[1]).extractall(tmp_path)
    program = """
import warnings, torch, alpkd_fast
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        alpkd_fast.alp_loss(torch.ones(2, 3, 4), torch.ones(3, 3, 4))
assert alpkd_fast.__file__.startswith(PATH), alpkd_fast.__file__
(warning,) = [w for w in caught if "reference" in str(w.message)]
assert "compil" in str(warning.message), warning.message
assert "compil" in alpkd_fast.backends()["cpu"]
"""
    program = f"import sys\nPATH = {str(tmp_path)!r}\nsys.path.insert(0, PATH)\n{program}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ALPKD_FAST_", "TRITON_"))}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, env=environment)


def test_only_torch_is_needed(tmp_path):
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"transformers", "triton", "datasets", "sklearn", "matplotlib", "yaml", "rich"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import alpkd_fast, alpkd_fast.info, torch
alpkd_fast.alp_loss(torch.ones(2, 3, 4), torch.ones(3, 3, 4))
alpkd_fast.info.main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, env=environment, capture_output=True)


def other_compilers():
    """Those beside the default that README promises to work with, by their names with a version."""
    files = (path for folder in os.get_exec_path() for path in Path(folder).glob("*++-*"))
    found = {name[0]: name for file in files if (name := re.fullmatch(r"(g|clang)\+\+-(\d+)", file.name))}
    return sorted(name for name, parts in found.items() if int(parts[2]) >= {"g": 11, "clang": 14}[parts[1]])


NO_OTHER = pytest.mark.skip(reason="neither g++-11 or newer nor clang++-14 or newer is found under such a name")


@pytest.mark.parametrize("compiler", other_compilers() or [pytest.param("", marks=NO_OTHER)])
def test_other_compilers_take_the_row_kernels(compiler):
    if not (ROOT / "setup.py").exists() or platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("needs the sources, and an x86-64 processor's instruction sets")
    script = (
        "import json, runpy, sys; sys.argv = ['setup.py', '-q', '--version'];"
        "print(json.dumps(runpy.run_path('setup.py')['INSTRUCTION_SET_FLAGS']))"
    )
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for source, flags in json.loads(said.splitlines()[-1]).items():
        command = [compiler, "-std=c++20", "-Icsrc", *flags, "-fsyntax-only", f"csrc/cpu/{source}"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
