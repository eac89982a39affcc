#!/bin/sh
# Prints an environment file for docker-compose.yml with new random passwords: sh config/compose-env.sh > .env
# Made once: with new passwords the database, which keeps its own, would refuse its clients.
set -eu
umask 077
echo "# Secrets of docker-compose.yml. Keep this file from others and out of version control."
for name in POSTGRES_PASSWORD REDIS_CLIENT_PASSWORD REDIS_FLUSHER_PASSWORD REDIS_WORKER_PASSWORD REDIS_READER_PASSWORD \
    REDIS_OPS_PASSWORD REDIS_METRICS_PASSWORD REDIS_JOBS_PASSWORD WEB_TOKEN GRAFANA_PASSWORD; do
    echo "$name=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')"
done
