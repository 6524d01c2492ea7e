"""Forwards carry traffic: from outside, from inside through the public address, and from the gateway itself.

::

    a-box .2 ─┐
    b-box .3 ─┼─ lan0 192.168.0.1 ┐                              ┌─ .10 .11 internet
    c-box .4 ─┘                   ├ masq-gate 203.0.113.1 wan0 ──┤
    d-box .2 ─── lan1 192.168.1.1 ┘                              └─ .254 transit ── 198.51.100.10 far
"""

import itertools
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from netkit import CURL, GATE, MEET, Connection, Gateway, Meeting, meet_tcp, meet_udp, soon, written

from xdpmasq import bpf
from xdpmasq.abi import CLASSES, LIFE_LIVE, LIFE_STATE, PORTS
from xdpmasq.lab import netns
from xdpmasq.lab.servers import WebServer
from xdpmasq.lab.snapshot import differences, snapshot
from xdpmasq.lab.topology import FAR, HOSTS, INTERNET, PUBLIC

A, B, C, D = HOSTS.values()


# --- from outside ----------------------------------------------------------------------------------


def test_curl_from_outside(gateway: Gateway) -> None:
    """nginx inside sees who really asks; the asker speaks with the public endpoint."""
    web = WebServer(gateway.lab, "a-box", A)
    try:
        with gateway.forward("tcp", "8080", f"{A}:80"):
            url, saw = f"http://{PUBLIC}:8080/", "%{remote_ip}:%{remote_port} %{local_ip}:%{local_port}"
            told = gateway.lab.exec("far", [*CURL, "-o/dev/null", f"-w{saw}", f"{url}?far"]).stdout.split()
            assert told[0] == f"{PUBLIC}:8080"
            assert told[1].startswith(f"{FAR}:")
            soon(
                lambda: [each.endpoint for each in web.clients() if each.about == "/?far"] == told[1:], "it is logged"
            )
            bulk = gateway.lab.exec("internet", ["sh", "-c", f"{' '.join(CURL)} {url}big | sha256sum"]).stdout
            assert bulk.split()[0] == web.big_sha256
    finally:
        web.stop()
        web.directory.rename(web.directory.with_name(f"old-{id(web)}"))


both = pytest.mark.parametrize("protocol", ["tcp", "udp"])


@both
@pytest.mark.parametrize("box", ["internet", "far"])
def test_from_outside(gateway: Gateway, protocol: str, box: str) -> None:
    with gateway.forward(protocol, "8080", f"{B}:9090"):
        met = MEET[protocol](gateway, box, (PUBLIC, 8080), "b-box", 9090)
        assert met.seen == f"{INTERNET if box == 'internet' else FAR}:{met.client.rpartition(':')[2]}"
        assert (met.server, met.called) == (f"{B}:9090", f"{PUBLIC}:8080")


@both
@pytest.mark.parametrize(
    ("box", "host"), [("a-box", "b-box"), ("d-box", "b-box"), ("b-box", "d-box"), ("b-box", "b-box")]
)
@pytest.mark.req("4787-9")
@pytest.mark.req("4787-9a")
@pytest.mark.req("5382-8")
def test_from_inside_by_the_public_address(gateway: Gateway, protocol: str, box: str, host: str) -> None:
    """From the same LAN, from another, and a host that calls itself: the peer is the caller's public endpoint."""
    with gateway.forward(protocol, "8080", f"{HOSTS[host]}:9090"):
        met = MEET[protocol](gateway, box, (PUBLIC, 8080), host, 9090)
        assert met.seen.startswith(f"{PUBLIC}:")
        assert met.seen != f"{PUBLIC}:8080"
        assert (met.server, met.called) == (f"{HOSTS[host]}:9090", f"{PUBLIC}:8080")


@both
def test_a_range_keeps_its_distance(gateway: Gateway, protocol: str) -> None:
    with gateway.forward(protocol, "5000-5010", f"{C}:6000"):
        for port in (5000, 5007, 5010):
            met = MEET[protocol](gateway, "internet", (PUBLIC, port), "c-box", port + 1000)
            assert met.called == f"{PUBLIC}:{port}"
            assert met.server == f"{C}:{port + 1000}"
        assert not reaches(gateway, protocol, "internet", 5011, ("c-box", 6011))


