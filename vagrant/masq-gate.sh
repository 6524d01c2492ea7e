#!/bin/sh
# The gateway: the package, the interfaces that have these addresses, Prometheus with the package's rules, and Grafana with its
# dashboards where that is to be had (Debian has none: GRAFANA_DEB in the environment of `vagrant up` names its package).
#
#     masq-gate.sh PUBLIC INTERNAL
set -eu
export DEBIAN_FRONTEND=noninteractive
interface() { ip -o -4 address show to "$1" | awk '{ print $2 }'; }

apt-get install -y -qq /tmp/xdpmasq.deb
wan=$(interface "$1")
lan=$(interface "$2")
sed -i -e "s/^#wan = .*/wan = \"$wan\"/" -e "s/^#lan = .*/lan = [\"$lan\"]/" /etc/xdpmasq/config.toml
xdpmasq check /etc/xdpmasq/config.toml
xdpmasq doctor --wan "$wan" --lan "$lan"
systemctl enable --quiet --now xdpmasq
xdpmasq status

cat > /etc/prometheus/prometheus.yml <<'CONF'
global: { scrape_interval: 15s, evaluation_interval: 15s }
rule_files: [/usr/share/xdpmasq/prometheus/rules.yml]
scrape_configs:
  - job_name: xdpmasq
    static_configs: [{ targets: ["127.0.0.1:9477"] }]
CONF
promtool check config /etc/prometheus/prometheus.yml
systemctl enable --quiet prometheus
systemctl restart prometheus

[ -e /tmp/grafana.deb ] || exit 0
apt-get install -y -qq /tmp/grafana.deb
mkdir -p /etc/grafana/provisioning/datasources /etc/grafana/provisioning/dashboards
cat > /etc/grafana/provisioning/datasources/lab.yml <<'CONF'
apiVersion: 1
datasources: [{ name: Prometheus, type: prometheus, url: "http://127.0.0.1:9090", isDefault: true }]
CONF
cat > /etc/grafana/provisioning/dashboards/lab.yml <<'CONF'
apiVersion: 1
providers: [{ name: xdpmasq, options: { path: /usr/share/xdpmasq/dashboards } }]
CONF
systemctl enable --quiet --now grafana-server
