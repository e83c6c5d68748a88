#!/usr/bin/env bash
# Writes `.env` beside this file: a password by chance for each service, which no one else may read. What is there stays.
set -euo pipefail
cd "$(dirname "$0")"

if [[ -e .env ]]; then
  echo "make-env.sh: .env is there already; delete it, and the volumes that were made with it, for new passwords" >&2
  exit 1
fi
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
umask 077
cat >.env <<ENV
OBJECTSTORE_USER=cvft
OBJECTSTORE_PASSWORD=$(random)
POSTGRES_PASSWORD=$(random)
RAY_AUTH_TOKEN=$(random)
GRAFANA_PASSWORD=$(random)
ENV
echo "make-env.sh: wrote $PWD/.env" >&2
