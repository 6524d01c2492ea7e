"""What a trace tells of each packet of a host: how it came to a hook, how it left, and why; of others nothing."""

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from typing import Any

import pytest
from harness import (
    ACK,
    FIN,
    GATEWAY,
    HOST,
    OTHER_HOST,
    OTHER_SERVER,
    ROUTER,
    SERVER,
    SYN,
    TICKS,
    Gateway,
    echo,
    echo_reply,
    tcp,
    udp,
    wan_frame,
)
from scapy.layers.inet import ICMP, IP, UDP

from xdpmasq import algs, bpf
from xdpmasq.alg import switches
from xdpmasq.errors import BusyError, DatapathError
from xdpmasq.events import HERE_S
from xdpmasq.selection import Endpoint
from xdpmasq.tables import Tables
from xdpmasq.tracing import Interest, Sight, Tracer, conclusion

Said = tuple[str, str, str]  # hook, verdict, first reason


class Attached(Tables):
    """What stands for ``datapath.Attached``, which has a manifest."""

    hz = TICKS

    def now(self) -> int:
        return bpf.jiffies()


def attached(gateway: Gateway) -> Any:
    made = Attached(gateway.tables.maps)
    made.counter_names = gateway.bench.counter_names
    return made


def said(sights: list[Sight]) -> list[Said]:
    return [(each.hook, each.verdict, each.why[0][0]) for each in sights]


@pytest.fixture
def tracer(gateway: Gateway) -> Iterator[Tracer]:
    made = Tracer(attached(gateway), IPv4Address(HOST))
    yield made
    made.close()


def test_to_and_fro(gateway: Gateway, tracer: Tracer) -> None:
    packet = udp(HOST, 5000, SERVER, 53)
    gateway.lan_in(packet)
    port = gateway.open(packet)
    gateway.inbound(udp(SERVER, 53, GATEWAY, port, ttl=60))
    gateway.tables.set_settings(accelerate=1)
    gateway.learn(udp(SERVER, 53, HOST, 5000))
    sights = tracer.read()
    assert said(sights) == [
        ("lan-in", "passed", ""),
        ("wan-out", "passed", "slow_outbound"),
        ("wan-in", "passed", "slow_inbound"),
        ("lan-out", "passed", ""),
    ]
    assert set(sights[1].reasons) == {"slow_outbound", "session_opened", "mapping_opened"}
    assert str(sights[1].before) == f"{HOST}:5000 > {SERVER}:53"
    assert str(sights[1].after) == f"{GATEWAY}:{port} > {SERVER}:53"
    assert str(sights[2].before) == f"{SERVER}:53 > {GATEWAY}:{port}"
    assert str(sights[2].after) == f"{SERVER}:53 > {HOST}:5000"
    assert (sights[2].before.length, sights[2].before.ttl) == (28 + 13, 60)
    for each in sights:
        assert (each.internal, each.remote) == ((IPv4Address(HOST), 5000), (IPv4Address(SERVER), 53))
    assert [each.interface for each in sights] == ["lan0", "wan0", "wan0", "lan0"]
    assert tracer.read() == []


def test_lines_and_json(gateway: Gateway, tracer: Tracer) -> None:
    port = gateway.open(tcp(HOST, 5000, SERVER, 80, SYN))
    (sight,) = tracer.read()
    first, second, *rest = sight.lines()
    assert first[13:] == f"wan0 out    passed     tcp {HOST}:5000 > {SERVER}:80 S"
    assert second.split() == ["as", "tcp", f"{GATEWAY}:{port}", ">", f"{SERVER}:80", "S"]
    assert [line.split(":")[0].strip() for line in rest] == ["slow_outbound", "session_opened", "mapping_opened"]
    fields = json.loads(sight.json())
    del fields["time"]
    assert fields.pop("reasons")[0] == {"name": "slow_outbound", "help": "LAN to WAN packets translated by TC"}
    ends = {"destination": {"address": SERVER, "port": 80}, "length": 40, "ttl": 64}
    assert fields == {
        **{"interface": "wan0", "hook": "wan-out", "verdict": "passed", "protocol": "tcp", "about": "S"},
        "before": {"source": {"address": HOST, "port": 5000}, **ends},
        "after": {"source": {"address": GATEWAY, "port": port}, **ends},
    }


