#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most eight minutes: `bash scripts/gpu_check.sh [FOLDER]`.
# Results go to FOLDER, else to $OUT, else to gpu_check: summary.md, summary.json and the output of every check.
# Needs torch, triton and (for the tests) pytest; nothing is installed and nothing is downloaded.
# Exits 1 when something is wrong, and 3 when only time ran out; another call then finds kernels and tuned choices in
# Triton's cache and gets further. Figures are written whatever the outcome.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-${OUT:-gpu_check}}
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ] && python=.venv/bin/python
export PYTHONPATH=kernels:.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$results"
limit=450 checks=210 # seconds: of everything, and of the checks before anything is timed

if ! "$python" -c 'import sys, torch, triton; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_check: $python finds no torch with a CUDA device and triton; set PYTHON=/path/to/python" >&2
  exit 2
fi
rm -f "$results"/*.txt "$results"/*.code "$results"/*.json
seconds_left() { echo $((limit - SECONDS)); }
say() { echo "== $(printf %3d $SECONDS) s: $*"; }
run() { # NAME SECONDS COMMAND...: keeps the output and the exit code, which is 124 where time ran out
  local name=$1 seconds=$2
  shift 2
  timeout -k 10 -s INT "$seconds" "$@" >"$results/$name.txt" 2>&1
  echo $? >"$results/$name.code"
}
check() { # In the background, with the first configuration of each kernel: to tune takes longer than to check.
  HYBRIDLM_TUNE=0 run "$1" "$checks" "${@:2}" &
}
tests() { check "$1" "$python" -m pytest -q -p no:cacheprovider -p no:xdist "${@:2}"; }

say "every backend against the reference, and the tests of the Triton kernels on the device"
operations=$("$python" -c 'from hybridlm_kernels.tools.cases import check_cases; print(*{case.operation for case in check_cases()})')
for operation in $operations; do
  check "doctor_$operation" "$python" -m hybridlm_kernels.tools.doctor "$operation"
done
if "$python" -c 'import pytest' 2>/dev/null; then
  for kind in delta_rule linear_attention; do
    tests "bf16_rows_$kind" tests/triton/test_bfloat16.py -k "rows and $kind"
    tests "bf16_packed_$kind" tests/triton/test_bfloat16.py -k "packed and $kind"
  done
  tests bf16_others tests/triton/test_bfloat16.py -k other_operations
  for file in tests/triton/test_*.py; do
    [ "$file" = tests/triton/test_bfloat16.py ] || tests "$(basename "$file" .py)" "$file"
  done
else
  say "pytest is not installed: tests/triton is left out"
fi
wait

say "kernels, timed"
timeout -k 30 -s INT $(($(seconds_left) - 30)) "$python" -m hybridlm_kernels.tools.bench --json --seconds $(($(seconds_left) - 90)) \
  >"$results/kernels.json" 2>"$results/kernels.txt"
echo $? >"$results/kernels.code"

if [ "$(seconds_left)" -gt 60 ]; then
  say "sparse attention against dense"
  run dsa $(($(seconds_left) - 15)) "$python" scripts/dev/bench_dsa.py --json "$results/dsa.json"
fi

"$python" scripts/dev/gpu_summary.py "$results" --command "bash scripts/gpu_check.sh${*:+ $*}" --seconds "$SECONDS"
