#!/usr/bin/env bash
# One machine that is several hosts: network namespaces on a bridge, each with an address and a name of its own, a Ray
# head in the first, a Ray node of one CPU in each other, and a host for you that only submits. A host can be cut off.
#
#   infra/local/hosts.sh start DIR         # prints addresses as `export KEY=value`; about twenty seconds
#   infra/local/hosts.sh on DIR HOST CMD.. # run a command on a host: head, user, or one of HOSTS; it knows what `start` printed
#   infra/local/hosts.sh cut DIR HOST      # take its link away: nobody reaches it, it reaches nobody
#   infra/local/hosts.sh cut DIR HOST OTHER   # only these two do not reach each other
#   infra/local/hosts.sh mend DIR          # give all links back
#   infra/local/hosts.sh stop DIR          # end everything, each process by its number; DIR can be deleted then
#   infra/local/hosts.sh check             # is what it needs there?
#
# It needs Linux, root and iproute2 (Debian: apt-get install --no-install-recommends iproute2). A Ray node that ends is
# started again, as a service manager or KubeRay does. This machine is SUBNET.254 to the hosts: a store or an MLflow
# server that listens there can be reached from them. Of the environment:
#   HOSTS ("a b")     hosts with a node
#   SUBNET (10.77.0)  of the bridge; the head is .1, the user .2, the others .11, .12 and so on
#   RAY_*             for all nodes, such as RAY_health_check_timeout_ms
#   PYTHON            with ray (this repository's .venv, else python3)
# DIR's path must be short: Ray makes sockets below it, whose paths may have 107 characters.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly HERE WAIT_S=180 MARK=CVFT_HOSTS_DIR BRIDGE=cvft
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=$HERE/../../.venv/bin/python
  [[ -x $PYTHON ]] || PYTHON=$(command -v python3)
fi
HOSTS=${HOSTS:-a b}
SUBNET=${SUBNET:-10.77.0}
GCS=$SUBNET.1:6379

fail() {
  echo "hosts.sh: $*" >&2
  exit 1
}

usage() {
  fail "usage: $0 start DIR | on DIR HOST CMD... | cut DIR HOST [OTHER] | mend DIR | stop DIR | check"
}

need() {
  if [[ $(id -u) -ne 0 ]] || ! command -v ip >/dev/null; then
    echo "hosts.sh: network namespaces need root and iproute2 (apt-get install --no-install-recommends iproute2)" >&2
    exit 2
  fi
}

address() {  # host
  local number=11 host
  case $1 in
    head) echo "$SUBNET.1" ;;
    user) echo "$SUBNET.2" ;;
    *)
      for host in $HOSTS; do
        if [[ $host == "$1" ]]; then echo "$SUBNET.$number"; return; fi
        number=$((number + 1))
      done
      fail "$1: no such host; there are: head user $HOSTS"
      ;;
  esac
}

