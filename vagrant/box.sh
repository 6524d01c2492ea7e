#!/bin/sh
# A host on the LAN: the Internet of the lab is behind the gateway. Vagrant's own card keeps the default route.
#
#     box.sh GATEWAY
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq curl traceroute iputils-ping
lan=$(ip -o route get "$1" | sed 's/.* dev \([^ ]*\).*/\1/')
cat > /etc/systemd/system/lab-route.service <<UNIT
[Unit]
Description=The way to the lab's Internet
After=network-online.target
Wants=network-online.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/sbin/ip route replace 203.0.113.0/24 via $1 dev $lan

[Install]
WantedBy=multi-user.target
UNIT
systemctl enable --now lab-route
