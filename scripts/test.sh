#!/usr/bin/env bash
# The whole test suite, from a clean checkout: `bash scripts/test.sh [pytest arguments]`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh test
# One test process a core with one thread each is faster than threads inside tiny models.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest -n "$(.venv/bin/python -c 'import os; print(len(os.sched_getaffinity(0)))')" "$@"
