#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command and without a network:
#
#   benchmarks/gpu_suite.sh OUT [build|test|sanitize|bench|all]
#
# build     compiles and installs the package for this card, in place
# test      the test suite on the GPU backends
# sanitize  compute-sanitizer's memcheck and racecheck on small cases, where it is installed
# bench     the speed table: benchmarks/ with the markers loss and cls
#
# Each stage takes at most 9 minutes, can run alone, and leaves OUT/STAGE.json and OUT/STAGE.log; the last lines
# are a short table. RESUME=1 lets bench go on with the rows that a run of the same commit left in OUT.
# PYTHON names the interpreter (python3); it needs torch with CUDA, setuptools >= 77, pytest, and for bench
# pytest-benchmark.
set -uo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
wanted=${2:-all}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_INDEX=1
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
readonly LIMIT=535 # seconds
readonly TOOL_LIMIT=260 # of one sanitizer

build() {
  # Only this card's code: the default also builds for sm_80 and PTX.
  local arch
  arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return
  ALPKD_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$arch} \
    "$python" -m pip install --no-deps --no-build-isolation --editable . &&
    "$python" -c 'import alpkd_fast; print(alpkd_fast.backends())'
}

run_tests() {
  local backends
  rm -f "$out"/test*.xml # an earlier run's; this one writes them at its end only
  backends=$("$python" -c 'import alpkd_fast; print(",".join(k for k, v in alpkd_fast.backends().items()
    if v is None and k in ("cuda", "triton")))') || return
  [ -n "$backends" ] || { echo "no GPU backend is usable: run the stage build first"; return 1; }
  local jobs=() # most of the time goes to Triton's compiler: side by side where pytest-xdist is installed
  "$python" -c 'import xdist' 2>/dev/null && jobs=(-n "$(nproc)")
  # The files whose tests take a backend; what needs none runs without a GPU too. Verbose: the log names what failed
  # before a run is cut off.
  local files
  files=$(grep -lE '^def test_.*\b(backend|fused|gpu_backend)\b.*\):' tests/test_*.py)
  # shellcheck disable=SC2086 # one word to a file
  "$python" -m pytest $files tests/test_triton.py "${jobs[@]}" --backends "$backends" --junitxml "$out/test.xml" -v || return
  # Few rows have a kernel of their own: the small cases again, by the kernels of many rows.
  ALPKD_FAST_CUDA_KERNEL=rows "$python" -m pytest tests/test_{parity,options,pooling,masking,strides,gradients}.py \
    "${jobs[@]}" --backends cuda --junitxml "$out/test-rows.xml" -v
}

sanitize() {
  local tool code result=0
  if ! command -v compute-sanitizer >/dev/null; then
    echo "SKIPPED: compute-sanitizer was not found"
    return 0
  fi
  for tool in memcheck racecheck; do
    # Without torch's caching allocator every tensor has bounds of its own.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 "$TOOL_LIMIT" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --kernel-name regex=alp_ "$python" benchmarks/gpu_report.py small-cases
    code=$?
    case $code in
      0) echo "$tool: passed" ;;
      124 | 137)
        echo "$tool: did not end within $TOOL_LIMIT s"
        [ $result -ne 0 ] || result=124
        ;;
      *)
        echo "$tool: failed, exit code $code"
        result=1
        ;;
    esac
  done
  return $result
}

bench() {
  local resume=()
  if [ "${RESUME:-}" = 1 ]; then resume=(--resume); else rm -f "$out/bench.csv"; fi
  if [ ! -f benchmarks/test_loss.py ]; then
    echo "SKIPPED: benchmarks/test_loss.py is not part of this checkout"
    return 0
  fi
  "$python" -c 'import pytest_benchmark' 2>/dev/null ||
    { echo "pytest-benchmark is missing: install it into $python's environment"; return 1; }
  "$python" -m pytest benchmarks -m "loss or cls" --device cuda --results "$out/bench.csv" "${resume[@]}" -v
}

stage() {
  local name=$1 start=$SECONDS code
  echo "== $name"
  # A subshell of this script under timeout, so that functions can be timed out.
  timeout -k 5 "$LIMIT" bash benchmarks/gpu_suite.sh "$out" "run-$name" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  "$python" benchmarks/gpu_report.py stage "$out" "$name" "$code" "$((SECONDS - start))"
  return "$code"
}

case $wanted in
  run-build) build ;;
  run-test) run_tests ;;
  run-sanitize) sanitize ;;
  run-bench) bench ;;
  build | test | sanitize | bench) stage "$wanted" ;;
  all)
    failed=0
    for name in build test sanitize bench; do stage "$name" || failed=1; done
    "$python" benchmarks/gpu_report.py table "$out"
    exit $failed
    ;;
  *)
    echo "unknown stage $wanted; known are build, test, sanitize, bench, all" >&2
    exit 2
    ;;
esac
