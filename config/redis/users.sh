#!/bin/sh
# Prints the server's ACL file from the template: sh users.sh users.acl > FILE
#
# Each #{NAME} becomes # and the SHA-256 of the environment variable NAME; comments go. STATECACHE_NAMESPACE, if set, takes the
# place of the namespace "statecache". Nothing is printed unless everything is there.
set -eu
template=${1:?"which template? usage: sh users.sh users.acl > FILE"}
namespace=${STATECACHE_NAMESPACE:-statecache}
case $namespace in
    *[!A-Za-z0-9_.-]*) echo "users.sh: the namespace holds other characters than letters, digits, _ . -" >&2; exit 2 ;;
esac

edits="/^#/d;/^\$/d;s/{statecache:/{$namespace:/g"
for name in $(sed -n 's/^user .*#{\([A-Z_]*\)}.*/\1/p' "$template"); do
    eval "password=\${$name-}"
    if [ "${#password}" -lt 16 ]; then
        echo "users.sh: $name is not set, or shorter than 16 characters: give each role a long random password of its own," \
            "or delete its line in $template" >&2
        exit 2
    fi
    hash=$(printf %s "$password" | sha256sum | cut -d " " -f 1)
    edits="$edits;s/#{$name}/#$hash/"
done
sed "$edits" "$template"
