#!/usr/bin/env bash
# `hybridlm train` through the launcher of DeepSpeed, which reaches other machines by ssh:
#   PROCESSES=8 scripts/launch_deepspeed.sh model=hybrid_1b engine=zero3
#   HOSTFILE=hosts scripts/launch_deepspeed.sh ...      lines such as `first-host slots=8`
set -euo pipefail
python=${PYTHON:-python}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu
where=(--num_gpus "${PROCESSES:-$((gpus > 0 ? gpus : 1))}")
[ -z "${HOSTFILE:-}" ] || where=(--hostfile "$HOSTFILE")
exec "$python" -m deepspeed.launcher.runner "${where[@]}" --master_port "${MASTER_PORT:-29500}" --no_local_rank \
  --module hybridlm.cli train "$@"
