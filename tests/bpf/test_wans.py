"""Two WANs: mappings of each, and what must leave by another than the one that the kernel has chosen.

::

    192.168.0.0/24 ── lan0 [ 192.168.0.1 | 203.0.113.1 ] wan0 ── 203.0.113.10 ── everywhere
                                         [   192.0.2.1 ] far0 ── 192.0.2.254 ── everywhere, at a higher metric
"""

from collections.abc import Iterator
from ipaddress import IPv4Network

import pytest
from harness import (
    ACK,
    GATEWAY,
    HOST,
    NETWORK,
    NEXT_HOP_MAC,
    OTHER_HOST,
    OTHER_SERVER,
    ROUTER,
    SERVER,
    SYN,
    WAN_MAC,
    Bench,
    Gateway,
    Result,
    age,
    namespace_of,
    next_tick,
    rebuilt,
    tcp,
    udp,
    wire,
)
from scapy.layers.inet import ICMP, IP
from scapy.packet import Packet, Raw

from xdpmasq import bpf
from xdpmasq.lab import netns
from xdpmasq.net import netdev

pytestmark = pytest.mark.xdist_group("two WANs")  # what they need is compiled once, while the others go on

GATEWAY_TOO = "192.0.2.1"
FAR_MAC = "02:00:00:00:02:01"
PROVIDER = "192.0.2.254"
SECOND = (
    f"link add far0 address {FAR_MAC} type veth peer name far1",
    "link set far1 arp off",
    *(f"link set {name} up" for name in ("far0", "far1")),
    f"addr add {GATEWAY_TOO}/24 dev far0",
    f"neigh add {PROVIDER} lladdr {NEXT_HOP_MAC} dev far0 nud permanent",
    f"route add default via {PROVIDER} dev far0 metric 200",
)


class TwoWans(Gateway):
    """A gateway with a second WAN."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        self.links = (bench.wan, netdev.link("far0"))
        self.tables.set_interface(self.links[1], "wan", xdp_from=True, xdp_to=True, wan=1)
        self.tables.set_settings(exit=[link.index for link in self.links])

    def out(self, wan: int, packet: Packet, **context: int) -> Result:
        """At the egress of a WAN."""
        return self.outbound(packet, ifindex=self.links[wan].index, **context)

    def into(self, wan: int, packet: Packet) -> Result:
        """At the ingress of a WAN."""
        index = self.links[wan].index
        return self.inbound(packet, ingress_ifindex=index, ifindex=index)


@pytest.fixture(scope="module")
def two_benches(as_root: None) -> Iterator[tuple[str, Bench]]:
    with namespace_of((*NETWORK, *SECOND)) as name:
        with netns.entered(name):
            bench = Bench([GATEWAY, GATEWAY_TOO])
        yield name, bench


@pytest.fixture
def two(two_benches: tuple[str, Bench]) -> Iterator[TwoWans]:
    name, bench = two_benches
    with netns.entered(name):
        yield TwoWans(bench)


def ends(result: Result) -> tuple[str, str]:
    return result.ended, result.ip.src


# --- mappings --------------------------------------------------------------------------------------


def test_a_mapping_by_each(two: TwoWans) -> None:
    """Endpoint-independent by each, and both live."""
    ports = {}
    for wan, address in ((0, GATEWAY), (1, GATEWAY_TOO), (0, GATEWAY), (1, GATEWAY_TOO)):
        for remote in (SERVER, OTHER_SERVER):
            result = two.out(wan, udp(HOST, 5000, remote, 53))
            assert ends(result) == ("slow_outbound", address)
            assert ports.setdefault(wan, result.port) == result.port
    assert two.mappings == 2
    for wan, address in enumerate((GATEWAY, GATEWAY_TOO)):
        answer = two.into(wan, udp(SERVER, 53, address, ports[wan]))
        assert (answer.ended, answer.ip.dst, answer.ip.dport) == ("slow_inbound", HOST, 5000)
    assert two.host(HOST) == (4, 0, 2, 0)
    two.assert_tables_agree()
    two.reap(two.slots(), order=1)
    two.reap(two.slots(), order=1)
    assert two.mappings == 0
    assert two.host(HOST) == (0, 0, 0, 0)
    two.assert_tables_agree()


def test_a_full_pool_of_one_is_not_the_others(two: TwoWans) -> None:
    two.pool(udp=((3000, 1),))
    assert two.out(1, udp(HOST, 5000, SERVER, 53)).ended == "slow_outbound"
    assert two.out(1, udp(OTHER_HOST, 5000, SERVER, 53)).ended == "drop_ports_exhausted"
    assert two.out(0, udp(OTHER_HOST, 5000, SERVER, 53)).ended == "slow_outbound"


def test_shared_ports_are_told_apart(two: TwoWans) -> None:
    """One host's sessions by both that no mapping leads to."""
    two.pool(udp=((3000, 1),))
    two.tables.set_settings(overload=1)
    for wan in range(2):
        two.out(wan, udp(OTHER_HOST, 1, SERVER, 1))
        result = two.out(wan, udp(HOST, 5000, OTHER_SERVER, 53))
        assert (result.ended, result.port) == ("slow_outbound", 3000)
    assert two.out(1, udp(HOST, 5000, OTHER_SERVER, 53)).ip.src == GATEWAY_TOO
    two.assert_tables_agree()


