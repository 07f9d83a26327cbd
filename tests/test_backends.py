"""Which backend a call takes: the registry, the environment, instruction sets, and an install without a binary."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from common import both_sides

import alpkd_fast
from alpkd_fast.backends import REGISTRY, choose, cuda
from alpkd_fast.problem import make_problem

TESTS = Path(__file__).parent
PACKAGE = Path(alpkd_fast.__file__).parent
FLAGS = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
AVX512 = ["avx512f", "avx512bw", "avx512dq", "avx512vl"]
INSTRUCTION_SETS = {
    "plain": [],
    "avx2": ["avx2", "fma", "f16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "avx512_bf16"],
}
# Every path through the row kernels: dtypes, widths with every remainder, options, pooling, masks.
PATHS = "shapes_and_dtypes or widths or value_and_gradients or weights or any_table or caches or scale_tensor_gets"


def python(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=os.environ | environment
    )


def needs_cpu():
    reason = alpkd_fast.backends()["cpu"]
    if reason is not None:
        pytest.skip(f"cpu: {reason}")


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_instruction_set(isa):
    needs_cpu()
    if any(flag not in FLAGS for flag in INSTRUCTION_SETS[isa]):
        pytest.skip(f"this processor has not {isa}")
    files = [str(TESTS / f"test_{name}.py") for name in ("parity", "masking", "layer_maps", "options")]
    run = python(
        "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--backends", "cpu", "-k", PATHS, *files,
        cwd=TESTS.parent, ALPKD_FAST_CPU_ISA=isa,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_instruction_sets_give_their_own_sums():
    """The variable has an effect: another width, and products in pairs, add in another order."""
    needs_cpu()
    available = [isa for isa, flags in INSTRUCTION_SETS.items() if all(flag in FLAGS for flag in flags)]
    script = textwrap.dedent("""
        import torch, alpkd_fast
        torch.manual_seed(0)
        student = torch.randn(2, 40, 704).bfloat16().requires_grad_()
        teacher = torch.randn(3, 40, 704).bfloat16()
        output = alpkd_fast.alp_loss(student, teacher, backend="cpu", return_details=True)
        print(output.attention.double().pow(2).sum().item().hex())
    """)
    seen = {python("-c", script, ALPKD_FAST_CPU_ISA=isa).stdout for isa in available}
    assert len(seen) == len(available)
    assert "" not in seen


@pytest.mark.parametrize("isa", ["sse9", "avx512"])
def test_an_instruction_set_that_is_not_there(isa):
    needs_cpu()
    if isa == "avx512" and "avx512f" in FLAGS:
        pytest.skip("this processor has avx512")
    script = "import torch, alpkd_fast as a; a.alp_loss([torch.ones(1, 2)], [torch.ones(1, 2)], backend='cpu')"
    run = python("-c", script, ALPKD_FAST_CPU_ISA=isa)
    assert run.returncode != 0
    assert f"ALPKD_FAST_CPU_ISA={isa}" in run.stderr
    assert "unset it" in run.stderr


def test_backends_tells_which_are_usable():
    found = alpkd_fast.backends()
    assert found["reference"] is None
    assert {"cpu", "reference"} <= found.keys()
    for name, reason in found.items():
        assert reason is None or len(reason) > 10, f"{name} is unusable without a reason"


def test_auto_takes_the_cpu_backend_here():
    student, teacher = both_sides(2, 3, (4,), 5)
    usable = "cpu" if alpkd_fast.backends()["cpu"] is None else "reference"
    got = alpkd_fast.alp_loss(student, teacher)
    assert torch.equal(got, alpkd_fast.alp_loss(student, teacher, backend=usable))


@pytest.mark.parametrize(
    ("usable", "slow", "chosen"),
    [
        ("cuda triton", "", "cuda"),
        ("cuda triton", "cuda", "triton"),
        ("cuda", "cuda", "cuda"),
        ("triton", "", "triton"),
    ],
)
def test_auto_takes_the_fastest_on_a_gpu(monkeypatch, usable, slow, chosen):
    """Where CUDA's kernel for a problem measured slower than Triton's, Triton comes first, but the reference never."""
    for name, backend in REGISTRY.items():
        monkeypatch.setattr(backend, "unavailable", lambda name=name: None if name in usable else "it is not here")
        monkeypatch.setattr(backend, "cannot_run", lambda problem: None)
        monkeypatch.setattr(backend, "measured_slow", lambda problem, name=name: name in slow)
    monkeypatch.setattr(REGISTRY["reference"], "unavailable", lambda: None)
    assert chosen == choose("auto", None).NAME
    assert choose("cuda" if "cuda" in usable else "triton", None).NAME in usable  # an explicit name wins


@pytest.mark.parametrize(
    ("options", "dtypes", "slow"),
    [
        ({}, "f32-f32", False),
        ({"normalize": True}, "f32-f32", True),
        ({"normalize": True}, "f64-f64", False),
        ({"pooling": "mean"}, "bf16-bf16", True),
        ({"pooling": "cls", "normalize": True}, "f32-f32", False),
    ],
    ids=str,
)
def test_cuda_is_slow_with_many_rows_for_its_generic_kernel(monkeypatch, options, dtypes, slow):
    """[CLS] rows are few, whatever the sequences' length; a mean reads them all."""
    monkeypatch.setattr(cuda, "FEW_ROWS", 7)
    monkeypatch.setattr(cuda, "_shared_bytes", lambda device: 232448)
    student, teacher = both_sides(2, 3, (2, 4), 32, dtypes)
    teacher = [h.detach() for h in teacher]
    problem = make_problem(student, teacher, **options)
    assert cuda.measured_slow(problem) == slow


@pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per-layer"])
@pytest.mark.parametrize(
    ("dtype", "weight_grad", "ran"),
    [(torch.float32, False, "cuda"), (torch.float32, True, "triton"), (torch.bfloat16, False, "triton")],
)
def test_auto_chooses_for_the_projected_teacher(monkeypatch, dtype, weight_grad, ran, per_layer):
    """It is in fp32 whatever the states are, and needs a gradient where W does: CUDA has no fast kernel for either."""
    calls = []
    for name, backend in REGISTRY.items():
        reason = None if name in ("cuda", "triton") else "it is not here"
        monkeypatch.setattr(backend, "unavailable", lambda reason=reason: reason)
        monkeypatch.setattr(backend, "cannot_run", lambda problem: None)
        run = REGISTRY["reference"].run
        monkeypatch.setattr(backend, "run", lambda problem, name=name, run=run: calls.append(name) or run(problem))
    monkeypatch.setattr(cuda, "FEW_ROWS", 7)
    monkeypatch.setattr(cuda, "_shared_bytes", lambda device: 232448)
    student, teacher = [torch.randn(8, 32, dtype=dtype)] * 2, [torch.randn(8, 16, dtype=dtype)] * 3
    weight = torch.randn(2, 32, 16) if per_layer else torch.randn(32, 16)
    alpkd_fast.alp_loss(student, teacher, proj_weight=weight.requires_grad_(weight_grad))
    assert calls == [ran] * (2 if per_layer else 1)


def test_environment_replaces_auto_only(monkeypatch):
    student, teacher = both_sides(2, 3, (4,), 5)
    monkeypatch.setenv("ALPKD_FAST_BACKEND", "reference")
    name = alpkd_fast.alp_loss(student, teacher).grad_fn.name()
    assert "FusedLoss" not in name
    if alpkd_fast.backends()["cpu"] is None:
        assert "FusedLoss" in alpkd_fast.alp_loss(student, teacher, backend="cpu").grad_fn.name()
    monkeypatch.setenv("ALPKD_FAST_BACKEND", "gpu")
    with pytest.raises(ValueError, match="'gpu'"):
        alpkd_fast.alp_loss(student, teacher)
    alpkd_fast.alp_loss(student, teacher, backend="reference")


def test_without_the_binary_auto_takes_the_reference_and_warns_once(tmp_path):
    """The package as it installs where no compiler is."""
    shutil.copytree(PACKAGE, tmp_path / "alpkd_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    script = textwrap.dedent("""
        import sys, warnings
        sys.path.insert(0, ".")
        import torch, alpkd_fast
        assert alpkd_fast.__file__.startswith(sys.argv[1]), alpkd_fast.__file__
        student, teacher = torch.ones(2, 3, 4).requires_grad_(), torch.zeros(3, 3, 4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                alpkd_fast.alp_loss(student, teacher).backward()
        assert [w.category for w in caught] == [RuntimeWarning], caught
        assert "compiler" in str(caught[0].message), caught[0].message
        assert alpkd_fast.backends()["cpu"] is not None
        try:
            alpkd_fast.alp_loss(student, teacher, backend="cpu")
        except RuntimeError as error:
            assert "compiler" in str(error) and "install" in str(error), error
        else:
            raise AssertionError("it ran")
        print("fine")
    """)
    run = python("-c", script, str(tmp_path), cwd=tmp_path)
    assert run.stdout.strip() == "fine", run.stderr


def test_a_binary_that_does_not_load_is_named(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "alpkd_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "alpkd_fast" / "_C.abi3.so").write_bytes(b"not a library")
    script = "import sys; sys.path.insert(0, '.'); import alpkd_fast; print(alpkd_fast.backends()['cpu'])"
    run = python("-c", script, cwd=tmp_path)
    assert "does not load" in run.stdout, run.stderr
    assert torch.__version__ in run.stdout


def test_the_core_needs_torch_alone():
    script = textwrap.dedent("""
        import sys, torch
        before = set(sys.modules)
        import alpkd_fast
        extras = {"transformers", "datasets", "accelerate", "sklearn", "matplotlib", "rich", "tqdm", "yaml"}
        print(sorted(extras & {name.split(".")[0] for name in set(sys.modules) - before}))
    """)
    run = python("-c", script)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
