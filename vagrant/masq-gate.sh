#!/bin/sh
# The gateway: the package, and the interfaces that have these addresses.
#
#     masq-gate.sh PUBLIC INTERNAL
set -eu
export DEBIAN_FRONTEND=noninteractive
interface() { ip -o -4 address show to "$1" | awk '{ print $2 }'; }

apt-get install -y -qq /tmp/xdpmasq.deb nftables
wan=$(interface "$1")
lan=$(interface "$2")
sed -i -e "s/^#wan = .*/wan = \"$wan\"/" -e "s/^#lan = .*/lan = [\"$lan\"]/" /etc/xdpmasq/config.toml
xdpmasq check /etc/xdpmasq/config.toml
xdpmasq doctor --wan "$wan" --lan "$lan"
systemctl enable --now xdpmasq
xdpmasq status
