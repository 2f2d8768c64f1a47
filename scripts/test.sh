#!/usr/bin/env bash
# The test suite, from a clean checkout: `bash scripts/test.sh [fast] [pytest arguments]`.
# `fast` leaves out what is marked slow: several processes, compiled or interpreted kernels, whole sweeps.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh test
# One test process per core with one thread each is faster than threads inside tiny models.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
cores=$(.venv/bin/python -c 'import os; print(len(os.sched_getaffinity(0)))')
marked=()
if [ "${1:-}" = fast ]; then
  shift
  marked=(-m "not slow")
fi
exec .venv/bin/python -m pytest -n "$cores" --dist worksteal "${marked[@]}" "$@"