def test_an_error_is_a_matter_of_what_it_quotes(gateway: Gateway, tracer: Tracer) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    quoted = IP(src=GATEWAY, dst=SERVER, ttl=60) / UDP(sport=port, dport=53, len=21, chksum=0)
    gateway.inbound(IP(src=ROUTER, dst=GATEWAY) / ICMP(type=3, code=3) / quoted)
    _, sight = tracer.read()
    assert sight.reasons == ("slow_icmp_error_inbound",)
    assert (sight.internal, sight.remote) == ((IPv4Address(HOST), 5000), (IPv4Address(SERVER), 53))
    assert sight in Interest("udp", 5000, Endpoint.parse(":53"))
    assert sight in Interest("icmp")
    assert sight not in Interest("tcp")
    first, second, _ = sight.lines()
    assert first.endswith(f"icmp {ROUTER} > {GATEWAY} port unreachable about udp {GATEWAY}:{port} > {SERVER}:53")
    assert second.endswith(f"icmp {ROUTER} > {HOST} port unreachable about udp {HOST}:5000 > {SERVER}:53")
    assert json.loads(sight.json())["after"]["quoted"]["source"] == {"address": HOST, "port": 5000}


def _refused(gateway: Gateway) -> None:
    gateway.tables.set_settings(host_sessions=0)
    gateway.outbound(udp(HOST, 5000, SERVER, 53))
    gateway.attend()
    gateway.outbound(udp(HOST, 5000, SERVER, 53))


def _no_session(gateway: Gateway) -> None:
    gateway.outbound(tcp(HOST, 5000, SERVER, 80, FIN | ACK))


def _strangers(gateway: Gateway) -> None:
    """One to a port of the host's, one to nobody's, one to another's."""
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    other = gateway.open(udp(OTHER_HOST, 5000, SERVER, 53))
    gateway.inbound(udp(OTHER_SERVER, 53, GATEWAY, port))
    gateway.inbound(udp(OTHER_SERVER, 53, GATEWAY, 1025))
    gateway.inbound(udp(OTHER_SERVER, 53, GATEWAY, other))


def _not_from_there(gateway: Gateway) -> None:
    gateway.forward("tcp", 8080, (HOST, 80), source="198.51.100.0/24")
    gateway.inbound(tcp("192.0.2.9", 1000, GATEWAY, 8080, SYN))
    gateway.inbound(tcp(OTHER_SERVER, 1000, GATEWAY, 8080, SYN))


def _internal(gateway: Gateway) -> None:
    gateway.inbound(udp(SERVER, 53, HOST, 5000))


def _hairpin(gateway: Gateway) -> None:
    gateway.forward("udp", 8080, (OTHER_HOST, 80))
    gateway.hairpin(udp(HOST, 5000, GATEWAY, 8080))


def _ping(gateway: Gateway) -> None:
    number = gateway.open(echo(HOST, SERVER, 7))
    gateway.inbound(echo_reply(SERVER, GATEWAY, number))


def _others(gateway: Gateway) -> None:
    port = gateway.open(udp(OTHER_HOST, 5000, SERVER, 53))
    gateway.lan_in(udp(OTHER_HOST, 5000, SERVER, 53))
    gateway.inbound(udp(SERVER, 53, GATEWAY, port))


OUT = ("wan-out", "passed", "slow_outbound")