@both
def test_only_for_some(gateway: Gateway, protocol: str) -> None:
    with gateway.forward(protocol, "8080", f"{B}:9090", source="198.51.100.0/24"):
        assert MEET[protocol](gateway, "far", (PUBLIC, 8080), "b-box", 9090).seen.startswith(f"{FAR}:")
        assert not reaches(gateway, protocol, "internet", 8080, ("b-box", 9090))
        with gateway.forward(protocol, "8080", f"{C}:9090"):
            assert reaches(gateway, protocol, "internet", 8080, ("c-box", 9090))
            assert reaches(gateway, protocol, "far", 8080, ("b-box", 9090))


def reaches(gateway: Gateway, protocol: str, box: str, port: int, inside: tuple[str, int]) -> bool:
    """Whether a first packet from a box to the public address gets to a host's port."""
    host, inner = inside
    if protocol == "tcp":
        with gateway.listen(host, inner), gateway.lab.socket(box, socket.SOCK_STREAM) as near:
            near.settimeout(0.3)
            return near.connect_ex((PUBLIC, port)) == 0
    with gateway.udp(host, inner, timeout_s=0.3) as far, gateway.udp(box) as near:
        near.sendto(b"?", (PUBLIC, port))
        try:
            return far.recv(10) == b"?"
        except TimeoutError:
            return False


@pytest.fixture
def many(gateway: Gateway) -> Iterator[list[str]]:
    """Addresses of internet, beside its own."""
    addresses = [f"203.0.113.{number}" for number in range(100, 160)]
    netns.ip_batch((f"address add {each}/24 dev eth0" for each in addresses), gateway.lab.namespace("internet"))
    yield addresses
    netns.ip_batch((f"address del {each}/24 dev eth0" for each in addresses), gateway.lab.namespace("internet"))


def test_several_targets_share_by_weight(gateway: Gateway, many: list[str]) -> None:
    """Of 60 remotes each target has its share, and each remote keeps its target, whatever its port."""
    with (
        gateway.forward("udp", "7000", f"{A}:70", f"{B}:70*2"),
        gateway.udp("a-box", 70, timeout_s=0.5) as one,
        gateway.udp("b-box", 70, timeout_s=0.5) as two,
    ):
        chosen: dict[str, set[socket.socket]] = {}
        for remote in many * 2:
            with gateway.udp("internet", address=remote) as client:
                client.sendto(b"?", (PUBLIC, 7000))
                (got,), _, _ = select.select([one, two], [], [], 2)
                assert got.recvfrom(10) == (b"?", client.getsockname())
                chosen.setdefault(remote, set()).add(got)
        assert {len(targets) for targets in chosen.values()} == {1}
        firsts = [targets.pop() for targets in chosen.values()]
        # 20 and 40 expected; the hash is fixed, so this is no matter of luck
        assert 10 <= firsts.count(one) <= 30


@both
def test_default_host(gateway: Gateway, protocol: str) -> None:
    """It has what is left: neither a port with a forward, nor one of the gateway's own services and connections."""
    with gateway.forward(protocol, "default", C), gateway.forward(protocol, "8080", f"{B}:9090"):
        met = MEET[protocol](gateway, "internet", (PUBLIC, 4444), "c-box", 4444)
        assert met.server == f"{C}:4444"
        assert MEET[protocol](gateway, "internet", (PUBLIC, 8080), "b-box", 9090).server == f"{B}:9090"
        for _ in range(2):  # beside the one whose sessions are there
            assert MEET[protocol](gateway, "far", (PUBLIC, 4444), "c-box", 4444).server == f"{C}:4444"
        # from inside, and by itself
        for box in ("a-box", "d-box", "c-box"):
            assert MEET[protocol](gateway, box, (PUBLIC, 4445), "c-box", 4445).server == f"{C}:4445"
        assert meet_own(gateway, protocol, "internet")
        assert meet_own(gateway, protocol, "a-box")
        assert gateway.opens("a-box")
        assert gateway.opens(GATE)
        gateway.gate(*CURL, "-o/dev/null", f"http://{INTERNET}/")


