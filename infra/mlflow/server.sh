#!/usr/bin/env bash
# A real MLflow server on this machine: PostgreSQL behind it, an object store for artifacts, several worker processes.
#
#   eval "$(infra/mlflow/server.sh start DIR)"   # prints `export MLFLOW_TRACKING_URI=...` and more; half a minute
#   infra/mlflow/server.sh kill DIR              # ends MLflow itself by SIGKILL, as a crash does; the rest goes on
#   infra/mlflow/server.sh stop DIR              # ends everything; `start DIR` goes on with what is kept there
#   infra/mlflow/server.sh check                 # are the packages there?
#
# Everything lies below DIR and listens on 127.0.0.1. Clients reach artifacts through the server and need no keys. Of the
# environment:
#   PORT (5000)      of MLflow; PORT + 1 is PostgreSQL's, PORT + 2 and PORT + 3 are the store's
#   AWS_*            the object store, if AWS_ACCESS_KEY_ID is set; else one is started by infra/objectstore/radosgw.sh
#   ARTIFACTS        s3://bucket/prefix (s3://mlflow/artifacts); the bucket is made where it is missing
#   WORKERS (2)      processes that answer
#   MLFLOW_SERVER_ALLOWED_HOSTS   names by which a proxy in front of it calls it
#   PYTHON           with mlflow, psycopg2 and boto3 (this repository's .venv, else python3)
# Debian's packages: apt-get install --no-install-recommends postgresql (and those of radosgw.sh). PostgreSQL refuses to
# run as root: started by root, it runs as the user `postgres`, who must be able to enter DIR.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly HERE WAIT_S=120 DATABASE_USER=postgres MARK=CVFT_MLFLOW_DIR
PATH=$PATH:$(printf '%s:' /usr/lib/postgresql/*/bin)
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=$HERE/../../.venv/bin/python
  [[ -x $PYTHON ]] || PYTHON=python3
fi

fail() {
  echo "server.sh: $*" >&2
  exit 1
}

usage() {
  fail "usage: $0 start DIR | kill DIR | stop DIR | check"
}

need_packages() {
  local program module
  for program in initdb pg_ctl createdb; do
    command -v "$program" >/dev/null || fail "$program is missing; install Debian's package:" \
      "apt-get install --no-install-recommends postgresql"
  done
  for module in mlflow psycopg2 boto3; do
    "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" ||
      fail "$PYTHON cannot import $module; install this repository with its extra: pip install '.[server]'"
  done
  has_own_store || "$HERE/../objectstore/radosgw.sh" check
}

has_own_store() {
  [[ -n ${AWS_ACCESS_KEY_ID:-} ]]
}

is_open() {  # port
  (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
}

as_database_user() {  # command...
  if [[ $(id -u) -eq 0 ]]; then
    setpriv --reuid="$DATABASE_USER" --regid="$DATABASE_USER" --clear-groups -- "$@"
  else
    "$@"
  fi
}

start() {  # dir
  local dir password
  need_packages
  mkdir -p "$1"
  dir=$(cd "$1" && pwd)
  read_ports "$dir"
  # The secrets of this server, such as PostgreSQL's password, are for its owner.
  umask 077
  [[ -e $dir/password ]] || od -An -N16 -tx1 /dev/urandom | tr -d ' \n' >"$dir/password"
  password=$(<"$dir/password")
  start_database "$dir" "$password" >&2
  start_store "$dir"
  start_mlflow "$dir" "$password"
  cat <<EXPORTS
export MLFLOW_TRACKING_URI=http://127.0.0.1:$PORT
export MLFLOW_ARTIFACTS=$ARTIFACTS
export AWS_ENDPOINT_URL=${AWS_ENDPOINT_URL:-}
export AWS_ACCESS_KEY_ID=$AWS_ACCESS_KEY_ID
export AWS_SECRET_ACCESS_KEY=$AWS_SECRET_ACCESS_KEY
export AWS_REGION=${AWS_REGION:-}
EXPORTS
}

read_ports() {  # dir
  local asked=${PORT:-}
  if [[ -e $1/port ]]; then
    PORT=$(<"$1/port")
    [[ -z $asked || $asked == "$PORT" ]] || fail "$1 was begun with PORT=$PORT; give the same, or none"
    return
  fi
  PORT=${asked:-5000}
  local number
  for number in "$PORT" $((PORT + 1)); do
    ! is_open "$number" || fail "port $number is taken; choose another PORT"
  done
  echo "$PORT" >"$1/port"
}

start_database() {  # dir password
  local home=$1/postgres
  if [[ ! -e $home/data/PG_VERSION ]]; then
    rm -rf "$home"
    mkdir "$home"
    echo "$2" >"$home/password"
    if [[ $(id -u) -eq 0 ]]; then
      chown -R "$DATABASE_USER" "$home"
    fi
    as_database_user test -w "$home" ||
      fail "the user $DATABASE_USER cannot enter $home; name a folder whose parents others may enter (chmod o+x)"
    as_database_user initdb -D "$home/new" -U mlflow --pwfile="$home/password" -A scram-sha-256 -E UTF8 --locale=C.UTF-8 \
      >"$1/initdb.log" 2>&1 || fail "initdb failed: $(tail -n 1 "$1/initdb.log")"
    mv "$home/new" "$home/data"
  fi
  as_database_user pg_ctl -D "$home/data" status >/dev/null ||
    as_database_user pg_ctl -D "$home/data" -l "$home/log" -w -t "$WAIT_S" -s start \
      -o "-p $((PORT + 1)) -c listen_addresses=127.0.0.1 -c unix_socket_directories=''" ||
    fail "PostgreSQL did not start: $(tail -n 1 "$home/log"); its log is $home/log"
  # The server's own database, made once.
  PGPASSWORD=$2 psql -h 127.0.0.1 -p $((PORT + 1)) -U mlflow -d postgres -Atc \
    "select 1 from pg_database where datname = 'mlflow'" | grep -q 1 ||
    PGPASSWORD=$2 createdb -h 127.0.0.1 -p $((PORT + 1)) -U mlflow mlflow
}

start_store() {  # dir
  ARTIFACTS=${ARTIFACTS:-s3://mlflow/artifacts}
  if ! has_own_store; then
    if ! is_open $((PORT + 2)); then
      MON_PORT=$((PORT + 3)) "$HERE/../objectstore/radosgw.sh" start "$1/objectstore" $((PORT + 2)) >/dev/null
    fi
    # shellcheck disable=SC1091  # written by radosgw.sh
    source "$1/objectstore/environment"
  fi
  export AWS_REQUEST_CHECKSUM_CALCULATION=when_required AWS_RESPONSE_CHECKSUM_VALIDATION=when_required
  local bucket=${ARTIFACTS#s3://}
  "$PYTHON" - "${bucket%%/*}" <<'CODE' || fail "cannot use the bucket of $ARTIFACTS"
import sys, boto3, botocore.exceptions
client = boto3.session.Session().client("s3")
try:
    client.head_bucket(Bucket=sys.argv[1])
except botocore.exceptions.ClientError as error:
    if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
        sys.exit(f"server.sh: {error}")
    client.create_bucket(Bucket=sys.argv[1])
except botocore.exceptions.BotoCoreError as error:
    sys.exit(f"server.sh: {error}")
CODE
}

start_mlflow() {  # dir password
  if answers; then
    return
  fi
  ! is_open "$PORT" || fail "port $PORT is taken by something that is not MLflow; choose another PORT"
  env "$MARK=$1" \
    MLFLOW_BACKEND_STORE_URI="postgresql+psycopg2://mlflow:$2@127.0.0.1:$((PORT + 1))/mlflow" \
    MLFLOW_ARTIFACTS_DESTINATION="$ARTIFACTS" \
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
    setsid "$PYTHON" -m mlflow server --host 127.0.0.1 --port "$PORT" --workers "${WORKERS:-2}" \
    </dev/null >>"$1/mlflow.log" 2>&1 &
  echo $! >"$1/mlflow.pid"
  local deadline=$((SECONDS + WAIT_S))
  until answers; do
    kill -0 "$(<"$1/mlflow.pid")" 2>/dev/null || fail "MLflow ended: $(tail -n 1 "$1/mlflow.log"); its log is $1/mlflow.log"
    ((SECONDS < deadline)) || fail "MLflow does not answer on port $PORT after $WAIT_S s; its log is $1/mlflow.log"
    sleep 0.3
  done
}

answers() {
  local line
  {
    exec 3<>"/dev/tcp/127.0.0.1/$PORT" && printf 'GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n' >&3 &&
      read -r -t 10 line <&3 && [[ $line == *" 200 "* ]]
  } 2>/dev/null
}

mlflow_processes() {  # dir: the server and its workers, also those whose parent was killed
  local environment
  for environment in /proc/[0-9]*/environ; do
    if tr '\0' '\n' 2>/dev/null <"$environment" | grep -qxF "$MARK=$1"; then
      basename "$(dirname "$environment")"
    fi
  done 2>/dev/null
}

