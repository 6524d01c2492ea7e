"""What cannot work is refused in one clear line, and nothing is attached, not even half.

The standard lab with two LANs: ``a-box ─ lan0 masq-gate wan0 ─ internet`` and ``d-box ─ lan1 masq-gate``.
"""

import contextlib
from collections.abc import Iterator

import pytest
from netkit import GATE, Gateway, needs_root, strangers_program

from xdpmasq import tcx
from xdpmasq.lab import netns
from xdpmasq.lab.snapshot import differences, snapshot
from xdpmasq.net import clsact, netdev, xdp

pytestmark = pytest.mark.xdist_group("refusals")
XDP_PASS = 2


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Gateway.in_new_lab("xdp", attach=False, lans=2) as built:
        yield built


def refuse(gateway: Gateway, *options: str, code: int = 1) -> str:
    """Its words; by the way checks that nothing has changed."""
    before = snapshot(gateway.lab)
    done = gateway.masq("attach", *options, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert differences(before, snapshot(gateway.lab)) == []
    assert not gateway.is_attached
    assert "Traceback" not in done.stderr
    assert "→" in done.stderr  # what to do
    return done.stderr


@contextlib.contextmanager
def changed(gateway: Gateway, do: str, undo: str) -> Iterator[None]:
    netns.ip_batch(do.splitlines(), gateway.lab.namespace(GATE))
    try:
        yield
    finally:
        netns.ip_batch(undo.splitlines(), gateway.lab.namespace(GATE))


@pytest.mark.req("attacks-config")
@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--wan", "wan9", "--lan", "lan0"], 1, "no interface wan9: here are: "),
        (["--wan", "wan0", "--lan", "lan0", "--lan", "lan9"], 1, "no interface lan9: here are: "),
        (["--wan", "wan0", "--lan", "wan0"], 2, "one-armed"),
        (["--wan", "wan0", "--lan", "*"], 2, "one-armed"),
        (["--wan", "wan0", "--lan", "lo"], 1, "lo is no network"),
        (["--wan", "wan0"], 2, "no LAN interface named"),
        (["--lan", "lan0"], 2, "no WAN interface named"),
        (["--wan", "wan0", "--lan", "lan0", "--mode", "fast"], 2, "there is no mode fast"),
    ],
    ids=["unknown WAN", "unknown LAN", "one-armed", "one-armed by wildcard", "loopback", "no LAN", "no WAN", "mode"],
)
def test_what_cannot_be_meant(gateway: Gateway, options: list[str], code: int, words: str) -> None:
    assert words in refuse(gateway, *options, code=code)


def test_no_address_on_the_wan(gateway: Gateway) -> None:
    with changed(
        gateway,
        "address flush dev wan0",
        "address add 203.0.113.1/24 dev wan0\nroute add default via 203.0.113.254",
    ):
        assert "wan0 has no IPv4 address" in refuse(gateway, "--wan", "wan0", "--lan", "lan0")


@pytest.mark.req("4787-7")
@pytest.mark.parametrize("address", ["192.168.0.77/16", "192.168.0.129/25", "192.168.0.5/32"])
def test_a_lease_that_overlaps_the_lan(gateway: Gateway, address: str) -> None:
    with changed(gateway, f"address add {address} dev wan0", f"address del {address} dev wan0"):
        told = refuse(gateway, "--wan", "wan0", "--lan", "lan0")
    assert "lan0 and wan0 overlap" in told
    assert "RFC 4787 REQ-7" in told


@pytest.mark.parametrize("interface", ["wan0", "lan0", "lan1"])
def test_somebody_elses_program_on_the_xdp_hook(gateway: Gateway, interface: str) -> None:
    with gateway.inside(), strangers_program("xdp", XDP_PASS) as program:
        index = netdev.link(interface).index
        xdp.attach(index, program.fd, "native")
        stranger = program.id
    try:
        told = refuse(gateway, "--wan", "wan0", "--lan", "lan*", "--mode", "xdp")
        assert f"cannot attach XDP to {interface}: someone else's program is on its XDP hook" in told
        with gateway.inside():
            assert netdev.link(interface).xdp_prog_id == stranger
    finally:
        gateway.gate("ip", "link", "set", interface, "xdpdrv", "off")


def test_a_filter_in_our_place(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDPMASQ_TC", "clsact")
    gateway.gate("tc", "qdisc", "add", "dev", "wan0", "clsact")
    with gateway.inside(), strangers_program("tc", 0) as program:
        clsact.attach(netdev.link("wan0").index, "ingress", program.fd, "firewall", 0x4D51)
    try:
        assert "someone else's filter 'firewall'" in refuse(gateway, "--wan", "wan0", "--lan", "lan0")
    finally:
        gateway.gate("tc", "qdisc", "del", "dev", "wan0", "clsact")


@needs_root
def test_no_room_on_tcx(gateway: Gateway) -> None:
    programs = [strangers_program("tc", -1) for _ in range(63)]  # BPF_MPROG_MAX, of which the kernel keeps one
    with gateway.inside():
        index = netdev.link("wan0").index
    try:
        with gateway.inside():
            for program in programs:
                tcx.attach(index, "ingress", program)
        told = refuse(gateway, "--wan", "wan0", "--lan", "lan0")
        assert "cannot attach masq_wan_in to TCX ingress of wan0: no more programs fit there" in told
    finally:
        with gateway.inside():
            for program in programs:
                tcx.detach(index, "ingress", program)


@pytest.mark.req("attacks-exposed")
def test_not_root(gateway: Gateway) -> None:
    for words in (["attach", "--wan", "wan0", "--lan", "lan0"], ["detach"], ["status"], ["sessions"]):
        nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        done = gateway.lab.exec(GATE, [*nobody, gateway.python, "-m", "xdpmasq", *words], check=False)
        assert done.returncode == 1
        assert "must be run as root" in done.stderr


def test_nothing_attached(gateway: Gateway) -> None:
    for verb in (["detach"], ["status"], ["sessions"], ["sessions", "flush", "--all"]):
        done = gateway.masq(*verb, check=False)
        assert done.returncode == 1
        assert "xdpmasq is not attached" in done.stderr


def test_an_interface_that_another_xdpmasq_uses(gateway: Gateway) -> None:
    """Two gateways in one namespace are fine, as long as they share nothing."""
    with changed(gateway, "address add 198.18.0.1/24 dev lan1", "address del 198.18.0.1/24 dev lan1"):
        gateway.attach(lans=["lan0"])
        try:
            done = gateway.masq("attach", "--wan", "lan1", "--lan", "lan0", "--mode", "tc", check=False)
            assert done.returncode == 1
            assert "lan0 is in use: by the xdpmasq of WAN wan0" in done.stderr
            assert gateway.lab.exec("a-box", ["ping", "-c1", "-W1", "203.0.113.10"])
        finally:
            gateway.detach()
