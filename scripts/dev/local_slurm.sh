#!/usr/bin/env bash
# A real Slurm with two nodes on this machine, for tests: slurmctld, two slurmd and a munged with a secret of their own.
#   scripts/dev/local_slurm.sh start FOLDER    start it, or do nothing where it runs; prints `export SLURM_CONF=...`
#   scripts/dev/local_slurm.sh stop FOLDER     end its jobs and all its processes; FOLDER stays for its logs
# Needs root and Debian's packages `slurm-wlm munge`. Several can run side by side, each in a FOLDER with a short path
# (sockets). A requeued job starts after 10 s (`cred_expire`), not the usual 120. Each node claims 4 CPUs, whatever the machine has. There is no accounting database, as on small clusters.
set -euo pipefail

usage() { sed -n '2,6s/^# \?//p' "$0" >&2; exit 2; }
[ $# = 2 ] || usage
command=$1
mkdir -p "$2"
folder=$(cd "$2" && pwd)
conf=$folder/slurm.conf
PATH=$PATH:/usr/sbin:/sbin

ours() { # process ids of this Slurm's daemons and of what its jobs started
  local file
  for file in /proc/[0-9]*/environ; do
    if grep -qzsxF "LOCAL_SLURM_FOLDER=$folder" "$file" ||
      { grep -qzsxF "SLURM_CONF=$conf" "$file" && grep -qzs '^SLURM_JOB_ID=' "$file"; }; then
      file=${file#/proc/}
      echo "${file%/environ}"
    fi
  done
}

running() { SLURM_CONF=$conf timeout 10 sinfo --noheader --states=idle,mixed,allocated,completing --format=%D 2>/dev/null | grep -qx 2; }

configure() {
  local ports host
  host=$(hostname)
  read -r -a ports < <(python3 -c '
import socket
sockets = [socket.create_server(("", 0)) for _ in range(3)]
print(*(one.getsockname()[1] for one in sockets))')
  (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
  cat >"$conf" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdPidFile=$folder/%n.pid
SlurmdLogFile=$folder/%n.log
SlurmdSpoolDir=$folder/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=15
MinJobAge=30
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[1]} CPUs=4 RealMemory=1000 State=UNKNOWN
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[2]} CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
CONF
  mkdir -p "$folder"/state "$folder"/spool-node1 "$folder"/spool-node2
}

start() {
  for program in slurmctld slurmd munged srun sbatch; do
    command -v "$program" >/dev/null || { echo "error: $program is not installed: apt-get install slurm-wlm munge" >&2; exit 2; }
  done
  [ "$(id -u)" = 0 ] || { echo "error: slurmd must be started by root" >&2; exit 2; }
  if ! running; then
    stop
    configure
    export SLURM_CONF=$conf LOCAL_SLURM_FOLDER=$folder
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munge.pid" \
      --log-file="$folder/munge.log" --seed-file="$folder/munge.seed" --num-threads=2
    slurmctld -c -f "$conf" >>"$folder/start.log" 2>&1
    slurmd -N node1 -f "$conf" >>"$folder/start.log" 2>&1
    slurmd -N node2 -f "$conf" >>"$folder/start.log" 2>&1
    for ((i = 0; i < 120; i++)); do running && break; sleep 0.5; done
    running || { echo "error: Slurm did not start, see $folder/*.log" >&2; stop; exit 1; }
  fi
  echo "export SLURM_CONF=$conf"
}

stop() {
  local pids
  [ -e "$conf" ] || return 0
  if running; then
    SLURM_CONF=$conf timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
    SLURM_CONF=$conf timeout 10 scancel --signal=KILL --user="$(id -un)" 2>/dev/null || true
  fi
  for signal in TERM KILL KILL; do
    pids=$(ours)
    [ -n "$pids" ] || break
    # shellcheck disable=SC2086  # one word per process
    kill -"$signal" $pids 2>/dev/null || true
    for ((i = 0; i < 30; i++)); do [ -n "$(ours)" ] || break; sleep 0.2; done
  done
  rm -f "$conf" "$folder"/munge.key "$folder"/munge.socket*
  pids=$(ours)
  [ -z "$pids" ] || { echo "error: these processes of $folder do not end:" $pids >&2; exit 1; }
}

case $command in
  start) start ;;
  stop) stop ;;
  *) usage ;;
esac