def meet_own(gateway: Gateway, protocol: str, box: str) -> Meeting:
    """With a service of the gateway at its public address."""
    met = MEET[protocol](gateway, box, (PUBLIC, 2222), GATE, 2222)
    assert met.seen.startswith(f"{HOSTS.get(box, INTERNET)}:")
    return met


def test_ports_of_the_default_host_are_given_back(gateway: Gateway) -> None:
    """Also those outside the pool, where nobody else looks: services below 1024, the gateway's ephemeral ports."""
    tables = gateway.tables
    with gateway.forward("udp", "default", C):
        for port in (443, 40_000):
            assert MEET["udp"](gateway, "internet", (PUBLIC, port), "c-box", port).server == f"{C}:{port}"
        slots = [CLASSES.index("udp") * PORTS + port for port in (443, 40_000)]
        long_ago = (bpf.jiffies() - 10 * int(tables.settings["udp"])) % 2**32
        for direction in ("out", "in"):
            tables.sessions[direction]["last_seen"][slots] = long_ago
        soon(lambda: LIFE_LIVE not in tables.sessions["life"][slots] & LIFE_STATE, "they have ended")
        tables.sessions["out"]["last_seen"][slots] = long_ago
        soon(lambda: not tables.sessions["life"][slots].any(), "they have rested")


# --- its life --------------------------------------------------------------------------------------


def joined(gateway: Gateway, box: str, port: int, inside: tuple[str, int]) -> Connection:
    """A connection through a forward, both ends; ``public`` is how the host inside calls the other."""
    with gateway.listen(*inside) as listener:
        near = gateway.tcp(box, (PUBLIC, port))
        far, peer = listener.accept()
    far.settimeout(5)
    return Connection(near, far, written(peer))


def test_deleted_but_what_runs_goes_on(gateway: Gateway) -> None:
    with (
        gateway.forward("tcp", "8080", f"{B}:9090"),
        joined(gateway, "internet", 8080, ("b-box", 9090)) as outside,
        joined(gateway, "d-box", 8080, ("b-box", 9090)) as inside,
    ):
        gateway.masq("forward", "del", "tcp", "8080")
        for box in ("internet", "d-box"):  # hosts of its own LAN reach it anyway, as long as it is mapped
            assert not reaches(gateway, "tcp", box, 8080, ("b-box", 9090))
        outside.talk(3)
        inside.talk(3)


def test_killed_with_all_that_runs(gateway: Gateway) -> None:
    with (
        gateway.forward("tcp", "8080", f"{B}:9090"),
        gateway.forward("tcp", "8081", f"{B}:9091"),
        joined(gateway, "internet", 8080, ("b-box", 9090)) as ended,
        joined(gateway, "internet", 8081, ("b-box", 9091)) as other,
    ):
        told = gateway.masq("forward", "del", "tcp", "8080", "--kill").stdout
        assert told.endswith("; 1 session ended\n")
        with pytest.raises(OSError, match=r"timed out|reset"):
            ended.talk()
        other.talk(3)


@pytest.mark.req("reliability-agent_killed")
def test_with_the_agent_killed(gateway: Gateway) -> None:
    """What is there goes on, and can be changed; the next agent takes it over as it is."""
    with (
        gateway.forward("tcp", "8080", f"{B}:9090"),
        gateway.forward("udp", "8080", f"{B}:9090"),
        joined(gateway, "internet", 8080, ("b-box", 9090)) as outside,
        joined(gateway, "a-box", 8080, ("b-box", 9090)) as inside,
    ):
        gateway.kill_agent()
        try:
            for protocol, box in itertools.product(MEET, ("internet", "a-box")):
                MEET[protocol](gateway, box, (PUBLIC, 8080), "b-box", 9090)
            gateway.masq("forward", "add", "udp", "8081", f"{C}:9091")
            for box in ("internet", "a-box"):
                assert reaches(gateway, "udp", box, 8081, ("c-box", 9091))
        finally:
            gateway.attach()
        assert reaches(gateway, "udp", "far", 8081, ("c-box", 9091))
        gateway.masq("forward", "del", "udp", "8081")
        assert not reaches(gateway, "udp", "d-box", 8081, ("c-box", 9091))
        for protocol, box in itertools.product(MEET, ("internet", "d-box")):
            MEET[protocol](gateway, box, (PUBLIC, 8080), "b-box", 9090)
        outside.talk(3)
        inside.talk(3)


