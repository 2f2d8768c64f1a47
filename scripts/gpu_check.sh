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
limit=465 checks=200 # seconds: of everything, and of the checks before anything is timed
cases=(KDA GDN GLA Lightning "Mamba-2 form") # whose modelled times are compared with measured ones

if ! "$python" -c 'import sys, torch, triton; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_check: $python finds no torch with a CUDA device and triton; set PYTHON=/path/to/python" >&2
  exit 2
fi
rm -f "$results"/*.txt "$results"/*.code "$results"/*.json
seconds_left() { echo $((limit - SECONDS)); }
at_most() { # SECONDS RESERVE: as many, or what is left beyond the reserve; never 0, which is no limit to `timeout`
  local left=$(($(seconds_left) - $2))
  echo $((left < 1 ? 1 : left < $1 ? left : $1))
}
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
check model "$python" -m hybridlm_kernels.tools.kernel_cost "${cases[@]}" --model # fills Triton's cache for the one below
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

say "modelled and measured time of each launch"
run model_error "$(at_most 60 120)" "$python" -m hybridlm_kernels.tools.kernel_cost "${cases[@]}" --measure --json

say "a training step, eager and compiled"
run step "$(at_most 80 90)" "$python" scripts/dev/bench_step.py --json "$results/step.json"

say "kernels, timed: the recurrences at lengths and heads that others publish, then everything"
run recurrences "$(at_most 45 70)" "$python" -m hybridlm_kernels.tools.bench delta_rule --seconds 30 --backends triton fla \
  --shapes 'B1 T8192 H16 D128' 'B1 T8192 H32 D128' 'B1 T32768 H16 D128' 'B1 T32768 H32 D128' 'B1 T4096 H16 D128'
timeout -k 30 -s INT "$(at_most 300 30)" "$python" -m hybridlm_kernels.tools.bench --json --seconds "$(at_most 300 60)" \
  >"$results/kernels.json" 2>"$results/kernels.txt"
echo $? >"$results/kernels.code"

if [ "$(seconds_left)" -gt 60 ]; then
  say "sparse attention against dense"
  run dsa $(($(seconds_left) - 15)) "$python" scripts/dev/bench_dsa.py --json "$results/dsa.json"
fi

"$python" scripts/dev/gpu_summary.py "$results" --command "bash scripts/gpu_check.sh${*:+ $*}" --seconds "$SECONDS"
