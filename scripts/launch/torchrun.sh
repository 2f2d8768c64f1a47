#!/usr/bin/env bash
# `hybridlm train` on one machine, or on each of several, through torchrun:
#   PROCESSES=8 scripts/launch/torchrun.sh model=hybrid_1b engine=zero3
#   NODES=2 NODE=0 MASTER_ADDR=first-host scripts/launch/torchrun.sh ...   (and NODE=1 on the other)
# PROCESSES per machine; default: its GPUs. hybridlm.distributed.torchrun is torchrun whose failures are one line.
set -euo pipefail
# shellcheck source=scripts/launch/master_port.sh
. "$(dirname "${BASH_SOURCE[0]}")/master_port.sh"
python=${PYTHON:-python}
processes=${PROCESSES:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
exec "$python" -m hybridlm.distributed.torchrun --nnodes "${NODES:-1}" --node-rank "${NODE:-0}" --nproc-per-node "$processes" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "$port" -m hybridlm.cli train "$@"
