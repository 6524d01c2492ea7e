"""Port forwards: who is let in, to whom, and what becomes of the port and its sessions afterwards."""

import random
from collections import Counter
from ipaddress import IPv4Address, IPv4Network

import numpy as np
import pytest
from harness import (
    ACK,
    FIN,
    FROM_OUTSIDE,
    FURTHER,
    GATEWAY,
    HOST,
    OTHER_HOST,
    OTHER_SERVER,
    RST,
    SERVER,
    SYN,
    TICKS,
    Gateway,
    age,
    rebuilt,
    since,
    tcp,
    udp,
    wire,
)
from scapy.packet import Packet

from xdpmasq.abi import (
    LIFE_LIVE,
    LIFE_OPENING,
    LIFE_RESTING,
    LIFE_SESSION,
    LIFE_STATE,
    LIFE_STATIC,
    PORTS,
    REAP_EXPIRED,
    REAP_FORCED,
    REAP_RESTED,
)
from xdpmasq.expiry import Expiry
from xdpmasq.upkeep import Upkeep

THIRD_HOST = "192.168.0.4"
MAKE = {"tcp": tcp, "udp": udp}
EACH_PROTOCOL = pytest.mark.parametrize("protocol", list(MAKE))


def knock(protocol: str, remote: str, port: int, sport: int = 7000) -> Packet:
    """The first packet of a session from outside."""
    return tcp(remote, sport, GATEWAY, port, SYN, seq=100) if protocol == "tcp" else udp(remote, sport, GATEWAY, port)


def slot_of(protocol: str, port: int) -> int:
    return list(MAKE).index(protocol) * PORTS + port


def session_of(gateway: Gateway, host: str, host_port: int, remote: str, remote_port: int) -> int:
    """The slot of the live session between two endpoints."""
    for slot in gateway.slots():
        row = gateway.tables.sessions[slot]
        ends = (row["in"]["new_addr"], row["in"]["new_port"], row["out"]["remote_addr"], row["out"]["remote_port"])
        words = [int(each["word"][0]) if each.dtype.names else int(each) for each in ends]
        asked = [
            int.from_bytes(IPv4Address(host).packed, "little"),
            int.from_bytes(host_port.to_bytes(2, "big"), "little"),
            int.from_bytes(IPv4Address(remote).packed, "little"),
            int.from_bytes(remote_port.to_bytes(2, "big"), "little"),
        ]
        if words == asked and row["life"] & LIFE_SESSION:
            return slot
    raise AssertionError("no such session")


# --- the way there and back ------------------------------------------------------------------------


@EACH_PROTOCOL
@pytest.mark.parametrize(("port", "inside"), [(8080, 80), (22, 22), (40000, 65535), (65535, 1)])
def test_there_and_back(gateway: Gateway, protocol: str, port: int, inside: int) -> None:
    """Within the pool and outside it; the answer leaves from the forwarded port."""
    gateway.forward(protocol, port, (HOST, inside))
    packet = knock(protocol, SERVER, port)
    result = gateway.inbound(packet)
    assert (result.ended, result.counted) == ("slow_inbound", {"forward_opened": 1, "session_opened": 1})
    assert result.bytes == wire(rebuilt(packet, dst=HOST, dport=inside))
    answer = MAKE[protocol](HOST, inside, SERVER, 7000, **({"flags": SYN | ACK} if protocol == "tcp" else {}))
    back = gateway.outbound(answer)
    assert (back.ended, back.counted) == ("slow_outbound", {})
    assert back.bytes == wire(rebuilt(answer, src=GATEWAY, sport=port))
    gateway.assert_tables_agree()


@EACH_PROTOCOL
@pytest.mark.parametrize("port", [5000, 5003, 5010])
def test_a_range_shifts_its_ports(gateway: Gateway, protocol: str, port: int) -> None:
    gateway.forward(protocol, 5000, (HOST, 6000), last=5010)
    result = gateway.inbound(knock(protocol, SERVER, port))
    assert (result.ip.dst, result.ip.dport) == (HOST, port + 1000)
    for outside in (4999, 5011):
        assert gateway.inbound(knock(protocol, SERVER, outside)).ended == "own_inbound"


@EACH_PROTOCOL
def test_only_its_own_protocol(gateway: Gateway, protocol: str) -> None:
    gateway.forward(protocol, 8080, (HOST, 80))
    (other,) = set(MAKE) - {protocol}
    assert gateway.inbound(knock(other, SERVER, 8080)).ended == "own_inbound"


