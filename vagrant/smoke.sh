#!/bin/sh
# Is the lab of virtual machines masqueraded? Run beside the Vagrantfile, after `vagrant up`.
set -eu
cd "$(dirname "$0")"
gate=203.0.113.1
other=203.0.113.7
server=203.0.113.10
checks=0
began=$(date +%s)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
vagrant ssh-config > "$work/ssh"

on() { # machine, command
    machine=$1
    shift
    ssh -n -F "$work/ssh" "$machine" "$*"
}
both() { # command, for a-box and b-box at the same time; what they say is in $work/a-box, $work/b-box
    on a-box "$1" > "$work/a-box" &
    on b-box "$1" > "$work/b-box"
    wait $!
}
expect() { # what, wanted, found
    [ "$2" = "$3" ] || { echo "$1: $3, not $2" >&2; exit 1; }
    checks=$((checks + 1))
    echo "$1: $3"
}
eventually() { # what, wanted, command: it may take a while
    what=$1 wanted=$2 tries=0
    shift 2
    until found=$("$@") && [ "$found" = "$wanted" ] || [ $tries = 60 ]; do
        tries=$((tries + 1))
        sleep 2
    done
    expect "$what" "$wanted" "$found"
}
who() { # machine: as what it appears outside
    on "$1" "curl -s -m 10 http://$server/ || true"
}
asked() { # query: what Prometheus on the gateway answers
    on masq-gate "curl -s --data-urlencode 'query=$1' http://127.0.0.1:9090/api/v1/query" |
        sed 's/.*"value":\[[^,]*,"\([^"]*\)".*/\1/'
}

for box in a-box b-box; do
    expect "$box appears as" $gate "$(who $box)"
done

wanted=$(on internet 'md5sum < /srv/ftp/file')
both "curl -s -m 120 http://$server/file | md5sum"
for box in a-box b-box; do
    expect "5 MB at once, $box" "$wanted" "$(cat "$work/$box")"
done
both "dig +short +tries=2 +time=5 -b \$(hostname -I | grep -o '192\.168\.0\.[0-9]*')#40053 @$server any.lab.test"
for box in a-box b-box; do
    expect "a name, asked from the same port at once, $box" $server "$(cat "$work/$box")"
done
both "ping -n -q -c 3 -W 5 -e 77 $server | grep -o '[0-9]* received'"
for box in a-box b-box; do
    expect "pings with the same id at once, $box" "3 received" "$(cat "$work/$box")"
done
for by in icmp default; do # the latter: UDP
    expect "traceroute -M $by sees" "192.168.0.1 $server" \
        "$(on a-box "sudo traceroute -n -M $by -q 1 -N 1 -w 5 -m 4 $server" | sed -n 's/^ *[0-9]  \([0-9.]*\) .*/\1/p' | xargs)"
done

on b-box 'test -e ~/.ssh/lab || ssh-keygen -q -t ed25519 -N "" -f ~/.ssh/lab'
key=$(on b-box 'cat ~/.ssh/lab.pub')
on internet "echo '$key' >> ~/.ssh/authorized_keys"
expect "rsync over ssh" "$wanted" "$(on b-box "rsync -e 'ssh -i ~/.ssh/lab -o StrictHostKeyChecking=no -o LogLevel=ERROR' \
    vagrant@$server:/srv/ftp/file /tmp/copy && md5sum < /tmp/copy")"

# In active mode the server calls back, through the port that the ALG has opened.
for passive in true false; do
    expect "FTP, passive $passive" "$wanted" "$(on a-box "rm -f /tmp/file
        lftp -c 'set net:timeout 30; set ftp:passive-mode $passive; open $server; get -O /tmp file' && md5sum < /tmp/file")"
done

on masq-gate sudo xdpmasq forward add tcp 8080 192.168.0.2:80
expect "port 8080 leads to" "a-box, asked by $server" "$(on internet curl -s -m 10 http://$gate:8080/)"
expect "and from inside" "a-box, asked by $gate" "$(on b-box curl -s -m 10 http://$gate:8080/)"
on masq-gate sudo xdpmasq forward del tcp 8080
expect "without the forward" "" "$(on internet "curl -s -m 10 http://$gate:8080/ || true")"

own=$(on masq-gate "curl -s -m 10 -w ' %{local_ip}:%{local_port}' http://$server/endpoint")
expect "the gateway's own connection keeps its port" "${own#* }" "${own% *}"

wan=$(on masq-gate "ip -o -4 address show to $gate" | awk '{ print $2 }')
for address in $other $gate; do
    on masq-gate "sudo sh -c 'ip -4 address flush dev $wan && ip address add $address/24 dev $wan'"
    eventually "with $address on the WAN a-box appears as" "$address" who a-box
done

eventually "Prometheus scrapes the gateway" 1 asked 'up{job="xdpmasq"}'
eventually "and sees sessions" 1 asked 'sum(xdpmasq_session_opened_total) > bool 0'
expect "alerts of leaks" "0" "$(on masq-gate curl -s http://127.0.0.1:9090/api/v1/alerts | grep -c XdpmasqLeaks || true)"

on masq-gate sudo systemctl restart xdpmasq
expect "after a restart a-box appears as" $gate "$(who a-box)"
on masq-gate 'sudo kill -9 $(systemctl show -P MainPID xdpmasq)'
expect "its agent killed, a-box appears as" $gate "$(who a-box)"
eventually "systemd starts it anew" active on masq-gate "systemctl is-active xdpmasq || true"
on masq-gate sudo xdpmasq status
on masq-gate sudo systemctl stop xdpmasq
expect "stopped, a-box gets" "" "$(who a-box)"
on masq-gate sudo systemctl start xdpmasq
expect "started again, a-box appears as" $gate "$(who a-box)"
echo "all is as it should be: $checks checks in $(($(date +%s) - began)) s"
