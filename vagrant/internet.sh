#!/bin/sh
# The Internet: a web server that says to whom it talks. It has no way to 192.168.0.0/24.
set -eu
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq nginx-light
cat > /etc/nginx/sites-available/default <<'SITE'
server {
    listen 80 default_server;
    location / { default_type text/plain; return 200 "$remote_addr\n"; }
}
SITE
systemctl reload-or-restart nginx
ip route replace unreachable 192.168.0.0/24
