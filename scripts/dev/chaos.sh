#!/usr/bin/env bash
# A training run under random faults must end as the same run left alone: `bash scripts/dev/chaos.sh [--faults 40] [--help]`.
# Checkpoints lie on a small disk that no other process sees and that is gone with this one. Where the system lets
# nobody mount one, a limit on the size of files stands for the full disk.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHON=${PYTHON:-.venv/bin/python} PYTHONPATH=$PWD:$PWD/kernels:${PYTHONPATH:-} DISK
DISK=$(mktemp -d)
trap 'rmdir "$DISK"' EXIT
if unshare --mount --map-root-user mount -t tmpfs none "$DISK" 2>/dev/null; then
    unshare --mount --map-root-user bash -c \
        'mount -t tmpfs -o size=32m none "$DISK" && exec "$PYTHON" scripts/dev/chaos.py --disk "$DISK" "$@"' chaos "$@"
else
    "$PYTHON" scripts/dev/chaos.py "$@"
fi
