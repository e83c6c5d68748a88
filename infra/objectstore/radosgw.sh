#!/usr/bin/env bash
# A real object store on this machine: Ceph's S3 gateway over one monitor and one disk, for tests and trials.
#
#   eval "$(infra/objectstore/radosgw.sh start DIR PORT)"   # prints `export AWS_...=...`; about 15 seconds
#   infra/objectstore/radosgw.sh stop DIR                   # the same `start` goes on with what is stored
#   infra/objectstore/radosgw.sh check                      # are the packages there?
#
# Everything lies below DIR (some 50 MB to begin with, and what is stored) and listens on 127.0.0.1; the gateway, which asks
# for keys, on another address of this machine if ADDRESS names one. Several can run: PORT is the gateway's, PORT + 1
# the monitor's, unless MON_PORT names another. It needs neither systemd nor root, only Debian's packages:
# apt-get install --no-install-recommends ceph-mon ceph-osd radosgw ceph-common
# Not for data that matters: one copy, no authentication between Ceph's own processes.
set -euo pipefail

readonly WAIT_S=120 ROOM_MB=300
ADDRESS=${ADDRESS:-127.0.0.1}

fail() {
  echo "radosgw.sh: $*" >&2
  exit 1
}

usage() {
  fail "usage: $0 start DIR PORT | stop DIR | check"
}

need_packages() {
  local program
  for program in ceph-mon ceph-osd radosgw ceph radosgw-admin monmaptool; do
    command -v "$program" >/dev/null || fail "$program is missing; install Debian's packages:" \
      "apt-get install --no-install-recommends ceph-mon ceph-osd radosgw ceph-common"
  done
}

need_room() {  # dir
  local free_mb
  free_mb=$(df --output=avail --block-size=1MiB "$1" | tail -n 1)
  ((free_mb >= ROOM_MB)) || fail "$1 is on a disk with $((free_mb)) MB free, and a store begins with $ROOM_MB MB;" \
    "make room, or name a folder elsewhere"
}

is_open() {  # port [address]
  (exec 3<>"/dev/tcp/${2:-127.0.0.1}/$1") 2>/dev/null
}

write_configuration() {  # dir port mon_port
  cat >"$1/ceph.conf" <<CONF
[global]
fsid = $(</proc/sys/kernel/random/uuid)
run_dir = $1
pid_file = $1/\$name.pid
log_file = $1/\$name.log
admin_socket =
mon_initial_members = a
mon_host = v2:127.0.0.1:$3
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr1 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
[mon]
paxos_propose_interval = 0.05
paxos_min_wait = 0.02
mon_data = $1/mon
mon_data_avail_crit = -1  # percent of a disk that has other users; need_room looks at what is there
mon_cluster_log_file = $1/cluster.log
[osd]
osd_data = $1/osd
osd_class_load_list = *
bluestore_block_size = $((64 << 30))
bluestore_cache_autotune = false
bluestore_cache_size = $((128 << 20))
[client]
ms_mon_client_mode = crc
rgw_data = $1/rgw
rgw_frontends = beast endpoint=$ADDRESS:$2
rgw_enable_usage_log = false
CONF
}

start_monitor() {  # dir mon_port
  local conf=(-c "$1/ceph.conf")
  monmaptool --create --clobber --fsid "$(sed -n 's/^fsid = //p' "$1/ceph.conf")" \
    --addv a "[v2:127.0.0.1:$2]" "$1/monmap"
  ceph-mon "${conf[@]}" --mkfs -i a --monmap "$1/monmap"
  ceph-mon "${conf[@]}" -i a
}

start_disk() {  # dir
  local conf=(-c "$1/ceph.conf") id
  id=$(</proc/sys/kernel/random/uuid)
  timeout "$WAIT_S" ceph "${conf[@]}" osd new "$id"
  ceph-osd "${conf[@]}" -i 0 --mkfs --osd-uuid "$id"
  ceph-osd "${conf[@]}" -i 0
}

