#!/usr/bin/env bash
# One machine that behaves as many: a Ray head with a real autoscaler whose nodes are processes here, an object store
# (Ceph's S3 gateway) and an MLflow server, on 127.0.0.1.
#
#   infra/local/cluster.sh start DIR    # prints addresses as `export KEY=value`; about a minute; a bucket `cvft` is there
#   infra/local/cluster.sh status DIR   # what runs
#   infra/local/cluster.sh stop DIR     # ends all of it, each process by its number; DIR can be deleted then
#
# Of the environment:
#   PARTS ("store mlflow ray")   what to start; a store or an MLflow that runs elsewhere is taken from AWS_* and
#                                MLFLOW_TRACKING_URI as usual
#   RAY_PORT (6379, 6380) DASHBOARD_PORT (8265) STORE_PORT (9100, 9101) MLFLOW_PORT (5000, 5001)
#   NODES (nodes.yaml beside this file)   types of nodes and how many of each may come; `none`: a head with two CPUs
#   RAY_AUTH_MODE (token)   `disabled` lets everybody in who reaches RAY_PORT
#   GCS_DIR              where a head with NODES=none keeps its state: killed, `head DIR` starts it again with its jobs
#   PYTHON               with ray (this repository's .venv, else python3)
# DIR's path must be short: Ray makes sockets below it, whose paths may have 107 characters.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly HERE BUCKET=cvft WAIT_S=90 MARK=CVFT_CLUSTER_DIR HEAD_ID=fffffffffffffffffffffffffffffffffffffffffffffffffff00000
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=$HERE/../../.venv/bin/python
  [[ -x $PYTHON ]] || PYTHON=$(command -v python3)
