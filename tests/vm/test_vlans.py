"""VLANs for real: VLAN devices over veths, their packets carried by XDP on the devices below.

::

    one    h1.10    ─┐
    two    h1.20    ─┼─ eth1 [ gate ] eth0 ─ w0  eth0.7   internet 203.0.113.10
    three  h1.30.40 ─┘        802.1ad 30, 802.1Q 40

All hosts are in the namespace of their cable's end, each on a VLAN with a prefix and a routing table of its own.
"""

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import vmkit
from vmkit import datapath_of, run, soon, xdpmasq

from xdpmasq import bpf
from xdpmasq.lab import netns
from xdpmasq.net import netdev, xdp

PUBLIC, SERVER, PORT = "203.0.113.1", "203.0.113.10", 7
HOSTS = {"one": "10.0.10.2", "two": "10.0.20.2", "three": "10.0.30.2"}
LANS = ("eth1.10", "eth1.20", "eth1.30.40")
CONFIG_FILE = Path("/run/xdpmasq-test.toml")

OFF = (
    "rx off tx off tso off gso off rxvlan off txvlan off rx-vlan-stag-hw-parse off tx-vlan-stag-hw-insert off gro on"
)
CABLES = (
    "link add eth1 netns gate type veth peer name h1 netns hosts",
    "link add eth0 netns gate type veth peer name w0 netns internet",
)


def vlans(device: str) -> list[str]:
    return [
        f"link set {device} up",
        f"link add link {device} name {device}.10 type vlan id 10",
        f"link add link {device} name {device}.20 type vlan id 20",
        f"link add link {device} name {device}.30 type vlan protocol 802.1ad id 30",
        f"link add link {device}.30 name {device}.30.40 type vlan id 40",
        f"link set {device}.30 up",
    ]


def addresses(device: str, last: int) -> list[str]:
    found = []
    for name, prefix in ((f"{device}.10", "10.0.10"), (f"{device}.20", "10.0.20"), (f"{device}.30.40", "10.0.30")):
        found += [f"addr add {prefix}.{last}/24 dev {name}", f"link set {name} up"]
    return found


@pytest.fixture(scope="module", autouse=True)
def network() -> Iterator[None]:
    CONFIG_FILE.write_text(CONFIG)
    names = ("gate", "hosts", "internet")
    netns.ip_batch([f"netns add {name}" for name in names])
    netns.ip_batch(CABLES)
    for name, device in (("gate", "eth1"), ("gate", "eth0"), ("hosts", "h1"), ("internet", "w0")):
        run(name, "ethtool", "-K", device, *OFF.split())
    wan = ["link set eth0 up", "link add link eth0 name eth0.7 type vlan id 7", "link set eth0.7 up"]
    netns.ip_batch([*vlans("eth1"), *addresses("eth1", 1), *wan, f"addr add {PUBLIC}/24 dev eth0.7"], "gate")
    routes = []
    for table, (source, gateway) in enumerate([(each, each[:-1] + "1") for each in HOSTS.values()], 100):
        routes += [f"route add default via {gateway} table {table}", f"rule add from {source} table {table}"]
    netns.ip_batch([*vlans("h1"), *addresses("h1", 2), *routes], "hosts")
    far = ["link set w0 up", "link add link w0 name w0.7 type vlan id 7", "link set w0.7 up"]
    netns.ip_batch([*far, f"addr add {SERVER}/24 dev w0.7"], "internet")
    vmkit.serve("internet", SERVER, PORT)
    yield
    netns.delete(names)


CONFIG = f"""
[interfaces]
wan = "eth0.7"
lan = {list(LANS)}
mode = "xdp"
[sessions]
further = 65536 # as in the Makefile, which has the programs compiled for it
"""


@pytest.fixture(scope="module")
def attached() -> Iterator[None]:
    """One gateway for the tests that leave it as it was: to compile takes its time in an emulated machine."""
    agent = start()
    yield
    agent.terminate()
    agent.wait()
    xdpmasq("detach")


def start() -> "subprocess.Popen[bytes]":
    return vmkit.start("--config", str(CONFIG_FILE))


def client(host: str) -> socket.socket:
    return vmkit.client("hosts", HOSTS[host])


def ask(one: socket.socket, text: bytes = b"hello") -> None:
    one.sendto(text, (SERVER, PORT))
    assert one.recv(4096) == PUBLIC.encode() + b" " + text


def rides(one: socket.socket, times: int = 20) -> bool:
    """Whether XDP carries it, both ways."""
    ask(one)
    before = datapath_of().counters()
    for _ in range(times):
        ask(one)
    after = datapath_of().counters()
    return all(after[name] - before[name] >= times for name in ("fast_outbound", "fast_inbound"))


