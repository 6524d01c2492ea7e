#!/bin/sh
# Installs what is missing of these packages; a machine that has them needs no network.
#
#     need.sh PACKAGE ...
set -eu
missing=
for each in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$each" 2>/dev/null)" = installed ] || missing="$missing $each"
done
[ -n "$missing" ] || exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -y -qq $missing
