#!/usr/bin/env bash
# Everything that needs a GPU, in one call: `bash scripts/gpu_check.sh [FOLDER for the results]`.
# Needs torch, triton and (for the tests) pytest; nothing is installed and nothing is downloaded.
# Exits 1 when a kernel is wrong; figures are written whatever the outcome.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-gpu_check}
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ] && python=.venv/bin/python
export PYTHONPATH=kernels:.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$results"

if ! "$python" -c 'import sys, torch, triton; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_check: $python finds no torch with a CUDA device and triton; set PYTHON=/path/to/python" >&2
  exit 2
fi
failed=0
say() { echo "== $*"; }

say "machine"
{
  git rev-parse HEAD 2>/dev/null || true
  "$python" -c 'import platform, torch, triton; p = torch.cuda.get_device_properties(0); print(p.name, f"{p.major}.{p.minor}", "torch", torch.__version__, "triton", triton.__version__, "python", platform.python_version())'
} | tee "$results/machine.txt"

say "every backend against the reference"
"$python" -m hybridlm_kernels.doctor >"$results/doctor.txt" 2>&1 || failed=1
grep -v '^ok' "$results/doctor.txt"

if "$python" -c 'import pytest' 2>/dev/null; then
  say "tests of the Triton kernels on the device"
  "$python" -m pytest -q -p no:cacheprovider -p no:xdist tests/triton >"$results/tests.txt" 2>&1 || failed=1
  tail -n 15 "$results/tests.txt"
else
  say "pytest is not installed: tests/triton is left out"
fi

say "registers and spills of every configuration"
# For this triton and this device, as a record: what spills costs time and is not wrong.
"$python" -m hybridlm_kernels.compile_check --all --jobs "$(nproc)" \
  --targets "$("$python" -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())')" \
  >"$results/compiled.txt" 2>&1 || true
grep -vE ' (ok|left out)$' "$results/compiled.txt"

say "kernels, timed"
"$python" -m hybridlm_kernels.bench --json >"$results/kernels.json" 2>"$results/kernels.err" ||
  { failed=1; tail -n 5 "$results/kernels.err"; }
"$python" - "$results/kernels.json" <<'PYTHON' || true
import json, sys
from hybridlm_kernels.bench import Machine, Timing, table
found = json.load(open(sys.argv[1]))
print(table([Timing(**row) for row in found["rows"]], Machine(**found["machine"])))
PYTHON

say "sparse attention against dense"
"$python" scripts/bench_dsa.py --json "$results/dsa.json" 2>&1 | tee "$results/dsa.txt"
[ "${PIPESTATUS[0]}" = 0 ] || failed=1

if [ "$failed" = 0 ]; then say "all well; results in $results"; else say "something failed; see $results"; fi
exit "$failed"
