#!/bin/sh
# Writes the environment file of docker-compose.yml with new random passwords, for its owner alone: sh config/compose-env.sh
#
# It is .env beside docker-compose.yml; another name may be given, and - prints it. A file that is there stays as it is: with new
# passwords the database, which keeps its own, would refuse its clients.
set -eu
umask 077
file=${1:-"$(dirname "$0")/../.env"}
secrets() {
    echo "# Secrets of docker-compose.yml. Keep this file from others and out of version control."
    for name in POSTGRES_PASSWORD REDIS_CLIENT_PASSWORD REDIS_FLUSHER_PASSWORD REDIS_WORKER_PASSWORD REDIS_READER_PASSWORD \
        REDIS_OPS_PASSWORD REDIS_METRICS_PASSWORD REDIS_JOBS_PASSWORD WEB_TOKEN GRAFANA_PASSWORD; do
        echo "$name=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')"
    done
}

if [ "$file" = - ]; then
    secrets
    exit
fi
if [ -e "$file" ]; then
    echo "compose-env.sh: $file is there already, and is left as it is: the database keeps the password that it was made with." \
        "Where no database has been made yet, or the file is empty, delete it and do this again." >&2
    exit 1
fi
set -C # whoever makes it meanwhile keeps his
: > "$file"
set +C
trap 'rm -f "$file"' EXIT
secrets > "$file"
trap - EXIT
echo "compose-env.sh: wrote $file" >&2