@pytest.mark.parametrize(
    ("flags", "ended"),
    [
        (SYN, "slow_inbound"),
        (ACK, "slow_inbound"),  # after the gateway was replaced
        (SYN | ACK, "drop_tcp_no_session"),
        (FIN | ACK, "drop_tcp_no_session"),
        (RST, "drop_tcp_no_session"),
        (RST | ACK, "drop_tcp_no_session"),
        (0, "drop_tcp_flags"),
        (SYN | FIN, "drop_tcp_flags"),
        (SYN | RST, "drop_tcp_flags"),
        (0x29, "drop_tcp_flags"),
    ],
)
@pytest.mark.req("attacks-tcp_flags")
def test_which_segments_open(gateway: Gateway, flags: int, ended: str) -> None:
    gateway.forward("tcp", 8080, (HOST, 80))
    assert gateway.inbound(tcp(SERVER, 7000, GATEWAY, 8080, flags)).ended == ended
    assert bool(gateway.tables.live_slots().tolist()) == (ended == "slow_inbound")


def test_many_remotes_at_once(gateway: Gateway) -> None:
    """The first has the port's own place, the others further ones; each gets its own answer."""
    gateway.forward("udp", 5000, (HOST, 53))
    remotes = [(SERVER, 7000), (SERVER, 7001), (OTHER_SERVER, 7000)]
    for remote in remotes:
        assert gateway.inbound(udp(*remote, GATEWAY, 5000)).ended == "slow_inbound"
    for remote in remotes:
        back = gateway.outbound(udp(HOST, 53, *remote))
        assert (back.ip.src, back.port, back.counted) == (GATEWAY, 5000, {})
    gateway.assert_tables_agree()


def test_no_room_for_further_sessions(gateway: Gateway) -> None:
    gateway.forward("udp", 5000, (HOST, 53))
    for number in range(FURTHER + 1):
        assert gateway.inbound(udp(SERVER, 1000 + number, GATEWAY, 5000)).ended == "slow_inbound"
        gateway.outbound(udp(HOST, 53, SERVER, 1000 + number))  # answered, it gives way to none
    assert gateway.inbound(udp(SERVER, 9, GATEWAY, 5000)).ended == "drop_sessions_full"
    assert gateway.inbound(udp(SERVER, 1000, GATEWAY, 5000)).ended == "slow_inbound"


def test_what_the_target_sends_by_itself_leaves_from_the_forwarded_port(gateway: Gateway) -> None:
    gateway.forward("udp", 5000, (HOST, 53))
    result = gateway.outbound(udp(HOST, 53, SERVER, 53))
    assert (result.port, result.counted) == (5000, {"session_opened": 1})
    assert gateway.host(HOST) == (1, 0, 0, 0)
    assert gateway.inbound(udp(SERVER, 53, GATEWAY, 5000)).ended == "slow_inbound"
    gateway.assert_tables_agree()


# --- which rule ------------------------------------------------------------------------------------


@EACH_PROTOCOL
def test_the_most_specific_source_wins(gateway: Gateway, protocol: str) -> None:
    gateway.forward(protocol, 8080, (THIRD_HOST, 82), source="198.51.100.0/24")
    gateway.forward(protocol, 8080, (HOST, 80))
    gateway.forward(protocol, 8080, (OTHER_HOST, 81), source="198.51.100.7/32")
    for remote, target in (
        ("203.0.113.10", (HOST, 80)),
        ("198.51.99.255", (HOST, 80)),
        ("198.51.100.6", (THIRD_HOST, 82)),
        ("198.51.100.255", (THIRD_HOST, 82)),
        ("198.51.100.7", (OTHER_HOST, 81)),
    ):
        result = gateway.inbound(knock(protocol, remote, 8080))
        assert (result.ip.dst, result.ip.dport) == target
        answer = MAKE[protocol](*target, remote, 7000)
        assert gateway.outbound(answer).bytes == wire(rebuilt(answer, src=GATEWAY, sport=8080))
    gateway.assert_tables_agree()


def test_for_some_remotes_only(gateway: Gateway) -> None:
    """Others meet a silent port: it is not the gateway's."""
    gateway.forward("tcp", 8080, (HOST, 80), source="198.51.100.0/24")
    assert gateway.inbound(knock("tcp", SERVER, 8080)).ended == "drop_filtered"
    assert gateway.inbound(knock("tcp", OTHER_SERVER, 8080)).ended == "slow_inbound"


