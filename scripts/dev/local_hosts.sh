#!/usr/bin/env bash
# Several hosts on this machine, for tests: network namespaces with a bridge between them and a host name each.
#   scripts/dev/local_hosts.sh start PREFIX [COUNT]        hosts PREFIX1, PREFIX2, ... (default 2) that reach each other
#   scripts/dev/local_hosts.sh run HOST COMMAND...         run a command there (exec: signals and exit code are its own)
#   scripts/dev/local_hosts.sh link HOST up|down           plug in or pull out its cable
#   scripts/dev/local_hosts.sh block HOST PORTS            its incoming connections to TCP ports A-B get no answer
#   scripts/dev/local_hosts.sh stop PREFIX                 end all that runs there and remove them
# HIDE=DIR in the environment of `run` puts an empty folder over DIR, which that host then does not share with others.
# Needs root and the packages `iproute2` and, for `block`, `nftables`. PREFIX is short (interfaces have 15 letters).
set -euo pipefail

usage() { sed -n '2,9s/^# \?//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
command=$1 name=$2
shift 2
PATH=$PATH:/usr/sbin:/sbin

hosts() { ip netns list | cut -d' ' -f1 | grep -xE "$1[0-9]+" || true; }

start() {
  local prefix=$1 count=${2:-2} subnet host i
  [ "$(id -u)" = 0 ] || { echo "error: only root makes network namespaces" >&2; exit 2; }
  command -v ip >/dev/null || { echo "error: ip is not installed: apt-get install iproute2" >&2; exit 2; }
  [ -z "$(hosts "$prefix")" ] || return 0
  trap 'stop "$prefix"' ERR
  subnet=10.$((RANDOM % 200 + 20)).$((RANDOM % 250))
  # The bridge stands in a namespace of its own: the machine's own addresses and routes stay as they are.
  ip netns add "${prefix}0"
  ip -n "${prefix}0" link add hub type bridge
  ip -n "${prefix}0" link set hub up
  for ((i = 1; i <= count; i++)); do
    host=$prefix$i
    ip netns add "$host"
    ip -n "$host" link set lo up
    ip -n "$host" link add eth0 type veth peer name "$host" netns "${prefix}0"
    ip -n "$host" address add "$subnet.$i/24" dev eth0
    ip -n "$host" link set eth0 up
    ip -n "${prefix}0" link set "$host" master hub up
    mkdir -p "/etc/netns/$host"
    { echo "127.0.0.1 localhost"; for ((j = 1; j <= count; j++)); do echo "$subnet.$j $prefix$j"; done; } >"/etc/netns/$host/hosts"
    echo "hosts: files" >"/etc/netns/$host/nsswitch.conf" # no name server: names that are not in the file fail at once
  done
  trap - ERR
}

stop() {
  local host pids
  for host in $(hosts "$1"); do
    for _ in 1 2 3; do
      pids=$(ip netns pids "$host")
      [ -n "$pids" ] || break
      # shellcheck disable=SC2086  # one word per process
      kill -KILL $pids 2>/dev/null || true
      sleep 0.3
    done
    ip netns delete "$host"
    rm -rf "/etc/netns/$host"
  done
}

run() {
  local host=$1
  shift
  # shellcheck disable=SC2016  # to be read inside
  exec ip netns exec "$host" unshare --uts sh -c '
    hostname "$0"
    [ -z "${HIDE:-}" ] || mount -t tmpfs none "$HIDE"
    unset HIDE
    exec "$@"' "$host" "$@"
}

case $command in
  start) start "$name" "$@" ;;
  stop) stop "$name" ;;
  run) [ $# -ge 1 ] || usage; run "$name" "$@" ;;
  link) [ $# = 1 ] || usage; ip -n "${name%"${name##*[!0-9]}"}0" link set "$name" "$1" ;;
  block)
    [ $# = 1 ] || usage
    command -v nft >/dev/null || { echo "error: nft is not installed: apt-get install nftables" >&2; exit 2; }
    ip netns exec "$name" nft "add table inet filter; add chain inet filter input { type filter hook input priority 0; }; add rule inet filter input iifname eth0 tcp flags syn / syn,ack tcp dport $1 drop"
    ;;
  *) usage ;;
esac