# --- answers ---------------------------------------------------------------------------------------


def ask(two: TwoWans, wan: int, protocol: str = "udp") -> tuple[Packet, Packet]:
    """A remote asks HOST's port 80 by a WAN; what it is answered: inside, and as it has to leave."""
    two.forward(protocol, 8080, (HOST, 80))
    address = (GATEWAY, GATEWAY_TOO)[wan]
    if protocol == "udp":
        assert two.into(wan, udp(ROUTER, 9, address, 8080)).ip.dst == HOST
        return udp(HOST, 80, ROUTER, 9), udp(address, 8080, ROUTER, 9)
    assert two.into(wan, tcp(ROUTER, 9, address, 8080, SYN, seq=5)).ip.dst == HOST
    answer = {"flags": SYN | ACK, "seq": 7, "ack": 6}
    return tcp(HOST, 80, ROUTER, 9, **answer), tcp(address, 8080, ROUTER, 9, **answer)


@pytest.mark.parametrize("protocol", ["udp", "tcp"])
@pytest.mark.parametrize("came_by", [0, 1])
def test_an_answer_leaves_by_the_wan_of_its_question(two: TwoWans, came_by: int, protocol: str) -> None:
    inside, outside = ask(two, came_by, protocol)
    assert two.out(1 - came_by, inside).ended == "exit_other_wan"
    result = two.out(came_by, inside)
    assert result.ended == "slow_outbound"
    assert result.bytes == wire(outside)
    two.assert_tables_agree()


def test_what_the_host_asks_itself_follows_the_kernel(two: TwoWans) -> None:
    two.out(1, udp(HOST, 5000, ROUTER, 9))
    assert ends(two.out(0, udp(HOST, 5000, ROUTER, 9))) == ("slow_outbound", GATEWAY)


def test_an_expired_question_binds_nobody(two: TwoWans) -> None:
    inside, _ = ask(two, 1)
    for slot in two.slots():
        age(two.tables.sessions[slot], 301)
    assert ends(two.out(0, inside)) == ("slow_outbound", GATEWAY)


@pytest.mark.parametrize("why", ["not there", "no route"])
def test_no_way_to_the_other_wan(two: TwoWans, why: str) -> None:
    inside, _ = ask(two, 1)
    if why == "not there":
        two.tables.set_settings(exit=[two.links[0].index, 0])
    else:
        netns.ip_batch([f"route del default via {PROVIDER} dev far0"], None)
    try:
        assert two.out(0, inside).ended == "drop_exit_route"
    finally:
        if why == "no route":
            netns.ip_batch([f"route add default via {PROVIDER} dev far0 metric 200"], None)


