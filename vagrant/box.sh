#!/bin/sh
# A host on the LAN: the Internet of the lab is behind the gateway. Vagrant's own card keeps the default route. A web server
# stands for whatever a port is forwarded to.
#
#     box.sh GATEWAY
set -eu
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
cat > /etc/nginx/sites-available/default <<'SITE'
server {
    listen 80 default_server;
    location / { default_type text/plain; return 200 "$hostname, asked by $remote_addr\n"; }
}
SITE
systemctl enable --quiet --now lab-route nginx
systemctl restart nginx
