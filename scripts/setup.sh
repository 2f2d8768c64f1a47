#!/usr/bin/env bash
# Make .venv in the checkout and install hybridlm in it: `bash scripts/setup.sh [extra,extra]`.
# Runs again only when pyproject.toml, constraints.txt or the extras changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"

find_python() {
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13)))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: no Python 3.11 or newer found; install one or set PYTHON=/path/to/python3.11" >&2
  exit 2
}

[ -x .venv/bin/python ] || "$(find_python)" -m venv .venv
stamp=.venv/.installed-${extras//,/-}
want=$(cat pyproject.toml constraints.txt | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
  echo "Installing hybridlm into .venv (about a minute; the largest part is PyTorch) ..." >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
  echo "$want" >"$stamp"
fi
