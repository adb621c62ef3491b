#!/usr/bin/env bash
# Builds, tests and measures the libraries on the GPU of this machine: all stages, or those given.
# Needs Python with torch, pytest and setuptools 77, nvcc and a C++20 compiler, but no network.
#
#   tests/gpu.sh [build] [test] [memcheck] [racecheck] [bench] [linear] [demo]
#
# PYTHON   the Python to use; default: python3
# OUT      folder of the logs, bench.json, linear.json and summary.txt (printed at the end);
#          default: build/gpu
# BENCH    options of the benchmark
# LIMIT    time limit of each stage in seconds; default: 900
# DEVICE   cuda (default), or cpu to try this script without a GPU
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
DEVICE=${DEVICE:-cuda}
mkdir -p "$OUT"
outcomes=()
failed=0

note() {  # STAGE OUTCOME SECONDS
  outcomes+=("$(printf '%-10s %-40s %5s s' "$1" "$2" "$3")")
}

run() {  # STAGE COMMAND...: runs it; output goes to the terminal and the stage's log
  local stage=$1 start=$SECONDS outcome=passed status
  shift
  echo "== $stage: $*"
  timeout --kill-after=20 "${LIMIT:-900}" "$@" 2>&1 | tee "$OUT/$stage.log"
  status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    outcome="FAILED with exit status $status"
    failed=1
  fi
  note "$stage" "$outcome" $((SECONDS - start))
}

has() {  # MODULE...: true if Python finds them all
  "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "$@"
}

build() {
  # Build for this GPU only: each further architecture would take as long again.
  if [ "$DEVICE" = cuda ]; then
    TORCH_CUDA_ARCH_LIST=$("$PYTHON" -c '
import torch
print(".".join(map(str, torch.cuda.get_device_capability())))') || return
    export TORCH_CUDA_ARCH_LIST FUSED_XENT_CUDA=1
  fi
  "$PYTHON" setup.py build_ext --inplace && "$PYTHON" -m fused_xent
}

missing() {  # prints one line that names a missing requirement, or nothing
  has torch || { echo "no torch in $PYTHON"; return; }
  has pytest || { echo "no pytest in $PYTHON"; return; }
  "$PYTHON" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' ||
    { echo "no setuptools of at least 77 in $PYTHON"; return; }
  [ "$DEVICE" = cpu ] || "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
    echo "no GPU that $PYTHON's torch finds"
}

why=$(missing)
if [ -n "$why" ]; then
  echo "tests/gpu.sh: $why" >&2
  exit 2
fi

# Warnings are not errors here: they depend on the installed torch.
pytest=("$PYTHON" -m pytest --device "$DEVICE" -W default -ra -p no:cacheprovider)
export -f build
export DEVICE PYTHON PYTHONUNBUFFERED=1 PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}"
[ "$DEVICE" = cuda ] && export FUSED_XENT_REQUIRE_CUDA=1
has hypothesis || {
  echo "no hypothesis here: skips tests/test_random.py"
  pytest+=(--ignore=tests/test_random.py)
}
has rich matplotlib || {
  echo "no rich or no matplotlib here: the benchmark cannot run"
  pytest+=('--ignore-glob=*/test_bench*.py')
}
has pytest_timeout || echo "no pytest-timeout here: LIMIT alone ends a test that hangs"
has expecttest || echo "no expecttest here: skips torch's own samples"

sanitize() {  # TOOL TESTS: without torch's caching allocator, each tensor has its own allocation
  if ! command -v compute-sanitizer > /dev/null; then
    echo "no compute-sanitizer here: skips $1"
    note "$1" "skipped: no compute-sanitizer" 0
    return
  fi
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$1" compute-sanitizer --tool "$1" --error-exitcode 9 \
    --report-api-errors no --kernel-name kns=fused_xent \
    "${pytest[@]}" -q tests/test_gpu.py -k "$2"
}

[ $# -gt 0 ] || set -- build test memcheck racecheck bench linear demo
for stage; do
  case $stage in
    build)
      run build bash -c build
      [ $failed = 0 ] || break  # the tests would use an old build
      ;;
    test) run test "${pytest[@]}" -q --durations=15 tests ;;
    memcheck) sanitize memcheck "forced_plan or out_of_range" ;;
    racecheck) sanitize racecheck "forced_plan" ;;
    # shellcheck disable=SC2086  # BENCH holds several words
    bench) run bench "$PYTHON" -m bench --device "$DEVICE" --json "$OUT/bench.json" ${BENCH:-} ;;
    linear) run linear "$PYTHON" -m bench linear --device "$DEVICE" --json "$OUT/linear.json" ;;
    demo) run demo "$PYTHON" -m bench.demo --device "$DEVICE" ;;
    *)
      note "$stage" "FAILED: no such stage" 0
      failed=1
      ;;
  esac
done

echo
printf '%s\n' "${outcomes[@]}" | tee "$OUT/summary.txt"
exit $failed
