"""TCP segments are clamped to what fits the WAN (RFC 6691), for uplinks where path-MTU discovery fails.

The standard lab; its WAN is narrowed to 1400 bytes: ``a-box ─ lan0 masq-gate wan0 ═ 1400 bytes ═ internet``.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from netkit import Gateway, read, rules, soon

from xdpmasq.lab.topology import HOSTS, INTERNET, PUBLIC

pytestmark = pytest.mark.xdist_group("mss")
MTU = 1400
CONFIG = '[interfaces]\nwan = "wan0"\nlan = ["lan0"]\nmode = "tc"\n[tcp]\nmss = {}\n'


@pytest.fixture(scope="module")
def lab_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """With ``mss = "auto"``."""
    path = tmp_path_factory.mktemp("mss") / "masq.toml"
    path.write_text(CONFIG.format('"auto"'))
    with Gateway.in_new_lab("tc", attach=False) as gateway:
        gateway.masq("attach", "--config", str(path))
        gateway.gate("ip", "link", "set", "wan0", "mtu", str(MTU))
        soon(lambda: clamp(gateway) == MTU - 40, "the agent has followed the MTU")
        with gateway.forward("tcp", "8080", f"{HOSTS['a-box']}:8080"):
            gateway.kill_agent()  # or it would put right what the tests change
            yield gateway


def clamp(gateway: Gateway) -> int:
    with gateway.inside():
        return int(gateway.tables.maps["interfaces"].get(socket.if_nametoindex("wan0"))["mss"])


@contextlib.contextmanager
def clamped_to(gateway: Gateway, mss: int) -> Iterator[None]:
    """The programs are told another number; 0: none."""
    table = gateway.tables.maps["interfaces"]
    with gateway.inside():
        index = socket.if_nametoindex("wan0")
    before = table.get(index)
    changed = before.copy()
    changed["mss"] = mss
    table.set(index, changed)
    try:
        yield
    finally:
        table.set(index, before)


def options_of(frame: bytes) -> int:
    """The MSS of a SYN, from Ethernet on; options in any order."""
    tcp = frame[14 + (frame[14] & 15) * 4 :]
    options = tcp[20 : (tcp[12] >> 4) * 4]
    while options:
        if options[0] == 2:
            return int.from_bytes(options[2:4], "big")
        options = options[1:] if options[0] == 1 else options[options[1] :]
    return 0


def told(gateway: Gateway, *, inward: bool) -> tuple[int, int]:
    """The MSS in SYN and SYN-ACK as the other side gets them, of a connection from inside or through a forward."""
    syns = "tcp[tcpflags] & tcp-syn != 0"
    role, host = ("internet", "a-box") if inward else ("a-box", "internet")
    with (
        gateway.lab.capture(host, "eth0", f"{syns} and tcp[tcpflags] & tcp-ack == 0") as syn,
        gateway.lab.capture(role, "eth0", f"{syns} and tcp[tcpflags] & tcp-ack != 0") as syn_ack,
        gateway.listen(host, 8080),
        gateway.tcp(role, (PUBLIC if inward else INTERNET, 8080)),
    ):
        (first,), (second,) = syn.stop(), syn_ack.stop()
        return options_of(first), options_of(second)


inward = pytest.mark.parametrize("inward", [False, True], ids=["outbound", "inbound"])


@inward
def test_to_what_fits_the_wan(lab_gateway: Gateway, inward: bool) -> None:
    assert told(lab_gateway, inward=inward) == (MTU - 40, MTU - 40)


@inward
def test_to_a_number(lab_gateway: Gateway, inward: bool) -> None:
    with clamped_to(lab_gateway, 1200):
        assert told(lab_gateway, inward=inward) == (1200, 1200)


@inward
def test_never_upwards(lab_gateway: Gateway, inward: bool) -> None:
    with clamped_to(lab_gateway, 9000):
        assert told(lab_gateway, inward=inward) == (1460, 1460)


@inward
def test_off(lab_gateway: Gateway, inward: bool) -> None:
    with clamped_to(lab_gateway, 0):
        assert told(lab_gateway, inward=inward) == (1460, 1460)


def test_bulk_without_icmp(lab_gateway: Gateway) -> None:
    """Nobody gets an ICMP message; without the clamp full segments vanish at the WAN."""
    with rules(lab_gateway, NO_ICMP):
        assert sends(lab_gateway, "a-box", 500_000)
        with clamped_to(lab_gateway, 0):
            assert not sends(lab_gateway, "b-box", 500_000)


NO_ICMP = "chain out { type filter hook output priority filter;\nmeta l4proto icmp drop\n}"


def sends(gateway: Gateway, box: str, size: int) -> bool:
    """Whether a box gets that many bytes to internet, in time."""
    with gateway.listen("internet", address=INTERNET) as listener:
        near = gateway.tcp(box, listener.getsockname())
        far, _ = listener.accept()
    with near, far, ThreadPoolExecutor(1) as pool:
        far.settimeout(1)
        text = os.urandom(size)
        sending = pool.submit(near.sendall, text)
        try:
            came = read(far, size)
        except TimeoutError:
            near.shutdown(socket.SHUT_RDWR)
            return False
        sending.result(timeout=5)
        return came == text