@pytest.mark.parametrize(
    ("walk", "told"),
    [
        pytest.param(
            _refused, [("wan-out", each, "drop_host_limit") for each in ("dropped", "refused")], id="refused"
        ),
        pytest.param(_no_session, [("wan-out", "dropped", "drop_tcp_no_session")], id="FIN of no session"),
        pytest.param(_strangers, [OUT, ("wan-in", "dropped", "drop_filtered")], id="strangers"),
        pytest.param(
            _not_from_there,
            [("wan-in", "dropped", "drop_filtered"), ("wan-in", "passed", "slow_inbound")],
            id="not from there",
        ),
        pytest.param(_internal, [("wan-in", "dropped", "drop_destination_internal")], id="forged"),
        pytest.param(
            _hairpin, [("lan-in", "redirected", ""), ("wan-out", "redirected", "session_opened")], id="hairpin"
        ),
        pytest.param(_ping, [OUT, ("wan-in", "passed", "slow_inbound")], id="ping"),
        pytest.param(_others, [], id="others"),
    ],
)
def test_what_is_told(gateway: Gateway, tracer: Tracer, walk: Callable[[Gateway], None], told: list[Said]) -> None:
    walk(gateway)
    assert said(tracer.read()) == told


def test_what_goes_to_the_agent_is_told_as_it_is(gateway: Gateway, tracer: Tracer) -> None:
    """Behind the punt port's header."""
    gateway.attend()
    switches.put(gateway.tables, algs.Use.parse("tftp"))
    context = (bytes(36) + struct.pack("<II", gateway.lan, gateway.wan)).ljust(192, b"\0")
    gateway.bench.programs["masq_wan_out"].test_run(wan_frame(udp(HOST, 5000, SERVER, 69)), context=context)
    gateway.counted()
    switches.take(gateway.tables, "tftp")
    (sight,) = tracer.read()
    assert "punt_alg" in sight.reasons
    assert str(sight.after) == str(sight.before) == f"{HOST}:5000 > {SERVER}:69"


def test_nothing_is_written_when_nobody_traces(gateway: Gateway) -> None:
    word = gateway.tables.maps["tracing"].view()
    word["internal"]["word"] = int.from_bytes(IPv4Address(HOST).packed, "little")
    for until in (0, bpf.jiffies() - 1, (bpf.jiffies() + 20_000) % 2**32, (bpf.jiffies() + 2**31) % 2**32):
        word["until"] = until
        before = int(word["next"][0])
        gateway.open(udp(HOST, 5000, SERVER, 53))
        assert int(word["next"][0]) == before
    word["until"] = 0


def test_it_lapses_by_itself_and_there_is_one_at_a_time(gateway: Gateway, tracer: Tracer) -> None:
    with pytest.raises(BusyError, match=f"another trace is running: of {HOST}"):
        Tracer(attached(gateway), IPv4Address(OTHER_HOST))
    word = gateway.tables.maps["tracing"].view()
    assert 0 < (int(word["until"][0]) - bpf.jiffies()) % 2**32 <= HERE_S * TICKS
    word["until"] = bpf.jiffies() - 1  # it was killed, and the time is over
    gateway.open(udp(HOST, 5000, SERVER, 53))
    assert tracer.read() == []
    word["until"] = bpf.jiffies() - 1
    other = Tracer(attached(gateway), IPv4Address(OTHER_HOST))
    gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.open(udp(OTHER_HOST, 5000, SERVER, 53))
    assert said(other.read()) == [OUT]
    other.close()