# --- from the gateway itself -----------------------------------------------------------------------


@pytest.fixture(params=[0, 1, 2], ids="rp_filter {}".format)
def rp_filter(gateway: Gateway, request: pytest.FixtureRequest) -> Iterator[int]:
    """On lo, and for all: the kernel takes the greater of both."""
    names = [f"net.ipv4.conf.{name}.rp_filter" for name in ("all", "lo", "wan0", "lan0", "lan1")]
    before = [gateway.sysctl(name) for name in names]
    for name in names:
        gateway.sysctl(name, request.param)
    yield request.param
    for name, value in zip(names, before, strict=True):
        gateway.sysctl(name, value)


def test_the_command_is_done_when_the_gateway_has_a_way_to_it(gateway: Gateway) -> None:
    soon(lambda: gateway.on("lo") == set(), "nothing of an earlier forward is left on lo")
    try:
        gateway.masq("forward", "add", "tcp", "8080", f"{B}:9090")
        assert meet_tcp(gateway, GATE, (PUBLIC, 8080), "b-box", 9090).called == f"{PUBLIC}:8080"
    finally:
        gateway.masq("forward", "del", "tcp", "8080", "--kill")


@pytest.mark.usefixtures("rp_filter")
@both
def test_the_gateway_asks_for_its_own_forward(gateway: Gateway, protocol: str) -> None:
    with gateway.forward(protocol, "8080", f"{B}:9090"):
        gateway.way_through_lo()
        for _ in range(3):
            met = MEET[protocol](gateway, GATE, (PUBLIC, 8080), "b-box", 9090)
            assert met.called == f"{PUBLIC}:8080"
            assert met.seen == met.client
            assert met.seen.startswith(f"{PUBLIC}:")
        for box in ("a-box", "d-box", "b-box"):
            assert MEET[protocol](gateway, box, (PUBLIC, 8080), "b-box", 9090).seen.startswith(f"{PUBLIC}:")
        assert MEET[protocol](gateway, "internet", (PUBLIC, 8080), "b-box", 9090).seen.startswith(f"{INTERNET}:")


# --- a lab of its own ------------------------------------------------------------------------------

CONFIG = """
[interfaces]
wan = "wan0"
lan = ["lan0", "lan1"]
mode = "tc"
[[forward]]
protocol = "tcp"
ports = 8080
to = "192.168.0.3:9090"
[[forward]]
protocol = "udp"
ports = "5000-5010"
to = "192.168.0.3:6000"
"""
NEW_PUBLIC = "203.0.113.77"


@pytest.mark.req("reliability-address")
@pytest.mark.req("reliability-detach")
def test_of_the_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On clsact, as where the kernel has no TCX, also when the WAN's address changes; and no trace of it stays."""
    monkeypatch.setenv("XDPMASQ_TC", "clsact")
    (tmp_path / "masq.toml").write_text(CONFIG)
    with Gateway.in_new_lab("tc", attach=False, lans=2) as gateway:
        before = snapshot(gateway.lab)
        gateway.masq("attach", "--config", str(tmp_path / "masq.toml"))
        everywhere(gateway, PUBLIC)
        gateway.readdress(f"{NEW_PUBLIC}/24")
        soon(lambda: gateway.tables.manifest["external"] == NEW_PUBLIC, "the address is followed")
        everywhere(gateway, NEW_PUBLIC)
        gateway.readdress(f"{PUBLIC}/24")
        soon(lambda: gateway.tables.manifest["external"] == PUBLIC, "the address is followed")
        gateway.detach()
        assert differences(before, snapshot(gateway.lab)) == []


def everywhere(gateway: Gateway, public: str) -> None:
    """From outside, from both LANs, from the host itself and from the gateway."""
    gateway.way_through_lo()
    assert gateway.hooks() == dict.fromkeys(("wan0", "lan0", "lan1", "lo"), "tc")
    for box in ("internet", "a-box", "d-box", "b-box", GATE):
        meet_tcp(gateway, box, (public, 8080), "b-box", 9090)
        met = meet_udp(gateway, box, (public, 5003), "b-box", 6003)
        assert met.called == f"{public}:5003"
        assert met.seen.startswith(f"{INTERNET if box == 'internet' else public}:")
