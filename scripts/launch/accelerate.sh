#!/usr/bin/env bash
# `hybridlm train` through `accelerate launch`; variables as in torchrun.sh. What Accelerate is told beyond the
# number of processes comes from the engine of the run, not from a file of `accelerate config`.
set -euo pipefail
# shellcheck source=scripts/launch/master_port.sh
. "$(dirname "${BASH_SOURCE[0]}")/master_port.sh"
python=${PYTHON:-python}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
case " $* " in
  *" engine=zero"*) how=--use_deepspeed ;;
  *) how=--multi_gpu
     [ "$gpus" -gt 0 ] || { echo "accelerate launch starts one process on a CPU; take torchrun.sh" >&2; exit 2; } ;;
esac
exec "$python" -m accelerate.commands.accelerate_cli launch "$how" --mixed_precision no --dynamo_backend no --num_machines "${NODES:-1}" \
  --machine_rank "${NODE:-0}" --num_processes "$((${PROCESSES:-$((gpus > 0 ? gpus : 1))} * ${NODES:-1}))" \
  --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "$port" \
  --module hybridlm.cli train "$@"