def test_the_host_is_kept_off_xdp_meanwhile(gateway: Gateway) -> None:
    """And nobody else; afterwards it flies again."""
    gateway.accelerate()
    ports = {}
    for host in (HOST, OTHER_HOST):
        ports[host] = gateway.open(udp(host, 5000, SERVER, 53))
        gateway.inbound(udp(SERVER, 53, GATEWAY, ports[host]))
        gateway.learn(udp(SERVER, 53, host, 5000))

    def fly(host: str) -> list[str]:
        """A packet to and fro by XDP, and on by TC what is passed up."""
        ended = [
            gateway.fast_outbound(udp(host, 5000, SERVER, 53)).ended,
            gateway.fast_inbound(udp(SERVER, 53, GATEWAY, ports[host])).ended,
        ]
        gateway.open(udp(host, 5000, SERVER, 53))
        gateway.inbound(udp(SERVER, 53, GATEWAY, ports[host]))
        gateway.learn(udp(SERVER, 53, host, 5000))
        return ended

    flying, walking = ["fast_outbound", "fast_inbound"], ["up_not_armed"] * 2
    assert fly(HOST) == fly(OTHER_HOST) == flying
    tracer = Tracer(attached(gateway), IPv4Address(HOST))
    assert [fly(HOST) for _ in range(3)] == [walking] * 3
    assert fly(OTHER_HOST) == flying
    assert len(tracer.read()) == 9
    tracer.close()
    assert [fly(HOST) for _ in range(2)] == [walking, flying]


def test_more_than_the_ring_holds(gateway: Gateway, tracer: Tracer) -> None:
    gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.tables.maps["tracing"].view()["next"] += 5000
    for _ in range(2):
        gateway.open(udp(HOST, 5000, SERVER, 53))
    assert len(tracer.read()) == 2
    assert tracer.lost == 5001


def test_a_port_that_is_nobodys(gateway: Gateway) -> None:
    """Whoever asks for the port learns that nothing leads from it to the host."""
    tracer = Tracer(attached(gateway), IPv4Address(HOST), 3074)
    gateway.inbound(udp(OTHER_SERVER, 53, GATEWAY, 3074))
    gateway.inbound(udp(OTHER_SERVER, 53, GATEWAY, 3075))
    assert said(tracer.read()) == [("wan-in", "passed", "own_inbound")]
    tracer.close()


@pytest.mark.parametrize(
    ("interest", "count"),
    [
        pytest.param(Interest(), 4, id="all"),
        pytest.param(Interest(protocol="udp"), 3, id="protocol"),
        pytest.param(Interest(port=5000), 3, id="port"),
        pytest.param(Interest(remote=Endpoint.parse("198.51.100.0/24")), 1, id="remote"),
        pytest.param(Interest("udp", 5000, Endpoint.parse(":53")), 2, id="together"),
        pytest.param(Interest(remote=Endpoint.parse(f"{SERVER}:54")), 0, id="another port there"),
    ],
)
def test_interest(gateway: Gateway, tracer: Tracer, interest: Interest, count: int) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.inbound(udp(SERVER, 53, GATEWAY, port))
    gateway.open(udp(HOST, 5001, OTHER_SERVER, 53))
    gateway.open(tcp(HOST, 5000, SERVER, 80, SYN))
    assert len([sight for sight in tracer.read() if sight in interest]) == count


def test_a_datapath_without_traces() -> None:
    with pytest.raises(DatapathError, match="nothing can be traced"):
        Tracer(Attached({}), IPv4Address(HOST))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        pytest.param({}, "came by", id="nothing"),
        pytest.param({("lan-in", "passed"): 3}, "never got to the WAN", id="the firewall's"),
        pytest.param({("lan-in", "passed"): 3, ("wan-out", "passed"): 3}, "not answered", id="no answer"),
        pytest.param({("wan-out", "passed"): 3, ("wan-in", "passed"): 1}, "", id="fine"),
        pytest.param({("wan-out", "dropped"): 3}, "", id="dropped, which was said"),
    ],
)
def test_conclusion(seen: dict[tuple[str, str], int], words: str) -> None:
    found = conclusion(Counter(seen), IPv4Address(HOST))
    assert words in found if words else not found


def test_conclusion_about_others() -> None:
    """The host is there; it was asked for something else."""
    found = conclusion(Counter(), IPv4Address(HOST), others=1200)
    assert found.startswith(f"1,200 of {HOST} came by that do not fit")
