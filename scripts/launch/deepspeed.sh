#!/usr/bin/env bash
# `hybridlm train` through the launcher of DeepSpeed, which reaches other machines by ssh:
#   PROCESSES=8 scripts/launch/deepspeed.sh model=hybrid_1b engine=zero3
#   HOSTFILE=hosts scripts/launch/deepspeed.sh ...      lines such as `first-host slots=8`; SSH_PORT where it is not 22
set -euo pipefail
# shellcheck source=scripts/launch/master_port.sh
. "$(dirname "${BASH_SOURCE[0]}")/master_port.sh"
python=${PYTHON:-python}
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu
where=(--num_gpus "${PROCESSES:-$((gpus > 0 ? gpus : 1))}")
if [ -n "${HOSTFILE:-}" ]; then
  # Without the file DeepSpeed would train on this machine alone, and a host that is down would hold up the others.
  [ -r "$HOSTFILE" ] || { echo "error: HOSTFILE: there is no file $HOSTFILE" >&2; exit 2; }
  ssh_port=${SSH_PORT:-22}
  while read -r host _; do
    [[ $host == "" || $host == \#* ]] || timeout 10 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$host" "$ssh_port" 2>/dev/null || {
      echo "error: HOSTFILE: $host does not answer on its ssh port $ssh_port; is it up? take it out of $HOSTFILE otherwise" >&2
      exit 2
    }
  done <"$HOSTFILE"
  where=(--hostfile "$HOSTFILE" --ssh_port "$ssh_port")
fi
exec "$python" -m deepspeed.launcher.runner "${where[@]}" --master_port "$port" --no_local_rank \
  --module hybridlm.cli train "$@"