def test_later_fragments_follow_their_first(two: TwoWans) -> None:
    inside, _ = ask(two, 1)
    first = rebuilt(IP(wire(inside / Raw(bytes(3)))))
    first[IP].flags, first[IP].id = "MF", 77
    later = IP(src=HOST, dst=ROUTER, id=77, proto=17, frag=(len(first) - 20) // 8) / Raw(b"later")
    first = rebuilt(first)
    assert two.out(0, first).ended == "exit_other_wan"
    assert two.out(1, first).ended == "slow_outbound"
    assert two.out(0, later).ended == "exit_other_wan"
    result = two.out(1, later)
    assert ends(result) == ("slow_fragment_outbound", GATEWAY_TOO)


def test_a_datagram_client_goes_over(two: TwoWans) -> None:
    """Its latest way is that of the answers."""
    inside, _ = ask(two, 0)
    assert two.into(1, udp(ROUTER, 9, GATEWAY_TOO, 8080)).ip.dst == HOST
    assert two.out(0, inside).ended == "exit_other_wan"
    assert two.into(0, udp(ROUTER, 9, GATEWAY, 8080)).ip.dst == HOST
    assert ends(two.out(0, inside)) == ("slow_outbound", GATEWAY)
    two.assert_tables_agree()


def test_a_connection_does_not(two: TwoWans) -> None:
    """Its host would take the second SYN for one of the first connection, and so could anybody end that."""
    ask(two, 0, "tcp")
    assert two.into(1, tcp(ROUTER, 9, GATEWAY_TOO, 8080, SYN, seq=5)).ended == "drop_reply_taken"
    assert two.into(1, tcp(ROUTER, 10, GATEWAY_TOO, 8080, SYN, seq=5)).ip.dst == HOST


def about(packet: Packet) -> Packet:
    """Port unreachable."""
    head = ICMP(type=3, code=3)
    return IP(src=packet[IP].dst, dst=packet[IP].src) / head / Raw(wire(packet)[:28])


def test_an_error_leaves_by_the_wan_of_what_it_is_about(two: TwoWans) -> None:
    two.forward("udp", 8080, (HOST, 80))
    question = two.into(1, udp(ROUTER, 9, GATEWAY_TOO, 8080))
    error = about(question.ip)
    assert two.out(0, error).ended == "exit_other_wan"
    result = two.out(1, error)
    assert ends(result) == ("slow_icmp_error_outbound", GATEWAY_TOO)
    assert IP(result.bytes[28:]).dst == GATEWAY_TOO


def test_the_gateways_own_error_quotes_the_other_wan(two: TwoWans) -> None:
    two.forward("udp", 8080, (HOST, 80))
    question = two.into(1, udp(ROUTER, 9, GATEWAY_TOO, 8080))
    error = about(question.ip)
    error[IP].src = GATEWAY
    result = two.out(0, error, ingress_ifindex=0)
    assert ends(result) == ("slow_icmp_error_outbound", GATEWAY)
    assert IP(result.bytes[28:]).dst == GATEWAY_TOO


def test_an_error_about_a_protocol_without_ports(two: TwoWans) -> None:
    assert ends(two.out(1, IP(src=HOST, dst=ROUTER, proto=47) / Raw(bytes(20))))[1] == GATEWAY_TOO
    question = two.into(1, IP(src=ROUTER, dst=GATEWAY_TOO, proto=47) / Raw(bytes(20)))
    error = about(question.ip)
    assert two.out(0, error).ended == "exit_other_wan"
    result = two.out(1, error)
    assert ends(result) == ("slow_icmp_error_outbound", GATEWAY_TOO)


def test_a_host_with_an_address_of_its_own_leaves_by_its_wan(two: TwoWans) -> None:
    pair = (IPv4Network(HOST), IPv4Network("192.0.2.9"), 1)
    two.tables.set_counterparts([pair])
    try:
        assert two.out(0, udp(HOST, 5000, ROUTER, 9)).ended == "exit_other_wan"
        assert ends(two.out(1, udp(HOST, 5000, ROUTER, 9))) == ("slow_basic_outbound", "192.0.2.9")
        assert ends(two.out(0, udp(OTHER_HOST, 5000, ROUTER, 9))) == ("slow_outbound", GATEWAY)
    finally:
        two.tables.set_counterparts([])


def test_own_traffic_is_not_sent_on(two: TwoWans) -> None:
    """Which of its addresses goes out by which WAN, the kernel says."""
    for wan, address in ((0, GATEWAY_TOO), (1, GATEWAY)):
        assert two.out(wan, udp(address, 53, ROUTER, 9), ingress_ifindex=0).ended == "own_outbound"
        result = two.out(wan, IP(src=address, dst=ROUTER) / ICMP(type=8, id=5), ingress_ifindex=0)
        assert ends(result) == ("slow_outbound", address)


@pytest.mark.parametrize("wan", [0, 1])
def test_no_wan_brings_packets_from_an_address_of_ours(two: TwoWans, wan: int) -> None:
    for address in (GATEWAY, GATEWAY_TOO):
        packet = udp(address, 9, (GATEWAY, GATEWAY_TOO)[wan], 8080)
        assert two.into(wan, packet).ended == "drop_source_martian"


@pytest.mark.parametrize("address", [GATEWAY, GATEWAY_TOO])
def test_hairpin_by_every_address(two: TwoWans, address: str) -> None:
    """Always turned round at the first WAN; the source seen is of the address called."""
    two.forward("udp", 8080, (OTHER_HOST, 80))
    there = two.hairpin(udp(HOST, 5000, address, 8080))
    assert (there.ended, there.ip.src, there.ip.dst) == ("slow_hairpin", address, OTHER_HOST)
    back = two.hairpin(udp(OTHER_HOST, 80, address, there.port))
    assert (back.ended, back.ip.src, back.ip.dst, back.ip.dport) == ("slow_hairpin", address, HOST, 5000)


# --- XDP -------------------------------------------------------------------------------------------


def test_xdp_takes_the_way_that_is_armed(two: TwoWans) -> None:
    two.accelerate()
    packet = udp(HOST, 5000, ROUTER, 9)
    for wan, address in ((0, GATEWAY), (1, GATEWAY_TOO), (0, GATEWAY)):
        assert two.fast_outbound(packet).ended in ("up_no_flow", "up_not_armed")
        two.out(wan, packet)
        result = two.fast_outbound(packet)
        assert ends(result) == ("fast_outbound", address)
        next_tick()
        two.tables.set_settings(disarmed_at=bpf.jiffies())  # as at every change of routes
        next_tick()


def test_xdp_repeats_an_answer_by_the_wan_of_its_question(two: TwoWans) -> None:
    two.accelerate()
    inside, outside = ask(two, 1)
    assert two.fast_outbound(inside).ended == "up_not_armed"
    two.out(0, inside)
    two.out(1, inside)
    result = two.fast_outbound(inside)
    assert result.ended == "fast_outbound"
    assert result.bytes == wire(rebuilt(outside, ttl=63))


def test_xdp_learns_the_way_in_for_each(two: TwoWans) -> None:
    two.accelerate()
    for wan, address in ((1, GATEWAY_TOO), (0, GATEWAY)):
        port = two.out(wan, udp(HOST, 5000, ROUTER, 9)).port
        two.learn(two.into(wan, udp(ROUTER, 9, address, port)).ip, came_by=two.links[wan].index)
        assert two.fast_inbound(udp(ROUTER, 9, address, port)).ip.dst == HOST


# --- sums ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wan", [0, 1])
def test_what_is_translated_counts_for_its_wan(two: TwoWans, wan: int) -> None:
    two.accelerate()
    packet = udp(HOST, 5000, SERVER, 53)
    port = two.out(wan, packet).port
    assert two.translated_by == wan
    two.fast_outbound(packet)
    assert two.translated_by == wan
    answer = udp(SERVER, 53, (GATEWAY, GATEWAY_TOO)[wan], port)
    two.learn(two.into(wan, answer).ip, came_by=two.links[wan].index)
    assert two.translated_by == wan
    mac = bytes.fromhex((WAN_MAC, FAR_MAC)[wan].replace(":", ""))
    assert two.fast(mac + bytes(6) + b"\x08\0" + wire(answer), two.links[wan].index).ended == "fast_inbound"
    assert two.translated_by == wan
