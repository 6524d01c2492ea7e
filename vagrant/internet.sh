#!/bin/sh
# The Internet: servers for the web, FTP and names; the first says to whom it talks. It has no way to 192.168.0.0/24.
set -eu
cat > /etc/nginx/sites-available/default <<'SITE'
server {
    listen 80 default_server;
    default_type text/plain;
    location = / { return 200 "$remote_addr\n"; }
    location = /endpoint { return 200 "$remote_addr:$remote_port"; }
    location = /file { root /srv/ftp; }
}
SITE
cat > /etc/vsftpd.conf <<'CONF'
listen=YES
anonymous_enable=YES
port_enable=YES
connect_from_port_20=YES
CONF
head -c 5000000 /dev/urandom > /srv/ftp/file
cat > /etc/systemd/system/lab-names.service <<'UNIT'
[Unit]
Description=All of lab.test is here
After=network-online.target
Wants=network-online.target

[Service]
ExecStart=/usr/sbin/dnsmasq --keep-in-foreground --conf-file=/dev/null --no-resolv --no-hosts \
    --listen-address=203.0.113.10 --bind-interfaces --address=/lab.test/203.0.113.10

[Install]
WantedBy=multi-user.target
UNIT
cat > /etc/systemd/system/lab-route.service <<'UNIT'
[Unit]
Description=No way to the LAN
After=network.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/sbin/ip route replace unreachable 192.168.0.0/24

[Install]
WantedBy=multi-user.target
UNIT
systemctl enable --quiet --now nginx vsftpd lab-names lab-route
systemctl restart nginx vsftpd
