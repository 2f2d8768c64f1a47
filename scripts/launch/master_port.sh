# shellcheck shell=bash
# For the launch scripts: `port` is MASTER_PORT, or 29500. On the first machine it must be free, which torchrun and
# Accelerate would say in a traceback, and DeepSpeed's launcher after all processes have been started.
port=${MASTER_PORT:-29500}
if [ "${NODE:-0}" = 0 ] && (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
  echo "error: MASTER_PORT: another program listens on port $port of this machine; set MASTER_PORT to a free one" >&2
  exit 2
fi