def xdp_on(device: str) -> int:
    with netns.entered("gate"):
        return netdev.link(device).xdp_prog_id


def interfaces() -> dict[str, tuple[str, str]]:
    """By name, the hook and why that one."""
    return {each["name"]: (each["hook"], each["why"]) for each in datapath_of().manifest["interfaces"]}


# --- first those that attach for themselves: `attached` stays until the end of the module


def test_killed_adopted_and_detached() -> None:
    agent = start()
    with client("one") as one:
        soon(lambda: rides(one), "it rides")
        agent.kill()
        agent.wait()
        ask(one)
        agent = start()
        soon(lambda: rides(one), "it rides again")
        assert len(datapath_of().live_slots()) == 1
    xdpmasq("detach")
    agent.wait()
    assert (xdp_on("eth0"), xdp_on("eth1")) == (0, 0)


def test_a_device_that_takes_tags_off_is_refused() -> None:
    run("gate", "ethtool", "-K", "eth1", "rxvlan", "on")
    try:
        refused = xdpmasq("run", "--config", str(CONFIG_FILE), check=False)
        assert refused.returncode == 1
        assert "ethtool -K eth1 rx-vlan-hw-parse off" in refused.stderr
    finally:
        run("gate", "ethtool", "-K", "eth1", "rxvlan", "off")
    assert (xdp_on("eth0"), xdp_on("eth1")) == (0, 0)


def test_somebody_elses_program_stays() -> None:
    passes = bpf.Program(bpf._load(bytes.fromhex("b7000000020000009500000000000000"), bpf.PROG_TYPES["xdp"], "else"))
    with netns.entered("gate"):
        index = netdev.link("eth1").index
        xdp.attach(index, passes.fd, "native")
    try:
        refused = xdpmasq("run", "--config", str(CONFIG_FILE), check=False)
        assert refused.returncode == 1
        assert "someone else's program" in refused.stderr
        assert xdp_on("eth1") == passes.id
    finally:
        with netns.entered("gate"):
            xdp.detach(index, "native", passes.fd)


# --- then those that share a gateway


@pytest.mark.usefixtures("attached")
def test_every_vlan_rides_xdp() -> None:
    for name, (hook, why) in interfaces().items():
        device = name.partition(".")[0]
        assert (hook, why) == ("xdp", f"--mode xdp, on {device}")
        assert xdp_on(device)
    for host in HOSTS:
        with client(host) as one:
            soon(lambda one=one: rides(one), host)  # type: ignore[misc]
            ask(one, bytes(range(200)))


@pytest.mark.usefixtures("attached")
def test_deleted_and_made_anew() -> None:
    with client("one") as one:
        soon(lambda: rides(one), "it rides")
        link = "link add link eth1 name eth1.10 type vlan id 10"
        netns.ip_batch(["link del eth1.10", link, "addr add 10.0.10.1/24 dev eth1.10", "link set eth1.10 up"], "gate")
        soon(lambda: rides(one), "it rides again")


@pytest.mark.usefixtures("attached")
def test_a_device_that_begins_to_take_tags_off() -> None:
    """Its VLANs go on on TC, and `status` says why."""
    run("gate", "ethtool", "-K", "eth1", "rxvlan", "on")
    try:
        soon(lambda: {interfaces()[lan][0] for lan in LANS} == {"tc"}, "TC takes over")
        assert xdp_on("eth1") == 0
        assert "takes VLAN tags off" in xdpmasq("status").stdout
        with client("two") as one:
            ask(one)
    finally:
        run("gate", "ethtool", "-K", "eth1", "rxvlan", "off")
    soon(lambda: {hook for hook, _ in interfaces().values()} == {"xdp"}, "XDP is back")
    assert xdp_on("eth1")


@pytest.mark.usefixtures("attached")
def test_tags_beside_the_frame_are_not_seen() -> None:
    """Why a veth's sending end must not offload tags: such frames seem untagged, whatever rxvlan says here."""
    with client("one") as one:
        soon(lambda: rides(one), "it rides")
        run("hosts", "ethtool", "-K", "h1", "txvlan", "on")
        try:
            before = datapath_of().counters()
            ask(one)
            after = datapath_of().counters()
        finally:
            run("hosts", "ethtool", "-K", "h1", "txvlan", "off")
    assert after["up_not_for_us"] > before["up_not_for_us"]
    assert after["fast_outbound"] == before["fast_outbound"]