start() {  # dir
  local dir host
  mkdir -p "$1"
  dir=$(cd "$1" && pwd)
  [[ -z $(ls -A "$dir") ]] || fail "$dir is not empty; stop what runs there and delete it, or name another folder"
  ((${#dir} <= 40)) || fail "$dir: this path is too long for Ray's sockets; name one of at most 40 characters"
  ! ip link show "$BRIDGE" >/dev/null 2>&1 || fail "the bridge $BRIDGE is there already; stop the hosts that use it"
  "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('ray') is None)" ||
    fail "$PYTHON cannot import ray; name by PYTHON one that can"
  # shellcheck disable=SC2064  # the folder of now
  trap "give_up '$dir'" EXIT
  printf '%s=%q\n' HOSTS "$HOSTS" SUBNET "$SUBNET" >"$dir/settings"
  (umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$dir/token")
  make_network
  run_node "$dir" head
  wait_for_head "$dir"
  for host in $HOSTS; do run_node "$dir" "$host"; done
  trap - EXIT
  cat >"$dir/exports" <<EXPORTS
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$dir/token
export RAY_API_SERVER_ADDRESS=http://$SUBNET.1:8265
EXPORTS
  cat "$dir/exports"
}

make_network() {
  local host
  ip link add "$BRIDGE" type bridge
  ip address add "$SUBNET.254/24" dev "$BRIDGE"
  ip link set "$BRIDGE" up
  for host in head user $HOSTS; do
    ip netns add "cvft-$host"
    ip link add "cvft-$host" type veth peer name eth0 netns "cvft-$host"
    ip link set "cvft-$host" master "$BRIDGE" up
    ip -n "cvft-$host" address add "$(address "$host")/24" dev eth0
    ip -n "cvft-$host" link set lo up
    ip -n "cvft-$host" link set eth0 up
  done
}

on_host() {  # dir host command...: `stop` ends it too
  export CVFT_HOSTS_DIR="$1"
  # shellcheck disable=SC2016  # expanded there
  exec ip netns exec "cvft-$2" unshare --uts bash -c 'hostname "$1"; shift; exec "$@"' bash "$2" "${@:3}"
}

on() {  # dir host command...: as one who may use the cluster
  address "$2" >/dev/null
  # shellcheck disable=SC1091  # written by `start`
  source "$1/exports"
  on_host "$@"
}

run_node() {  # dir host
  (
    unset RAY_API_SERVER_ADDRESS
    # Ray's helpers would else look for a cluster among all processes of this machine.
    export RAY_ADDRESS=$GCS RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$1/token RAY_USAGE_STATS_ENABLED=0
    export $MARK="$1" XDG_CACHE_HOME="$1/$2-cache" PYTHON GCS
    PATH=$(dirname "$PYTHON"):$PATH  # jobs are commands such as `python -m jobs.shard`
    cd "$1"
    export -f on_host
    export MARK
    setsid nohup bash -c 'on_host "$@"' bash "$1" "$2" "$HERE/hosts.sh" node "$1" "$2" "$(address "$2")" \
      </dev/null >>"$1/$2.log" 2>&1 &
    echo $! >"$1/$2.pid"
  )
}

node() {  # dir host address: keep a node running; called on the host itself
  local options=(--node-ip-address "$3" --temp-dir "$1/$2" --object-store-memory 104857600 --num-gpus 0)
  options+=(--min-worker-port 0 --max-worker-port 0 --disable-usage-stats --block)
  if [[ $2 == head ]]; then
    options+=(--head --port "${GCS#*:}" --dashboard-host 0.0.0.0 --num-cpus 0)
  else
    options+=(--address "$GCS" --num-cpus 1)
  fi
  while :; do
    echo "$(date +%T.%N | cut -c 1-12) hosts.sh: starting the node of $2"
    "$PYTHON" -c 'import sys; from ray.scripts.scripts import main; sys.exit(main())' start "${options[@]}" || true
    # What the node leaves, a machine that starts anew does not have.
    sleep 1
  done
}

wait_for_head() {  # dir: its dashboard, and the last of its parts, without which it ends
  local port deadline=$((SECONDS + WAIT_S))
  for port in 8265 10001; do
    until (exec 3<>"/dev/tcp/$SUBNET.1/$port") 2>/dev/null; do
      ((SECONDS < deadline)) || fail "the head does not listen on port $port; see $1/head.log"
      sleep 0.2
    done
  done
}

give_up() {  # dir
  stop "$1" >&2
  echo "hosts.sh: it did not start; the logs are in $1" >&2
}

cut_off() {  # dir host [other]
  local host
  for host in "${@:2}"; do address "$host" >/dev/null; done
  if [[ $# -eq 2 ]]; then
    ip link set "cvft-$2" down
  else
    ip -n "cvft-$2" route replace blackhole "$(address "$3")/32"
    ip -n "cvft-$3" route replace blackhole "$(address "$2")/32"
  fi
}

mend() {  # dir
  local host
  for host in head user $HOSTS; do
    ip link set "cvft-$host" up
    ip -n "cvft-$host" route flush type blackhole
  done
}

processes() {  # dir: of all hosts, by what all of them inherit
  grep -lzxF "$MARK=$1" /proc/[0-9]*/environ 2>/dev/null | cut -d / -f 3
}

stop() {  # dir
  local host pid deadline=$((SECONDS + 15))
  for host in $HOSTS head; do  # first what would start a node again
    [[ -e $1/$host.pid ]] || continue
    pid=$(<"$1/$host.pid")
    if grep -qzxF "$MARK=$1" "/proc/$pid/environ" 2>/dev/null; then kill -KILL "$pid"; fi
    rm -f "$1/$host.pid"
  done
  local pids=()
  while mapfile -t pids < <(processes "$1") && [[ -n ${pids[*]} ]] && ((SECONDS < deadline)); do
    kill -KILL "${pids[@]}" 2>/dev/null || true
    sleep 0.2
  done
  for host in head user $HOSTS; do
    ip link delete "cvft-$host" 2>/dev/null || true
    ip netns delete "cvft-$host" 2>/dev/null || true
  done
  ip link delete "$BRIDGE" 2>/dev/null || true
}

in_folder() {  # command dir arguments...
  local dir
  dir=$(cd "$2" 2>/dev/null && pwd) || fail "$2: there is no such folder"
  [[ -e $dir/settings ]] || fail "$dir: no hosts were started here"
  # shellcheck disable=SC1091  # written by `start`
  source "$dir/settings"
  "$1" "$dir" "${@:3}"
}

need
case "${1:-}:$#" in
  start:2) start "$2" ;;
  on:2 | on:3) usage ;;
  on:*) in_folder on "${@:2}" ;;
  node:4) node "${@:2}" ;;
  cut:3 | cut:4) in_folder cut_off "${@:2}" ;;
  mend:2) in_folder mend "$2" ;;
  stop:2) in_folder stop "$2" ;;
  check:1) ;;
  *) usage ;;
esac
