#!/bin/sh
# Is the lab of virtual machines masqueraded? Run beside the Vagrantfile, after `vagrant up`.
set -eu
cd "$(dirname "$0")"
on() {
    machine=$1
    shift
    vagrant ssh "$machine" -c "$*" 2>/dev/null | tr -d '\r'
}
expect() { # what, wanted, found
    [ "$2" = "$3" ] || { echo "$1: $3, not $2" >&2; exit 1; }
    echo "$1: $3"
}

for box in a-box b-box; do
    expect "$box appears as" 203.0.113.1 "$(on $box curl -s -m 5 http://203.0.113.10/)"
    on $box ping -c 2 -W 2 203.0.113.10 > /dev/null
    echo "$box pings"
done
on masq-gate sudo systemctl restart xdpmasq
expect "after a restart a-box appears as" 203.0.113.1 "$(on a-box curl -s -m 5 http://203.0.113.10/)"
on masq-gate sudo xdpmasq status
on masq-gate sudo systemctl stop xdpmasq
expect "stopped, a-box gets" "" "$(on a-box 'curl -s -m 5 http://203.0.113.10/ || true')"
on masq-gate sudo systemctl start xdpmasq
expect "started again, a-box appears as" 203.0.113.1 "$(on a-box curl -s -m 5 http://203.0.113.10/)"
echo "all is as it should be"
