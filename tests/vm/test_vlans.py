"""VLANs for real: VLAN devices over veths, their packets carried by XDP on the devices below.

::

    one    h1.10    ─┐
    two    h1.20    ─┼─ eth1 [ gate ] eth0 ─ w0  eth0.7   internet 203.0.113.10
    three  h1.30.40 ─┘        802.1ad 30, 802.1Q 40

All hosts are in the namespace of their cable's end, each on a VLAN with a prefix and a routing table of its own.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xdpmasq import bpf, netdev
from xdpmasq.lab import netns

XDPMASQ = str(Path(sys.executable).with_name("xdpmasq"))
PUBLIC, SERVER, PORT = "203.0.113.1", "203.0.113.10", 7
HOSTS = {"one": "10.0.10.2", "two": "10.0.20.2", "three": "10.0.30.2"}
LANS = ("eth1.10", "eth1.20", "eth1.30.40")
PATIENCE_S = 60

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


def run(namespace: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    whole = ["ip", "netns", "exec", namespace, *command]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=300, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def xdpmasq(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("gate", XDPMASQ, *words, check=check)


@pytest.fixture(scope="module", autouse=True)
def network() -> Iterator[None]:
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
    with netns.entered("internet"):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((SERVER, PORT))
    threading.Thread(target=echo, args=(server,), daemon=True).start()
    yield
    netns.delete(names)


def echo(server: socket.socket) -> None:
    """Tells everyone who they are, and what they said."""
    while True:
        said, who = server.recvfrom(4096)
        server.sendto(who[0].encode() + b" " + said, who)


@pytest.fixture
def attached() -> Iterator[None]:
    attach()
    yield
    xdpmasq("detach", check=False)


def attach(*, mode: str = "xdp", check: bool = True) -> subprocess.CompletedProcess[str]:
    lans = [word for lan in LANS for word in ("--lan", lan)]
    return xdpmasq("attach", "--mode", mode, "--wan", "eth0.7", *lans, check=check)


def status() -> dict[str, Any]:
    return dict(json.loads(xdpmasq("status", "--json").stdout))


def client(host: str) -> socket.socket:
    with netns.entered("hosts"):
        found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    found.bind((HOSTS[host], 0))
    found.settimeout(5)
    return found


def ask(one: socket.socket, text: bytes = b"hello") -> None:
    one.sendto(text, (SERVER, PORT))
    assert one.recv(4096) == PUBLIC.encode() + b" " + text


def rides(one: socket.socket, times: int = 20) -> bool:
    """Whether XDP carries it, both ways."""
    ask(one)
    before = status()["counters"]
    for _ in range(times):
        ask(one)
    after = status()["counters"]
    return all(after[name] - before[name] >= times for name in ("fast_outbound", "fast_inbound"))


def soon(told: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not told():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def xdp_on(device: str) -> int:
    with netns.entered("gate"):
        return netdev.link(device).xdp_prog_id


def hooks() -> dict[str, str]:
    return {each["name"]: each["hook"] for each in status()["interfaces"]}


@pytest.mark.usefixtures("attached")
def test_every_vlan_rides_xdp() -> None:
    assert set(hooks().values()) == {"xdp"}
    assert xdp_on("eth0")
    assert xdp_on("eth1")
    for host in HOSTS:
        with client(host) as one:
            soon(lambda one=one: rides(one), host)
            ask(one, bytes(range(200)))


@pytest.mark.usefixtures("attached")
def test_killed_and_adopted() -> None:
    with client("one") as one:
        soon(lambda: rides(one), "it rides")
        os.kill(status()["agent"]["pid"], signal.SIGKILL)
        ask(one)
        attach()
        soon(lambda: rides(one), "it rides again")
        assert status()["sessions"]["total"] == 1


@pytest.mark.usefixtures("attached")
def test_deleted_and_made_anew() -> None:
    with client("one") as one:
        soon(lambda: rides(one), "it rides")
        link = "link add link eth1 name eth1.10 type vlan id 10"
        netns.ip_batch(["link del eth1.10", link, "addr add 10.0.10.1/24 dev eth1.10", "link set eth1.10 up"], "gate")
        soon(lambda: rides(one), "it rides again")


@pytest.mark.usefixtures("attached")
def test_detach_leaves_nothing() -> None:
    xdpmasq("detach")
    assert (xdp_on("eth0"), xdp_on("eth1")) == (0, 0)


@pytest.mark.usefixtures("attached")
def test_a_device_that_begins_to_take_tags_off() -> None:
    """Its VLANs go on on TC, and `status` says why."""
    run("gate", "ethtool", "-K", "eth1", "rxvlan", "on")
    try:
        soon(lambda: {hooks()[lan] for lan in LANS} == {"tc"}, "TC takes over")
        assert xdp_on("eth1") == 0
        assert "takes VLAN tags off" in xdpmasq("status").stdout
        with client("two") as one:
            ask(one)
    finally:
        run("gate", "ethtool", "-K", "eth1", "rxvlan", "off")
    soon(lambda: set(hooks().values()) == {"xdp"}, "XDP is back")


def test_a_device_that_takes_tags_off_is_refused() -> None:
    run("gate", "ethtool", "-K", "eth1", "rxvlan", "on")
    try:
        refused = attach(check=False)
        assert refused.returncode == 1
        assert "ethtool -K eth1 rx-vlan-hw-parse off" in refused.stderr
        doctor = xdpmasq("doctor", "--mode", "xdp", "--wan", "eth0.7", "--lan", "eth1.10", check=False)
        assert "eth1 takes VLAN tags off before XDP sees them" in doctor.stdout
    finally:
        run("gate", "ethtool", "-K", "eth1", "rxvlan", "off")
    assert (xdp_on("eth0"), xdp_on("eth1")) == (0, 0)


def test_somebody_elses_program_stays() -> None:
    passes = bpf.Program(bpf._load(bytes.fromhex("b7000000020000009500000000000000"), bpf.PROG_TYPES["xdp"], "else"))
    with netns.entered("gate"):
        index = netdev.link("eth1").index
        netdev.xdp_attach(index, passes.fd, "native")
    try:
        refused = attach(check=False)
        assert refused.returncode == 1
        assert "someone else's program" in refused.stderr
        assert xdp_on("eth1") == passes.id
    finally:
        with netns.entered("gate"), contextlib.suppress(Exception):
            netdev.xdp_detach(index, "native", passes.fd)