start() {  # dir port
  local dir port=$2 mon_port=${MON_PORT:-$(($2 + 1))} secret number
  need_packages
  mkdir -p "$1"
  dir=$(cd "$1" && pwd)
  if [[ -e $dir/environment ]]; then
    mon_port=$(sed -n 's/^mon_host = v2:127.0.0.1://p' "$dir/ceph.conf")
    grep -q "endpoint=$ADDRESS:$port\$" "$dir/ceph.conf" || fail "$dir was begun with another ADDRESS:PORT:" \
      "$(sed -n 's/.*endpoint=//p' "$dir/ceph.conf")"
  elif [[ -n $(ls -A "$dir") ]]; then
    fail "$dir is not empty; name a new folder, or stop what runs there and delete it"
  else
    need_room "$dir"  # one that was begun starts with what there is: things are deleted through it
  fi
  for number in "$port" "$mon_port"; do
    if is_open "$number" || is_open "$number" "$ADDRESS"; then
      fail "port $number is taken; choose another PORT, or MON_PORT for the monitor's"
    fi
  done
  secret=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
  # shellcheck disable=SC2064  # the folder of now
  trap "give_up '$dir'" EXIT
  if [[ -e $dir/environment ]]; then
    start_again "$dir" >"$dir/start.log" 2>&1
  else
    mkdir "$dir/mon" "$dir/osd" "$dir/rgw"
    write_configuration "$dir" "$port" "$mon_port"
    start_daemons "$dir" "$mon_port" "$secret" >"$dir/start.log" 2>&1
  fi
  wait_for_gateway "$dir" "$port"
  if [[ ! -e $dir/environment ]]; then
    (umask 077; write_environment "$port" "$secret" >"$dir/environment.new")
    mv "$dir/environment.new" "$dir/environment"  # whole or not at all: by it the next `start` knows a store that was begun
  fi
  trap - EXIT
  cat "$dir/environment"
}

write_environment() {  # port secret
  cat <<EXPORTS
export AWS_ENDPOINT_URL=http://$ADDRESS:$1
export AWS_ACCESS_KEY_ID=cvft
export AWS_SECRET_ACCESS_KEY=$2
export AWS_REGION=us-east-1
EXPORTS
}

start_again() {  # dir
  ceph-mon -c "$1/ceph.conf" -i a
  ceph-osd -c "$1/ceph.conf" -i 0
  radosgw -c "$1/ceph.conf" -n client.rgw
}

start_daemons() {  # dir mon_port secret
  start_monitor "$1" "$2"
  start_disk "$1"
  timeout "$WAIT_S" radosgw-admin -c "$1/ceph.conf" user create --uid cvft --display-name cvft \
    --access-key cvft --secret-key "$3"
  radosgw -c "$1/ceph.conf" -n client.rgw
}

wait_for_gateway() {  # dir port
  local deadline=$((SECONDS + WAIT_S))
  until is_open "$2" "$ADDRESS"; do
    ((SECONDS < deadline)) || fail "the gateway does not listen on port $2; see $1/client.rgw.log"
    sleep 0.2
  done
}

give_up() {  # dir
  echo "radosgw.sh: it did not start: $(grep -v '^$' "$1/start.log" 2>/dev/null | tail -n 1); the logs are in $1" >&2
  stop "$1"
}

stop() {  # dir
  local file pid
  for file in "$1"/*.pid; do
    [[ -e $file ]] || continue
    pid=$(<"$file")
    # A number alone may belong to another process by now.
    if [[ -n $pid ]] && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "$1/ceph.conf"; then
      kill -KILL "$pid"  # asked nicely, it takes ten seconds; what was stored is on the disk
      while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
    fi
    rm -f "$file"
  done
}

case "${1:-}" in
  start) [[ $# -eq 3 ]] || usage; start "$2" "$3" ;;
  check) need_packages ;;
  stop)
    [[ $# -eq 2 ]] || usage
    dir=$(cd "$2" 2>/dev/null && pwd) || fail "$2: there is no such folder"
    stop "$dir"
    ;;
  *) usage ;;
esac