fi
PARTS=${PARTS:-store mlflow ray}
RAY_PORT=${RAY_PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
STORE_PORT=${STORE_PORT:-9100}
MLFLOW_PORT=${MLFLOW_PORT:-5000}
NODES=${NODES:-$HERE/nodes.yaml}

fail() {
  echo "cluster.sh: $*" >&2
  exit 1
}

usage() {
  fail "usage: $0 start DIR | status DIR | head DIR | stop DIR"
}

is_open() {  # port
  (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

has() {  # part
  [[ " $PARTS " == *" $1 "* ]]
}

need_free() {  # name port
  ! is_open "$2" || fail "port $2 is taken; stop what listens there, or choose another $1"
}

start() {  # dir
  local dir
  mkdir -p "$1"
  dir=$(cd "$1" && pwd)
  [[ -z $(ls -A "$dir") ]] || fail "$dir is not empty; stop what runs there and delete it, or name another folder"
  ((${#dir} <= 40)) || fail "$dir: this path is too long for Ray's sockets; name one of at most 40 characters"
  if has ray; then need_free RAY_PORT "$RAY_PORT"; need_free RAY_PORT $((RAY_PORT + 1)); need_free DASHBOARD_PORT "$DASHBOARD_PORT"; fi
  # Ray gives the head of such nodes one fixed number, and never lets a number that was lost come back.
  [[ -z ${GCS_DIR:-} || $NODES == none ]] || fail "GCS_DIR: only a head with NODES=none can be started again"
  if has store; then need_free STORE_PORT "$STORE_PORT"; fi
  if has mlflow; then need_free MLFLOW_PORT "$MLFLOW_PORT"; fi
  # shellcheck disable=SC2064  # the folder of now
  trap "give_up '$dir'" EXIT
  : >"$dir/exports"
  if has store; then
    "$HERE/../objectstore/radosgw.sh" start "$dir/store" "$STORE_PORT" >>"$dir/exports"
    # Our own reads and writes set these; Ray Train's do not.
    printf 'export %s=when_required\n' AWS_REQUEST_CHECKSUM_CALCULATION AWS_RESPONSE_CHECKSUM_VALIDATION >>"$dir/exports"
  fi
  # shellcheck disable=SC1091  # written above
  source "$dir/exports"
  if has store; then
    "$PYTHON" -c 'import sys, boto3; boto3.client("s3").create_bucket(Bucket=sys.argv[1])' "$BUCKET" ||
      fail "the store does not make the bucket $BUCKET; see $dir/store"
  fi
  if has mlflow; then
    PORT=$MLFLOW_PORT PYTHON=$PYTHON "$HERE/../mlflow/server.sh" start "$dir/mlflow" |
      grep '^export MLFLOW_TRACKING_URI=' >>"$dir/exports"
  fi
  # shellcheck disable=SC1091
  source "$dir/exports"
  if has ray; then prepare_head "$dir"; start_head "$dir"; fi
  trap - EXIT
  status "$dir"
}

prepare_head() {  # dir
  [[ $NODES == none ]] || sed "s/GCS_ADDRESS/127.0.0.1:$RAY_PORT/" "$NODES" >"$1/nodes.yaml"
  mkdir "$1/ray"
  {
    echo "export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}"
    if [[ ${RAY_AUTH_MODE:-token} == token ]]; then
      (umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$1/token")
      echo "export RAY_AUTH_TOKEN_PATH=$1/token"
    fi
    echo "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$DASHBOARD_PORT"
    # Nodes of one machine share the folder that sent code is unpacked in, and each that comes unpacks it anew, under
    # the others' feet: here they take the code from this checkout.
    [[ $NODES == none ]] || echo "export CVFT_WORKING_DIR=none"
  } >>"$1/exports"
  # What `head` needs to start the same head again.
  printf '%s=%q\n' RAY_PORT "$RAY_PORT" DASHBOARD_PORT "$DASHBOARD_PORT" NODES "$NODES" GCS_DIR "${GCS_DIR:-}" >"$1/settings"
}

start_head() {  # dir
  local tries
  for tries in 1 2 3; do
    run_head "$1"
    if await_head "$1"; then return; fi
    # On a busy machine Ray's parts miss deadlines of their own.
    if ! grep -v '^$' "$1/head.log" | tail -n 1 | grep -q 'timed out during startup' || ((tries == 3)); then
      fail "the head ended; see $1/head.log: $(grep -v '^$' "$1/head.log" | tail -n 1)"
    fi
    stop_ray "$1"
  done
}

run_head() {  # dir
  local size
  size=(--num-cpus 2)
  (
    # shellcheck disable=SC1091
    source "$1/exports"
    unset RAY_API_SERVER_ADDRESS
    export RAY_ADDRESS=127.0.0.1:$RAY_PORT  # Ray Train asks again where it runs, and finds every Ray of this machine
    export $MARK="$1" RAY_USAGE_STATS_ENABLED=0
    if [[ $NODES != none ]]; then
      export RAY_FAKE_CLUSTER=1 AUTOSCALER_UPDATE_INTERVAL_S=1 RAY_enable_autoscaler_v2=1
      export RAY_CLOUD_INSTANCE_ID=$HEAD_ID RAY_NODE_TYPE_NAME=ray.head.default
      size=(--num-cpus 0 --autoscaling-config "$1/nodes.yaml")
    fi
    if [[ -n ${GCS_DIR:-} ]]; then
      mkdir -p "$GCS_DIR"
      export RAY_gcs_storage=rocksdb RAY_gcs_storage_path=$GCS_DIR
    fi
    PYTHONPATH=$(cd "$HERE/../.." && pwd)${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONPATH
    PATH=$(dirname "$PYTHON"):$PATH  # jobs are commands such as `python -m jobs.shard`
    cd "$1"
    # No file descriptor of the caller's stays open: a pipe that it reads would never end.
    setsid nohup "$PYTHON" -c 'import sys; from ray.scripts.scripts import main; sys.exit(main())' start --head --block \
      --port "$RAY_PORT" --node-ip-address 127.0.0.1 --dashboard-host 127.0.0.1 --dashboard-port "$DASHBOARD_PORT" \
      --dashboard-agent-listen-port 0 --dashboard-agent-grpc-port 0 --ray-client-server-port $((RAY_PORT + 1)) \
      --min-worker-port 0 --max-worker-port 0 "${size[@]}" --num-gpus 0 --object-store-memory 104857600 \
      --temp-dir "$1/ray" --disable-usage-stats \
      </dev/null >>"$1/head.log" 2>&1 &
    echo $! >"$1/head.pid"
  )
}

await_head() {  # dir: false if it ended
  local deadline=$((SECONDS + WAIT_S))
  # Of its parts the client server is the last to listen; where it gives up, on a busy machine, it takes the head along.
  until is_open "$DASHBOARD_PORT" && is_open $((RAY_PORT + 1)); do
    kill -0 "$(<"$1/head.pid")" 2>/dev/null || return 1
    ((SECONDS < deadline)) || fail "the head does not listen on ports $DASHBOARD_PORT and $((RAY_PORT + 1)); see $1/head.log"
    sleep 0.2
  done
}

give_up() {  # dir
  stop "$1" >&2
  echo "cluster.sh: it did not start; the logs are in $1" >&2
}

processes() {  # dir: the head's, the nodes', the workers' and the jobs', by what all of them inherit
  grep -lzxF "$MARK=$1" /proc/[0-9]*/environ 2>/dev/null | cut -d / -f 3
}

belongs() {  # pid dir: a number alone may be another process's by now
  grep -qzxF "$MARK=$2" "/proc/$1/environ" 2>/dev/null
}

stop_ray() {  # dir
  local pid deadline=$((SECONDS + 15))
  if [[ -e $1/head.pid ]]; then
    pid=$(<"$1/head.pid")
    if belongs "$pid" "$1"; then kill -TERM "$pid"; fi
    while belongs "$pid" "$1" && ((SECONDS < deadline)); do sleep 0.2; done
    rm -f "$1/head.pid"
  fi
  # The autoscaler's nodes outlive a head that is killed.
  for pid in $(processes "$1" || true); do kill -KILL "$pid" 2>/dev/null || true; done
}

stop() {  # dir
  stop_ray "$1"
  if [[ -d $1/mlflow ]]; then "$HERE/../mlflow/server.sh" stop "$1/mlflow"; fi
  if [[ -d $1/store ]]; then "$HERE/../objectstore/radosgw.sh" stop "$1/store"; fi
}

status() {  # dir
  local pid
  cat "$1/exports"
  # shellcheck disable=SC1091  # what was printed
  source "$1/exports"
  if [[ -d $1/store ]]; then echo "# store: s3://$BUCKET at $AWS_ENDPOINT_URL"; fi
  if [[ -n ${MLFLOW_TRACKING_URI:-} ]]; then echo "# MLflow: open $MLFLOW_TRACKING_URI"; fi
  if [[ -e $1/head.pid ]] && pid=$(<"$1/head.pid") && belongs "$pid" "$1"; then
    echo "# Ray: open $RAY_API_SERVER_ADDRESS; the head is process $pid, one of $(processes "$1" | wc -l)"
    if [[ -e $1/token ]]; then echo "# it asks for the token in $1/token"; fi
    echo "# metrics: Prometheus finds the nodes in $1/ray/prom_metrics_service_discovery.json (see infra/monitoring)"
  else
    echo "# Ray: its head does not run"
  fi
}

# Only the head, again, after it was killed: with GCS_DIR it remembers its nodes and jobs.
head_again() {  # dir
  [[ -e $1/settings ]] || fail "$1: no head was started here"
  # shellcheck disable=SC1091
  source "$1/settings"
  local deadline=$((SECONDS + WAIT_S)) port
  for port in "$RAY_PORT" "$DASHBOARD_PORT"; do  # what was killed may take a moment to go
    while is_open "$port" && ((SECONDS < deadline)); do sleep 0.2; done
  done
  need_free RAY_PORT "$RAY_PORT"
  rm -f "$1/ray/ray_current_cluster"  # beside a node that lives on, Ray would take the head for one that is there
  start_head "$1"
}

in_folder() {  # command dir
  local dir
  dir=$(cd "$2" 2>/dev/null && pwd) || fail "$2: there is no such folder"
  [[ -e $dir/exports ]] || fail "$dir: nothing was started here"
  "$1" "$dir"
}

[[ $# -eq 2 ]] || usage
case "$1" in
  start) start "$2" ;;
  status) in_folder status "$2" ;;
  head) in_folder head_again "$2" ;;
  stop) in_folder stop "$2" ;;
  *) usage ;;
esac
