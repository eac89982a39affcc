#!/bin/sh
# The server in a container: writes the users' file from the passwords in the environment, then becomes the server.
# Further arguments are settings that win over redis.conf, such as --maxmemory 2gb.
set -eu
umask 077
here=$(dirname "$0")
users=/run/statecache/users.acl
sh "$here/users.sh" "$here/users.acl" > "$users"
exec valkey-server "$here/redis.conf" --bind '*' --dir /data --aclfile "$users" "$@"
