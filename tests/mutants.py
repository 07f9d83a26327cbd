"""Breaks the project on purpose, one fault at a time, and reports which faults the tests notice.

    python tests/mutants.py [--jobs N] [NAME ...]

Each mutant is a copy of the tree with one line changed. C++ mutants are built for the plain instruction
set only and without optimisation of link or size; the tests named beside the fault run until the first
failure. A mutant that survives is a hole in the tests: the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # files of tests/, without test_ and .py


KERNEL, HOST = "csrc/cpu/row_kernel.h", "csrc/cpu/alp_cpu.cpp"
ATTENTION = "csrc/cpu/layer_attention.cpp"
MUTANTS = [
    # ---- the row kernel
    Mutant("dropped-tau-term-of-student-gradient", KERNEL, "gradient{m, varies ? n : 0,", "gradient{m, 0,", "parity"),
    Mutant("dropped-tau-term-of-teacher-gradient", KERNEL, "const int count = through_attention() ? 2 * m : m;",
           "const int count = m;", "parity"),
    Mutant("tau-term-in-spite-of-detach", KERNEL, "with_gradient() && !p.detach && (", "with_gradient() && (",
           "options"),
    Mutant("softmax-mean-not-subtracted", KERNEL, "(load<V>(products + k) - mean)", "load<V>(products + k)", "parity"),
    Mutant("scale-gradient-sign", KERNEL, "partial.d_scale[0] -= ", "partial.d_scale[0] += ", "options"),
    Mutant("no-maximum-subtracted", KERNEL, "exp_nonpositive(load<V>(z + k) * scale - top)",
           "exp_nonpositive(load<V>(z + k) * scale)", "parity numerics"),
    Mutant("mask-ignored", KERNEL, "if (mu == 0) {", "if (false) {", "masking"),
    Mutant("masked-row-keeps-old-gradient", KERNEL,
           "if (layer.grad != nullptr) zero_gradient(layer.grad + r * bytes, bytes);", "(void)bytes;", "masking"),
    Mutant("padding-past-the-caches-not-written", KERNEL, "k < bytes; k += ALP_VECTOR_BYTES) stream(at + k",
           "k < 0; k += ALP_VECTOR_BYTES) stream(at + k", "parity"),
    Mutant("stale-attention-of-masked-rows", KERNEL,
           "for (int i = 0; i < p.m; ++i) zero_attention(i, r);\n  }\n  void skip",
           ";\n  }\n  void skip", "masking options"),
    Mutant("stale-attention-outside-the-map", KERNEL, "for (int j = 0; j < p.n; ++j) attention[j] = 0;", ";",
           "layer_maps"),
    Mutant("row-weight-missing-in-gradient", KERNEL, "weight[i] = A(p.gradient_coef[i] * mu);",
           "weight[i] = A(p.gradient_coef[i]);", "masking"),
    Mutant("row-weight-missing-in-loss", KERNEL, "partial.loss[g.student[i]] += mu * double(sum",
           "partial.loss[g.student[i]] += double(sum", "masking"),
    Mutant("row-weight-missing-in-entropy", KERNEL, "+= mu * entropy;", "+= entropy;", "masking"),
    Mutant("wrong-mean-pooling-share-forward", KERNEL, "const A share = A(weight_k / mean_total);\n      with_type",
           "const A share = A(1 / mean_total);\n      with_type", "masking pooling"),
    Mutant("wrong-mean-pooling-share-backward", KERNEL, "const A share = A(weight_k / mean_total);\n        for",
           "const A share = A(1.0 / p.seq);\n        for", "pooling"),
    Mutant("one-share-for-all-tokens-of-a-mean", KERNEL,
           "if (weight_k != weight_of_spare)", "if (weight_of_spare == 0)", "pooling"),
    Mutant("last-columns-left-out-of-a-mean", "csrc/cpu/vec.h", "out[d] += share * A(widen(row[d]));", ";", "pooling"),
    Mutant("last-takes-the-final-position", KERNEL, "while (k > 0 && row_weight(p, first + k) == 0) --k;", "",
           "pooling"),
    Mutant("tokens-that-were-not-pooled-keep-old-gradient", KERNEL,
           "if (active) zero_gradient(sequence + (keep + 1) * bytes, (p.seq - keep - 1) * bytes);", "", "pooling"),
    Mutant("gradient-of-inactive-layer-not-zeroed", KERNEL,
           "if (layer.grad == nullptr || (active && p.pooling == Pooling::token)) return;",
           "if (layer.grad == nullptr || p.pooling == Pooling::token) return;", "options layer_maps"),
    Mutant("normalize-without-projection-of-the-student-side", KERNEL, "A along_x = length_x < eps ? A(0) : ",
           "A along_x = length_x < 1e30 ? A(0) : ", "options"),
    Mutant("normalize-epsilon-missing", KERNEL, "(length_x < eps ? eps : length_x)", "length_x", "options"),
    Mutant("layer-of-other-group-compared", KERNEL, "combine_one(group_t[0], a[i], n - 1,",
           "combine_one(own_t, a[i], n - 1,", "options layer_maps"),
    Mutant("student-rows-not-read-where-the-attention-is-constant", KERNEL,
           "for (int i = 0; s != nullptr && i < m; ++i)", "for (int i = 0; false && i < m; ++i)", "options layer_maps"),
    # ---- the layer attention alone
    Mutant("scores-of-gradients-for-queries", KERNEL, "Operands<A, S>{group_q, t}, width",
           "Operands<A, S>{group_s, t}, width", "projection"),
    Mutant("teacher-gradient-of-gradients-for-queries", KERNEL, "rows[m + i] = own_q", "rows[m + i] = own_s",
           "projection"),
    Mutant("attention-of-another-row", KERNEL, "const A* attention = attention_row(g.student[i], r);",
           "const A* attention = attention_row(g.student[i], 0);", "projection"),
    Mutant("layer-attention-reads-masked-rows", ATTENTION, "if (options.counted) weights", "if (false) weights",
           "masking"),
    Mutant("layer-attention-ignores-the-map", ATTENTION, "groups(m, n, options.map_counts,", "groups(m, n, {},",
           "projection"),
    Mutant("layer-attention-in-spite-of-detach", ATTENTION, "problem.detach = detach_attention;", "", "projection"),
    # ---- the products
    Mutant("sums-of-the-second-tile-over-the-first", "csrc/cpu/products.h", "(o, i, n, width, sums + i * n, ahead)",
           "(o, i, n, width, sums, ahead)", "parity"),
    Mutant("residual-sums-of-the-second-tile-over-the-first", "csrc/cpu/products.h", "*sums = r.sums + i0 * r.n;",
           "*sums = r.sums;", "parity"),
    Mutant("residual-columns-after-the-last-tile-dropped", "csrc/cpu/products.h",
           "for (; d < width; d += kSpan<S> * W)", "for (; false; d += kSpan<S> * W)", "parity"),
    Mutant("columns-after-the-last-vector-dropped", "csrc/cpu/products.h",
           "for (; d < width; d += kRest * W)", "for (; false; d += kRest * W)", "parity"),
    Mutant("bf16-read-in-pairs-written-in-order", KERNEL,
           "    write_row(layer.grad + position * p.D * dtype_size(type), type, row);",
           "const bool was = as_they_are;\nas_they_are = false;\n"
           "write_row(layer.grad + position * p.D * dtype_size(type), type, row);\nas_they_are = was;", "parity"),
    Mutant("bf16-gathered-in-order-read-in-pairs", "csrc/cpu/vec.h",
           "for (int v = 0; v < kSpan<T>; ++v) store(out + d + v * kWidth<A>, load_wide(row + d, v));",
           "for (int v = 0; v < kSpan<T> * kWidth<A>; ++v) out[d + v] = widen(row[d + v]);", "parity"),
    Mutant("last-column-not-read", "csrc/cpu/vec.h",
           "for (; d < D; ++d) out[d] = A", "for (; d + 1 < D; ++d) out[d] = A", "parity"),
    # ---- the host
    Mutant("missing-1-over-N", HOST, "? omega[i] * sums.loss[i] / N : 0;", "? omega[i] * sums.loss[i] : 0;", "parity"),
    Mutant("N-without-m", HOST, "double(m) * double(D) * (normalizer", "double(D) * (normalizer", "parity"),
    Mutant("normalizer-ignored", HOST, "(normalizer > 0 ? normalizer : mu.total)", "mu.total", "options"),
    Mutant("layer-weight-dropped-from-gradient", HOST, "share * omega[i] : factor", "share : factor", "options"),
    Mutant("layer-weight-dropped-from-fp16-gradient", HOST, "? omega[i] / (largest_omega * mu.largest) : 0;",
           "? 1 / mu.largest : 0;", "options"),
    Mutant("fp16-gradients-stored-with-1-over-N", HOST,
           "(students.wanted && student_dtype == Dtype::f16) ||", "false ||", "numerics"),
    Mutant("wrong-second-stride", "csrc/tensors.h",
           "layer->outer_stride = strides[1];", "layer->outer_stride = strides[0];", "strides"),
    Mutant("strided-columns-not-copied", "csrc/tensors.h",
           "if (tensor.size(last) > 1 && tensor.stride(last) != 1) return false;", "", "strides"),
    Mutant("negative-weights-let-through", HOST, "weight >= 0 && weight < HUGE_VAL", "weight == weight", "errors"),
    Mutant("chunks-by-threads", "csrc/cpu/rows.cpp", "return std::clamp<int64_t>(rows / 64, 1, 64);",
           "return std::clamp<int64_t>(rows / torch::stable::get_num_threads() / 2, 1, 4096);", "determinism"),
    # ---- Python
    Mutant("wrong-bucket-border", "alpkd_fast/layer_maps.py", "i * n // m for i", "-(-i * n // m) for i", "layer_maps"),
    Mutant("overlap-on-one-side", "alpkd_fast/layer_maps.py", "max(cut[i] - 1, 0)", "cut[i]", "layer_maps"),
    Mutant("skip-takes-the-first-of-a-bucket", "alpkd_fast/layer_maps.py", "((cut[i + 1] - 1,)", "((cut[i],)",
           "layer_maps"),
    Mutant("backward-scales-in-place-twice", "alpkd_fast/ops.py",
           "not torch._C._autograd._get_current_graph_task_keep_graph()", "True", "backward"),
    Mutant("incoming-gradient-ignored", "alpkd_fast/ops.py", "factor = grad_loss * grad_factor", "factor = grad_factor",
           "backward"),
    Mutant("scale-gradient-not-scaled", "alpkd_fast/ops.py", "(d_scale * grad_loss)", "(d_scale * 1)", "backward"),
    Mutant("second-derivative-not-refused", "alpkd_fast/ops.py", "if torch.is_grad_enabled():", "if False:",
           "backward"),
    Mutant("reference-keeps-attention-attached", "alpkd_fast/reference.py", "a = a.detach()\n", "a = a * 1\n",
           "options"),
    Mutant("reference-reads-masked-rows", "alpkd_fast/reference.py", "torch.where(counted, h.to(dtype), 0.0) for",
           "h.to(dtype) * counted for", "masking"),
    Mutant("projection-ignores-the-map", "alpkd_fast/projection.py",
           "for i, allowed in enumerate(_allowed(problem)):", "for i, allowed in enumerate([range(n)] * m):",
           "projection"),
    Mutant("projection-counts-one-layer", "alpkd_fast/projection.py", "else 1.0 / m", "else 1.0", "projection"),
    Mutant("projection-reads-layers-outside-the-map", "alpkd_fast/projection.py",
           "read = len(problem.teacher), sorted(set().union(*_allowed(problem)))",
           "read = len(problem.teacher), list(range(len(problem.teacher)))", "projection"),
    Mutant("query-side-in-spite-of-more-products", "alpkd_fast/projection.py", "(2 * projected - 6 * m) * D_s >",
           "(2 * projected - 2 * m) * D_s >", "projection_forms"),
]  # fmt: skip

# Beside the backend that a fault is in, nothing needs to run.
BACKEND = {"alpkd_fast/reference.py": "reference"}


def copy_tree(to: Path) -> None:
    for name in ("alpkd_fast", "csrc", "kernels", "tests"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", ".hypothesis"))
    shutil.copy(ROOT / "pyproject.toml", to)
    # One instruction set is enough, and quicker to build.
    for file in (to / "csrc").rglob("*.[ch]*"):
        file.write_text(file.read_text().replace("defined(__x86_64__)", "0"))


def build(tree: Path, objects: Path) -> None:
    """Compile the C++ library of a tree; an object whose preprocessed source was seen before is reused."""
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = ["-std=c++20", "-O1", "-ffp-contract=fast", "-fvisibility=hidden", "-fPIC", "-fno-strict-aliasing",
             "-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Icsrc", "-w",
             f"-I{sysconfig.get_paths()['include']}", *(f"-I{path}" for path in include_paths())]  # fmt: skip
    linked = []
    for source in sorted(path for path in (tree / "csrc").rglob("*.cpp")):
        source = str(source.relative_to(tree))
        text = _call(["g++", *flags, "-E", "-P", source], tree)
        target = objects / (hashlib.sha256(text.encode()).hexdigest()[:24] + ".o")
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}-{id(tree)}.part")
            _call(["g++", *flags, "-c", source, "-o", str(part)], tree)
            part.rename(target)
        linked.append(str(target))
    libraries = [f"-L{path}" for path in library_paths()]
    _call(["g++", "-shared", *linked, *libraries, "-ltorch_cpu", "-o", "alpkd_fast/_C.abi3.so"], tree)


def _call(command: list[str], cwd: Path) -> str:
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:1] + command[-4:])}: {run.stderr[-2000:]}")
    return run.stdout


def run_tests(tree: Path, tests: str, backend: str) -> str:
    """Return the first failing test, or ""."""
    files = [f"tests/test_{name}.py" for name in tests.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider", "--backends", backend]
    run = subprocess.run(
        [*command, *files], cwd=tree, capture_output=True, text=True, timeout=1200,
        env=os.environ | {"PYTHONPATH": str(tree), "ALPKD_FAST_CPU_ISA": "plain"},
    )  # fmt: skip
    if run.returncode == 0:
        return ""
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if run.returncode < 0:
        return f"killed by signal {-run.returncode}"
    if not failed:
        raise RuntimeError(f"the tests did not run: {run.stdout[-1500:]}{run.stderr[-1500:]}")
    return failed[0].split(" - ")[0].removeprefix("FAILED ")


def judge(mutant: Mutant | None, objects: Path, tests: str = "") -> str:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        if mutant is not None:
            path = tree / mutant.file
            old, new = (text.replace("defined(__x86_64__)", "0") for text in (mutant.old, mutant.new))
            text = path.read_text()
            if text.count(old) != 1:
                return f"STALE: its line is there {text.count(old)} times"
            path.write_text(text.replace(old, new))
        build(tree, objects)
        backend = "cpu" if mutant is None else BACKEND.get(mutant.file, "cpu")
        caught = run_tests(tree, tests if mutant is None else mutant.tests, backend)
        return f"caught by {caught}" if caught else "SURVIVED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("names", nargs="*", help="mutants to run; all without")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in MUTANTS if not arguments.names or mutant.name in arguments.names]
    objects = ROOT / "build" / "mutants"
    objects.mkdir(parents=True, exist_ok=True)
    every_test = " ".join(sorted({name for mutant in chosen for name in mutant.tests.split()}))
    healthy = judge(None, objects, every_test)
    if healthy != "SURVIVED":
        print(f"the tests fail on the unchanged tree: {healthy}")
        return 2
    bad = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutant, verdict in zip(chosen, pool.map(lambda mutant: judge(mutant, objects), chosen), strict=True):
            bad += not verdict.startswith("caught")
            print(f"{mutant.name:52} {mutant.file:28} {verdict}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutants caught")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
