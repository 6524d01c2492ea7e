"""A provider's line that is dialled, a bridge as LAN, and a firewall with a flowtable beside us.

::

    one  h1 ── eth1 ┐                              pty
                    ├ br0 [ gate ] ppp0 ──── pppd ───── pppd ── ppp9 [ internet ] lo 198.51.100.10
    two  h2 ── eth2 ┘      nftables, flowtable

The provider's end of the line takes 1500 bytes, ours 1492, so that nobody but us keeps segments small.
"""

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import vmkit
from vmkit import datapath_of, run, soon, xdpmasq

from xdpmasq.lab import netns

PUBLIC, OTHER, SERVER, PORT = "203.0.113.1", "203.0.113.2", "198.51.100.10", 7
HOSTS = {"one": "10.0.0.11", "two": "10.0.0.12"}
SEGMENT = 1492 - 40 - 12  # of an MTU, without headers and timestamps
CONFIG_FILE = Path("/run/xdpmasq-test.toml")
CONFIG = """
[interfaces]
wan = "ppp0"
lan = ["br0"]
[tcp]
mss = "auto"
[sessions]
further = 65536 # as in the Makefile, which has the programs compiled for it
"""
RULES = """
table ip office {
    counter walked { }
    flowtable fast { hook ingress priority 0; devices = { br0, ppp0 }; }
    chain forward {
        type filter hook forward priority 0; policy drop;
        counter name walked
        ct state established,related flow add @fast
        ct state established,related accept
        iifname br0 oifname ppp0 accept
    }
}
"""


def dial(public: str) -> "subprocess.Popen[bytes]":
    """Both ends of a line, the provider's on the pty of ours."""
    common = "nodetach noauth local noccp noipv6 mtu 1492 mru 1492"
    provider = f"ip netns exec internet pppd notty {common} ifname ppp9 192.0.2.1:{public}"
    ours = f"ip netns exec gate pppd {common} ifname ppp0 defaultroute {public}:192.0.2.1"
    line = subprocess.Popen([*shlex.split(ours), "pty", provider])
    soon(lambda: public in run("gate", "ip", "-4", "addr", "show", "ppp0", check=False).stdout, "it is dialled")
    soon(lambda: public in run("internet", "ip", "-4", "addr", "show", "ppp9", check=False).stdout, "it is answered")
    netns.ip_batch(["link set ppp9 mtu 1500"], "internet")
    return line


def hang_up(line: "subprocess.Popen[bytes]") -> None:
    line.terminate()
    line.wait()
    soon(lambda: run("gate", "ip", "link", "show", "ppp0", check=False).returncode != 0, "the line is gone")


@pytest.fixture(scope="module", autouse=True)
def network() -> Iterator[None]:
    CONFIG_FILE.write_text(CONFIG)
    subprocess.run(["modprobe", "-a", "ppp_generic", "ppp_async", "bridge", "nf_flow_table"], check=True)
    names = ("gate", "internet", *HOSTS)
    netns.ip_batch([f"netns add {name}" for name in names])
    for name in names:
        netns.ip_batch(["link set lo up"], name)
    netns.ip_batch(["link add br0 type bridge", "addr add 10.0.0.1/24 dev br0", "link set br0 up"], "gate")
    for nth, (name, address) in enumerate(HOSTS.items(), 1):
        netns.ip_batch([f"link add eth{nth} netns gate type veth peer name h{nth} netns {name}"])
        netns.ip_batch([f"link set eth{nth} master br0 up"], "gate")
        lines = [f"addr add {address}/24 dev h{nth}", f"link set h{nth} up", "route add default via 10.0.0.1"]
        netns.ip_batch(lines, name)
    netns.ip_batch([f"addr add {SERVER}/32 dev lo"], "internet")
    vmkit.serve("internet", SERVER, PORT)
    yield
    netns.delete(names)


@pytest.fixture(scope="module")
def line() -> Iterator["subprocess.Popen[bytes]"]:
    """One line and one gateway for the tests that leave them as they were."""
    dialled = dial(PUBLIC)
    agent = vmkit.start("--config", str(CONFIG_FILE))
    soon(lambda: len(vmkit.programs_on("ppp0", "br0")) >= 3, "it is attached to both")
    yield dialled
    xdpmasq("detach")
    agent.wait()
    left = vmkit.programs_on("ppp0", "br0")
    hang_up(dialled)
    assert left == []


def asked_as(host: str, times: int = 1) -> str:
    """By which address the server sees the host."""
    with vmkit.client(host, HOSTS[host]) as one:
        for _ in range(times):
            one.sendto(b"hello", (SERVER, PORT))
            seen = one.recv(100).decode()
    assert seen.endswith(" hello")
    return seen.partition(" ")[0]


@pytest.mark.usefixtures("line")
def test_both_hosts_of_a_bridge_leave_by_a_dialled_line() -> None:
    for host in HOSTS:
        soon(lambda host=host: asked_as(host) == PUBLIC, host)  # type: ignore[misc]
        run(host, "ping", "-c1", "-W20", SERVER)
    before = datapath_of().counters()
    asked_as("one", times=10)
    after = datapath_of().counters()
    assert after["slow_outbound"] - before["slow_outbound"] == 10
    assert after["slow_inbound"] - before["slow_inbound"] == 10


@pytest.mark.usefixtures("line")
def test_segments_fit_the_line() -> None:
    text = bytes(range(256)) * 1000
    stream = vmkit.stream_to("one", (SERVER, PORT))
    assert vmkit.segment(stream) == SEGMENT
    assert vmkit.talk(stream, text) == (PUBLIC, SEGMENT, text)


@pytest.mark.usefixtures("line")
def test_beside_a_flowtable() -> None:
    """What the kernel's own fast path carries is translated both ways; a session outlives it, and began before it."""
    with vmkit.client("one", HOSTS["one"]) as older:

        def ask() -> None:
            older.sendto(b"hello", (SERVER, PORT))
            assert older.recv(100) == PUBLIC.encode() + b" hello"

        ask()
        run("gate", "nft", RULES)
        try:
            ask()
            assert asked_as("one", times=20) == PUBLIC
            walked = run("gate", "nft", "list", "counter", "ip", "office", "walked").stdout
            assert 0 < int(walked.partition("packets ")[2].split()[0]) < 20  # of 42
            text = bytes(range(256)) * 1000
            assert vmkit.talk(vmkit.stream_to("two", (SERVER, PORT)), text) == (PUBLIC, SEGMENT, text)
            ask()
        finally:
            run("gate", "nft", "delete table ip office")
        ask()
