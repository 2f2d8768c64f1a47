#!/usr/bin/env bash
# ruff over everything, mypy over both packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh lint
.venv/bin/ruff check .
.venv/bin/mypy
