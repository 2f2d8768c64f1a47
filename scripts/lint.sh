#!/usr/bin/env bash
# ruff over everything, mypy over both packages, and the order of packages (.importlinter).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh lint
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/lint-imports --no-cache --no-logo