WEIGHTS = {"equal": (1, 1), "1:2:5": (1, 2, 5), "eight": (1,) * 8, "1000:1": (1000, 1), "one": (3,)}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_weights(gateway: Gateway, weights: tuple[int, ...]) -> None:
    """Random remotes and neighbouring ones: chi-square against the weights, for a false alarm in a million."""
    targets = [(f"192.168.0.{10 + i}", 80, weight) for i, weight in enumerate(weights)]
    gateway.forward("udp", 5000, *targets)
    rng = random.Random(7)
    spread = [str(IPv4Address(rng.randrange(0x2D000000, 0x2F000000))) for _ in range(1200)]
    neighbours = [str(IPv4Address("203.0.113.20") + 256 * (i // 200) + i % 200) for i in range(1200)]
    for remotes in (spread, neighbours):
        met = Counter()
        for number, remote in enumerate(remotes, 1):
            met[gateway.inbound(knock("udp", remote, 5000)).ip.dst] += 1
            if number % 200 == 0:  # as many as there is room for
                gateway.reap(gateway.tables.live_slots(), REAP_FORCED)
                gateway.reap(gateway.slots(), REAP_RESTED)
        expected = np.array(weights) * len(remotes) / sum(weights)
        found = np.array([met[address] for address, _, _ in targets])
        assert found.sum() == len(remotes)
        limit = len(weights) - 1 + 5 * (2 * max(len(weights) - 1, 1)) ** 0.5 + 15
        assert ((found - expected) ** 2 / expected).sum() < limit


def test_the_same_remote_meets_the_same_target(gateway: Gateway) -> None:
    gateway.forward("tcp", 8080, *((f"192.168.0.{10 + i}", 80, 1 + i) for i in range(8)))
    rng = random.Random(3)
    for _ in range(10):
        remote = str(IPv4Address(rng.randrange(0x2D000000, 0x2F000000)))
        results = [gateway.inbound(knock("tcp", remote, 8080, sport)) for sport in range(1000, 1006)]
        assert {result.ended for result in results} == {"slow_inbound"}
        assert len({result.ip.dst for result in results}) == 1
    gateway.assert_tables_agree()


@EACH_PROTOCOL
def test_each_of_several_targets_answers(gateway: Gateway, protocol: str) -> None:
    gateway.forward(protocol, 8080, (HOST, 80), (OTHER_HOST, 81))
    met = set()
    for number in range(24):
        remote = f"45.0.{number}.1"
        result = gateway.inbound(knock(protocol, remote, 8080))
        met.add(result.ip.dst)
        answer = MAKE[protocol](result.ip.dst, result.ip.dport, remote, 7000)
        assert gateway.outbound(answer).bytes == wire(rebuilt(answer, src=GATEWAY, sport=8080))
        assert gateway.inbound(knock(protocol, remote, 8080)).ip.dst == result.ip.dst
    assert met == {HOST, OTHER_HOST}
    assert gateway.mappings == 0, "neither target alone has the port"
    gateway.assert_tables_agree()


# --- the default host ------------------------------------------------------------------------------


@EACH_PROTOCOL
@pytest.mark.parametrize("port", [1, 80, 5000, 40000, 65535])
def test_the_default_host_gets_any_port(gateway: Gateway, protocol: str, port: int) -> None:
    gateway.forward(protocol, 0, (HOST, 0))
    packet = knock(protocol, SERVER, port)
    result = gateway.inbound(packet)
    assert result.bytes == wire(rebuilt(packet, dst=HOST))
    assert result.counted == {"mapping_opened": 1, "session_opened": 1, "forward_opened": 1}
    answer = MAKE[protocol](HOST, port, SERVER, 7000)
    assert gateway.outbound(answer).bytes == wire(rebuilt(answer, src=GATEWAY))
    assert gateway.is_claimed(slot_of(protocol, port))
    gateway.assert_tables_agree()


@EACH_PROTOCOL
@pytest.mark.parametrize("port", [443, 5000], ids=["outside the pool", "of the pool"])
def test_the_default_host_gets_many_remotes_at_a_port(gateway: Gateway, protocol: str, port: int) -> None:
    """At once, and one after the other's session has expired."""
    gateway.forward(protocol, 0, (HOST, 0))
    for sport in (7000, 7001, 7002):
        assert gateway.inbound(knock(protocol, SERVER, port, sport)).ip.dst == HOST
    for sport in (7000, 7001, 7002):
        assert gateway.outbound(MAKE[protocol](HOST, port, SERVER, sport)).port == port
    for slot in gateway.tables.live_slots():
        age(gateway.tables.sessions[slot], 7441)
    assert gateway.inbound(knock(protocol, SERVER, port, 7003)).ip.dst == HOST
    gateway.assert_tables_agree()


def test_a_rule_taken_out_while_a_session_is_being_opened(gateway: Gateway) -> None:
    """A CPU has put it in the forwarded port's slot and has not made it live yet: the target keeps its mapping."""
    rule = gateway.forward("udp", 3000, (HOST, 5000))
    assert gateway.open(udp(HOST, 5000, SERVER, 53)) == 3000
    slot, lives = gateway.slot(HOST, 5000, "udp"), gateway.tables.sessions["life"]
    lives[slot] = int(lives[slot]) & ~LIFE_SESSION | LIFE_OPENING
    gateway.withdraw(rule)
    lives[slot] = int(lives[slot]) & ~LIFE_STATE | LIFE_LIVE | LIFE_SESSION
    assert gateway.inbound(udp(SERVER, 53, GATEWAY, 3000)).ip.dport == 5000
    assert gateway.open(udp(HOST, 5000, SERVER, 53)) == 3000


def test_a_rule_that_comes_again_keeps_its_targets_mapping(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a lease does that is asked for anew: what was to be withdrawn while a session ran there no longer is."""
    monkeypatch.setattr("xdpmasq.upkeep.PUBLISH_AT_ONCE", 0)  # of many, it is not this one's turn
    upkeep = Upkeep(gateway.tables)
    rule = gateway.forward("udp", 3000, (HOST, 5000))
    upkeep.run()
    assert gateway.open(udp(HOST, 5000, SERVER, 53)) == 3000
    gateway.withdraw(rule)
    upkeep.run()
    gateway.put(rule)
    slot = gateway.slot(HOST, 5000, "udp")
    gateway.reap([slot], REAP_FORCED)
    for _ in range(2):
        upkeep.run()
        assert gateway.slot(HOST, 5000, "udp") == slot
    assert gateway.open(udp(HOST, 5000, SERVER, 53)) == 3000
    gateway.assert_tables_agree()


@pytest.mark.parametrize("withdrawn", [False, True], ids=["in place", "withdrawn"])
def test_the_agent_ends_the_default_hosts_sessions_outside_the_pool(gateway: Gateway, withdrawn: bool) -> None:
    rule = gateway.forward("tcp", 0, (HOST, 0))
    upkeep = Upkeep(gateway.tables)
    reserved = gateway.tables.claims.copy()
    expiry = Expiry(gateway.tables, gateway.bench.programs["masq_reap"], reserved, 0, 0, kept=upkeep.slots)
    upkeep.run()
    gateway.inbound(knock("tcp", SERVER, 443))
    if withdrawn:
        gateway.withdraw(rule)
    age(gateway.tables.sessions[443], 241)
    upkeep.run()
    expiry.run()
    assert gateway.counted()["mapping_closed"] == 1
    age(gateway.tables.sessions[443], 9)
    upkeep.run()
    expiry.run()
    upkeep.run()
    assert gateway.slots() == upkeep.slots().tolist() == []
    assert gateway.mappings == 0


@EACH_PROTOCOL
def test_rules_within_the_default_hosts_ports(gateway: Gateway, protocol: str) -> None:
    gateway.forward(protocol, 0, (HOST, 0))
    gateway.forward(protocol, 8000, (OTHER_HOST, 80), last=8010)
    gateway.forward(protocol, 8005, (THIRD_HOST, 90), source="198.51.100.0/24")
    for remote, port, target in (
        (SERVER, 7999, (HOST, 7999)),
        (SERVER, 8000, (OTHER_HOST, 80)),
        (SERVER, 8005, (OTHER_HOST, 85)),
        (OTHER_SERVER, 8005, (THIRD_HOST, 90)),
        (SERVER, 8011, (HOST, 8011)),
    ):
        result = gateway.inbound(knock(protocol, remote, port))
        assert (result.ip.dst, result.ip.dport) == target
    gateway.assert_tables_agree()


@pytest.mark.req("attacks-port_shadow")
def test_the_default_host_gets_no_mapped_port(gateway: Gateway) -> None:
    """A stranger at another host's port is filtered as ever."""
    gateway.forward("udp", 0, (OTHER_HOST, 0))
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    assert gateway.inbound(udp(OTHER_SERVER, 53, GATEWAY, port)).ended == "drop_filtered"
    assert gateway.inbound(udp(SERVER, 53, GATEWAY, port)).ip.dst == HOST


@pytest.mark.req("attacks-port_shadow")
@EACH_PROTOCOL
def test_the_default_host_gets_no_port_of_the_gateways_own(gateway: Gateway, protocol: str) -> None:
    import socket  # noqa: PLC0415

    gateway.forward(protocol, 0, (HOST, 0))
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as own:
        own.bind((GATEWAY, 4433))
        if protocol == "tcp":
            own.listen()
        assert gateway.inbound(knock(protocol, SERVER, 4433)).ended == "own_inbound"
    assert gateway.inbound(knock(protocol, SERVER, 4433)).ip.dst == HOST


@EACH_PROTOCOL
def test_the_default_host_takes_a_resting_port(gateway: Gateway, protocol: str) -> None:
    """It is nobody's; the rest is for mappings of hosts that could be taken for the former one."""
    gateway.forward(protocol, 0, (OTHER_HOST, 0))
    port = gateway.open(udp(HOST, 5000, SERVER, 53) if protocol == "udp" else tcp(HOST, 5000, SERVER, 53, SYN))
    gateway.reap(gateway.slots(), REAP_FORCED)
    assert gateway.tables.sessions[slot_of(protocol, port)]["life"] & LIFE_STATE == LIFE_RESTING
    result = gateway.inbound(knock(protocol, SERVER, port))
    assert (result.ip.dst, result.ip.dport) == (OTHER_HOST, port)
    gateway.assert_tables_agree()


def test_the_default_host_where_its_endpoint_has_another_port(gateway: Gateway) -> None:
    gateway.forward("udp", 0, (HOST, 0))
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    assert port != 5000
    assert gateway.inbound(udp(OTHER_SERVER, 53, GATEWAY, 5000)).ip.dst == HOST
    assert gateway.outbound(udp(HOST, 5000, OTHER_SERVER, 53)).port == 5000, "the answer"
    assert gateway.outbound(udp(HOST, 5000, SERVER, 53)).port == port, "its own"
    gateway.assert_tables_agree()
    gateway.reap(gateway.tables.live_slots(), REAP_FORCED)
    gateway.assert_tables_agree()


# --- the ends --------------------------------------------------------------------------------------


@EACH_PROTOCOL
@pytest.mark.parametrize("port", [8080, 80], ids=["of the pool", "outside the pool"])
def test_rule_deleted_with_sessions_running(gateway: Gateway, protocol: str, port: int) -> None:
    slot = slot_of(protocol, port)
    assert gateway.is_claimed(slot) == (port < 1024)
    rule = gateway.forward(protocol, port, (HOST, 80))
    assert gateway.is_claimed(slot)
    assert gateway.tables.sessions[slot]["life"] & (LIFE_STATE | LIFE_STATIC) == LIFE_LIVE | LIFE_STATIC
    remotes = [(SERVER, 7000), (SERVER, 7001)]
    for _, sport in remotes:
        gateway.inbound(knock(protocol, SERVER, port, sport))
    gateway.withdraw(rule)
    for remote in remotes:
        packet = MAKE[protocol](*remote, GATEWAY, port)
        assert gateway.inbound(packet).ip.dst == HOST, "running sessions go on"
        assert gateway.outbound(MAKE[protocol](HOST, 80, *remote)).port == port
    assert gateway.inbound(knock(protocol, OTHER_SERVER, port)).ended == "drop_filtered", "for new ones it is over"
    gateway.assert_tables_agree()
    live = gateway.tables.live_slots().tolist()
    for each in live:
        age(gateway.tables.sessions[each], 7441)
    assert gateway.reap(sorted(live, reverse=True), REAP_EXPIRED) == {"session_closed": 2, "mapping_closed": 1}
    gateway.assert_tables_agree()
    gateway.reap(gateway.slots(), REAP_RESTED)
    assert gateway.slots() == []
    assert gateway.is_claimed(slot) == (port < 1024), "as it was"
    assert gateway.entries("mappings") == {}
    assert gateway.indexed() == []
    assert gateway.inbound(knock(protocol, SERVER, port)).ended == "own_inbound"


@EACH_PROTOCOL
def test_idle_rule_deleted(gateway: Gateway, protocol: str) -> None:
    rule = gateway.forward(protocol, 8080, (HOST, 80))
    gateway.withdraw(rule)
    assert gateway.reap(gateway.slots(), REAP_EXPIRED) == {"mapping_closed": 1}
    gateway.reap(gateway.slots(), REAP_RESTED)
    assert gateway.slots() == []
    assert not gateway.is_claimed(slot_of(protocol, 8080))
    assert gateway.inbound(knock(protocol, SERVER, 8080)).ended == "own_inbound"


@EACH_PROTOCOL
def test_sessions_end_and_the_port_stays(gateway: Gateway, protocol: str) -> None:
    gateway.forward(protocol, 8080, (HOST, 80))
    for _ in range(2):
        for sport in (7000, 7001, 7002):
            assert gateway.inbound(knock(protocol, SERVER, 8080, sport)).ended == "slow_inbound"
        live = gateway.tables.live_slots().tolist()
        assert len(live) == 3
        for slot in live:
            age(gateway.tables.sessions[slot], 7441)
        assert gateway.reap(live, REAP_EXPIRED) == {"session_closed": 3}
        gateway.reap(gateway.slots(), REAP_RESTED)
        assert gateway.slots() == [slot_of(protocol, 8080)]
        gateway.assert_tables_agree()
    assert gateway.reap([slot_of(protocol, 8080)], REAP_FORCED) == {}


@EACH_PROTOCOL
@pytest.mark.parametrize("speaks", ["remote", "host"])
@pytest.mark.parametrize("several", [False, True], ids=["one target", "several targets"])
@pytest.mark.parametrize("further", [False, True], ids=["in the port's place", "in a further one"])
def test_spoken_on_when_expired(gateway: Gateway, protocol: str, speaks: str, several: bool, further: bool) -> None:
    gateway.forward(protocol, 8080, (HOST, 80), *([(HOST, 80)] if several else []))
    if further:
        gateway.inbound(knock(protocol, OTHER_SERVER, 8080))
    gateway.inbound(knock(protocol, SERVER, 8080))
    gateway.outbound(MAKE[protocol](HOST, 80, SERVER, 7000))
    slot = session_of(gateway, HOST, 80, SERVER, 7000)
    row = gateway.tables.sessions[slot]
    age(row, 7441)
    if speaks == "remote":
        result = gateway.inbound(knock(protocol, SERVER, 8080))
        assert (result.ip.dst, result.ip.dport) == (HOST, 80)
    else:
        result = gateway.outbound(MAKE[protocol](HOST, 80, SERVER, 7000))
        assert result.port == 8080
    assert result.counted == {"session_reopened": 1}
    assert bool(row["out"]["marks"] & FROM_OUTSIDE) == (speaks == "remote")
    assert gateway.inbound(MAKE[protocol](SERVER, 7000, GATEWAY, 8080)).ip.dst == HOST
    assert gateway.outbound(MAKE[protocol](HOST, 80, SERVER, 7000)).port == 8080
    gateway.assert_tables_agree()


def test_reset_and_closed(gateway: Gateway) -> None:
    """A session from outside follows TCP as any other: its timers by its state."""
    gateway.forward("tcp", 8080, (HOST, 80))
    gateway.inbound(tcp(SERVER, 7000, GATEWAY, 8080, SYN, seq=100))
    gateway.outbound(tcp(HOST, 80, SERVER, 7000, SYN | ACK, seq=500, ack=101))
    row = gateway.tables.sessions[slot_of("tcp", 8080)]
    age(row, 241)
    assert gateway.inbound(tcp(SERVER, 7000, GATEWAY, 8080, RST, seq=101)).ended == "drop_tcp_no_session", "expired"
    age(row, 239)
    gateway.inbound(tcp(SERVER, 7000, GATEWAY, 8080, ACK, seq=101, ack=501))
    age(row, 7439)
    assert gateway.inbound(tcp(SERVER, 7000, GATEWAY, 8080, ACK, seq=101, ack=501)).counted == {}
    gateway.inbound(tcp(SERVER, 7000, GATEWAY, 8080, RST, seq=999))
    age(row, 7439)
    assert gateway.inbound(tcp(SERVER, 7000, GATEWAY, 8080, ACK, seq=101, ack=501)).counted == {}
    gateway.inbound(tcp(SERVER, 7000, GATEWAY, 8080, RST, seq=101))
    age(row, 241)
    assert gateway.inbound(tcp(SERVER, 7000, GATEWAY, 8080, FIN | ACK, seq=101)).ended == "drop_tcp_no_session"


# --- an internal endpoint that has a mapping of its own --------------------------------------------


@EACH_PROTOCOL
@pytest.mark.parametrize("source", [None, "198.51.100.0/24"], ids=["all", "some"])
def test_beside_a_mapping_of_its_own(gateway: Gateway, protocol: str, source: str | None) -> None:
    """The forward's answers leave from the forwarded port, the endpoint's own packets from its own."""
    own = gateway.open(udp(HOST, 80, SERVER, 53) if protocol == "udp" else tcp(HOST, 80, SERVER, 53, SYN))
    gateway.forward(protocol, 8080, (HOST, 80), source=source)
    for sport in (7000, 7001):
        assert gateway.inbound(knock(protocol, OTHER_SERVER, 8080, sport)).ip.dst == HOST
    assert session_of(gateway, HOST, 80, OTHER_SERVER, 7000) in gateway.indexed()
    for sport in (7000, 7001):
        assert gateway.outbound(MAKE[protocol](HOST, 80, OTHER_SERVER, sport)).port == 8080
    assert gateway.outbound(MAKE[protocol](HOST, 80, SERVER, 53)).port == own
    opening = udp(HOST, 80, SERVER, 54) if protocol == "udp" else tcp(HOST, 80, SERVER, 54, SYN)
    assert gateway.outbound(opening).port == own
    gateway.assert_tables_agree()
    for slot in gateway.tables.live_slots():
        age(gateway.tables.sessions[slot], 7441)
    for _ in range(2):
        gateway.reap(gateway.slots(), REAP_EXPIRED)
    assert gateway.indexed() == []
    gateway.assert_tables_agree()


@EACH_PROTOCOL
def test_the_same_remote_by_both_ports(gateway: Gateway, protocol: str) -> None:
    """The host could not tell one from the other, nor we its answers: the first comer has the remote."""
    opening = udp(HOST, 80, SERVER, 7000) if protocol == "udp" else tcp(HOST, 80, SERVER, 7000, SYN)
    own = gateway.open(opening)
    gateway.forward(protocol, 8080, (HOST, 80))
    assert gateway.inbound(knock(protocol, SERVER, 8080)).ended == "drop_reply_taken"
    gateway.assert_tables_agree()
    assert gateway.outbound(MAKE[protocol](HOST, 80, SERVER, 7000)).port == own
    assert gateway.inbound(knock(protocol, SERVER, 8080, 7001)).ended == "slow_inbound"
    age(gateway.session(HOST, 80, protocol, SERVER, 7000), 7441)
    assert gateway.inbound(knock(protocol, SERVER, 8080)).ended == "slow_inbound", "the other is over"
    gateway.assert_tables_agree()


def test_the_same_remote_at_two_forwards_to_one_target(gateway: Gateway) -> None:
    gateway.forward("udp", 8080, (HOST, 80), source="203.0.113.0/24")
    gateway.forward("udp", 8081, (HOST, 80), source="203.0.113.0/24")
    assert gateway.inbound(udp(SERVER, 7000, GATEWAY, 8080)).ended == "slow_inbound"
    assert gateway.inbound(udp(SERVER, 7000, GATEWAY, 8081)).ended == "drop_reply_taken"
    gateway.assert_tables_agree()
    assert gateway.inbound(udp(SERVER, 7001, GATEWAY, 8081)).ended == "slow_inbound"
    assert gateway.outbound(udp(HOST, 80, SERVER, 7000)).port == 8080
    assert gateway.outbound(udp(HOST, 80, SERVER, 7001)).port == 8081
    gateway.assert_tables_agree()


def test_a_target_of_all_does_not_take_the_remote_of_another(gateway: Gateway) -> None:
    """Both share the port; a remote that speaks with one cannot be taken by what the other sends."""
    gateway.forward("udp", 8080, (HOST, 80))
    gateway.forward("udp", 8080, (OTHER_HOST, 80), source="198.51.100.0/24")
    gateway.inbound(udp(SERVER, 7000, GATEWAY, 8080))
    assert gateway.inbound(udp(OTHER_SERVER, 7000, GATEWAY, 8080)).ip.dst == OTHER_HOST
    age(gateway.tables.sessions[slot_of("udp", 8080)], 301)
    assert gateway.outbound(udp(HOST, 80, OTHER_SERVER, 7000)).verdict == "drop"
    assert gateway.inbound(udp(OTHER_SERVER, 7000, GATEWAY, 8080)).ip.dst == OTHER_HOST
    assert gateway.outbound(udp(OTHER_HOST, 80, OTHER_SERVER, 7000)).port == 8080
    gateway.assert_tables_agree()


# --- accelerated -----------------------------------------------------------------------------------


@EACH_PROTOCOL
@pytest.mark.parametrize("several", [False, True], ids=["by its mapping", "by the 5-tuple"])
def test_forward_born_sessions_fly(gateway: Gateway, protocol: str, several: bool) -> None:
    gateway.accelerate()
    gateway.forward(protocol, 8080, (HOST, 80), *([(HOST, 80)] if several else []))
    for sport in (7000, 7001):
        gateway.inbound(knock(protocol, SERVER, 8080, sport))
        flags = {"flags": SYN | ACK, "seq": 500, "ack": 101} if protocol == "tcp" else {}
        gateway.outbound(MAKE[protocol](HOST, 80, SERVER, sport, **flags))
        acks = {"seq": 101, "ack": 501} if protocol == "tcp" else {}
        gateway.inbound(MAKE[protocol](SERVER, sport, GATEWAY, 8080, **acks))
        gateway.learn(MAKE[protocol](SERVER, sport, HOST, 80, **acks))
        gateway.outbound(MAKE[protocol](HOST, 80, SERVER, sport, **({"seq": 501, "ack": 101} if acks else {})))
    for sport in (7000, 7001):
        there = MAKE[protocol](SERVER, sport, GATEWAY, 8080, payload=b"fly", ttl=9)
        result = gateway.fast_inbound(there)
        assert result.ended == "fast_inbound"
        assert result.bytes == wire(rebuilt(there, dst=HOST, dport=80, ttl=8))
        back = MAKE[protocol](HOST, 80, SERVER, sport, payload=b"fly")
        result = gateway.fast_outbound(back)
        assert result.ended == "fast_outbound"
        assert result.bytes == wire(rebuilt(back, src=GATEWAY, sport=8080, ttl=63))
    slot = session_of(gateway, HOST, 80, SERVER, 7000)
    gateway.reap([slot], REAP_FORCED)
    assert gateway.fast_inbound(MAKE[protocol](SERVER, 7000, GATEWAY, 8080)).ended in ("up_no_flow", "up_not_armed")
    assert gateway.fast_outbound(MAKE[protocol](HOST, 80, SERVER, 7000)).ended in ("up_no_flow", "up_not_armed")
    assert gateway.fast_inbound(MAKE[protocol](SERVER, 7001, GATEWAY, 8080)).ended == "fast_inbound"


# --- ports -----------------------------------------------------------------------------------------


@pytest.mark.req("attacks-port_shadow")
@pytest.mark.req("4787-3")
def test_no_mapping_takes_a_forwarded_port(gateway: Gateway) -> None:
    gateway.pool(udp=((3000, 64),))
    gateway.forward("udp", 3010, (OTHER_HOST, 80), last=3020)
    gateway.forward("udp", 3040, (OTHER_HOST, 99), source="198.51.100.0/24")
    ports = set()
    for number in range(64 - 12):
        for _ in range(50):
            result = gateway.outbound(udp(HOST, 1000 + number, SERVER, 53))
            if result.ended == "slow_outbound":
                break
        ports.add(result.port)
    assert ports == {*range(3000, 3064)} - {*range(3010, 3021), 3040}
    assert gateway.outbound(udp(HOST, 9, SERVER, 53)).ended == "drop_ports_exhausted"
    gateway.assert_tables_agree()


def test_a_mapping_gives_way_to_a_forward(gateway: Gateway) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.open(udp(HOST, 5000, OTHER_SERVER, 53))
    gateway.forward("udp", port, (OTHER_HOST, 80))
    gateway.assert_tables_agree()
    assert gateway.host(HOST) == (0, 0, 0, 0)
    assert gateway.inbound(udp(SERVER, 53, GATEWAY, port)).ip.dst == OTHER_HOST
    assert gateway.open(udp(HOST, 5000, SERVER, 53)) != port


def test_the_books(gateway: Gateway) -> None:
    gateway.forward("udp", 5000, (HOST, 53))
    rules = gateway.tables.maps["forward_rules"]
    for sport in range(5):
        gateway.inbound(udp(SERVER, 7000 + sport, GATEWAY, 5000))
        gateway.inbound(udp(SERVER, 7000 + sport, GATEWAY, 5000))
    assert rules.get(0)["opened"] == 5
    assert gateway.host(HOST) == (0, 0, 0, 0), "what comes from outside is not the host's doing"
    assert since(int(gateway.tables.sessions[slot_of("udp", 5000)]["opened_at"])) < TICKS
    assert IPv4Address(HOST) in IPv4Network("192.168.0.0/24")