end_mlflow() {  # dir signal
  local pids pid
  mapfile -t pids < <(mlflow_processes "$1")
  for pid in "${pids[@]}"; do
    kill -"$2" "$pid" 2>/dev/null || true
  done
  for pid in "${pids[@]}"; do
    local deadline=$((SECONDS + 5))
    while kill -0 "$pid" 2>/dev/null; do
      ((SECONDS < deadline)) || kill -KILL "$pid" 2>/dev/null || true
      sleep 0.1
    done
  done
  rm -f "$1/mlflow.pid"
}

stop() {  # dir
  end_mlflow "$1" TERM
  if [[ -e $1/postgres/data/postmaster.pid ]]; then
    as_database_user pg_ctl -D "$1/postgres/data" -m fast -s stop >&2 || true
  fi
  if [[ -e $1/objectstore ]]; then
    "$HERE/../objectstore/radosgw.sh" stop "$1/objectstore"
  fi
}

in_folder() {  # command dir arguments...
  local dir
  dir=$(cd "$2" 2>/dev/null && pwd) || fail "$2: there is no such folder"
  "$1" "$dir" "${@:3}"
}

case "${1:-}" in
  start) [[ $# -eq 2 ]] || usage; start "$2" ;;
  check) need_packages ;;
  kill) [[ $# -eq 2 ]] || usage; in_folder end_mlflow "$2" KILL ;;
  stop) [[ $# -eq 2 ]] || usage; in_folder stop "$2" ;;
  *) usage ;;
esac
