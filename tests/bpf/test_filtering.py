"""Filtering (RFC 4787 section 5): which strangers may speak to a mapped port, for each protocol by itself."""

import pytest
from harness import (
    ACK,
    FROM_OUTSIDE,
    GATEWAY,
    HOST,
    OTHER_SERVER,
    RST,
    SERVER,
    SYN,
    Gateway,
    age,
    ago,
    echo,
    echo_reply,
    rebuilt,
    tcp,
    udp,
    wire,
)

BY_ADDRESS_AND_PORT, BY_ADDRESS, OPEN = range(3)
MODES = {"address and port": BY_ADDRESS_AND_PORT, "address": BY_ADDRESS, "endpoint-independent": OPEN}
EACH_MODE = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
EACH_PROTOCOL = pytest.mark.parametrize("protocol", ["udp", "tcp"])


def opened(gateway: Gateway, protocol: str) -> int:
    if protocol == "udp":
        return gateway.open(udp(HOST, 5000, SERVER, 53))
    return gateway.connect(HOST, 5000, SERVER, 53)


def knock(gateway: Gateway, protocol: str, remote: str, sport: int, port: int) -> str:
    packet = udp(remote, sport, GATEWAY, port) if protocol == "udp" else tcp(remote, sport, GATEWAY, port, SYN)
    result = gateway.inbound(packet)
    if result.ended == "slow_inbound":
        assert result.bytes == wire(rebuilt(packet, dst=HOST, dport=5000))
    return result.ended


@pytest.mark.req("4787-8")
@pytest.mark.req("5382-3")
@EACH_PROTOCOL
@EACH_MODE
def test_modes(gateway: Gateway, protocol: str, mode: int) -> None:
    gateway.filtering(mode)
    port = opened(gateway, protocol)
    assert knock(gateway, protocol, SERVER, 53, port) == "slow_inbound"
    assert knock(gateway, protocol, SERVER, 99, port) == ("slow_inbound" if mode >= BY_ADDRESS else "drop_filtered")
    assert knock(gateway, protocol, OTHER_SERVER, 53, port) == ("slow_inbound" if mode == OPEN else "drop_filtered")
    gateway.assert_tables_agree()


@pytest.mark.req("5382-3")
@EACH_PROTOCOL
def test_each_protocol_by_itself(gateway: Gateway, protocol: str) -> None:
    modes = (OPEN, BY_ADDRESS_AND_PORT, 0, 0) if protocol == "tcp" else (BY_ADDRESS_AND_PORT, OPEN, 0, 0)
    gateway.tables.set_settings(filtering=modes)
    for name in ("tcp", "udp"):
        ended = knock(gateway, name, OTHER_SERVER, 9, opened(gateway, name))
        assert ended == ("slow_inbound" if name == protocol else "drop_filtered")


@pytest.mark.req("7857-6")
@EACH_MODE
def test_a_mapping_admits_its_own_protocol_only(gateway: Gateway, mode: int) -> None:
    gateway.filtering(mode)
    port = opened(gateway, "udp")
    assert knock(gateway, "tcp", SERVER, 53, port) == "own_inbound"
    gateway.pool(icmp=((port, 1),))
    assert gateway.inbound(echo_reply(SERVER, GATEWAY, port)).ended == "own_inbound"


@EACH_MODE
def test_queries_are_never_open(gateway: Gateway, mode: int) -> None:
    gateway.filtering(mode)
    identifier = gateway.open(echo(HOST, SERVER, 9))
    assert gateway.inbound(echo_reply(OTHER_SERVER, GATEWAY, identifier)).ended == "own_inbound"


@EACH_PROTOCOL
@pytest.mark.parametrize("mode", [BY_ADDRESS, OPEN], ids=["address", "endpoint-independent"])
def test_the_answer_leaves_from_the_mapped_port(gateway: Gateway, protocol: str, mode: int) -> None:
    gateway.filtering(mode)
    port = opened(gateway, protocol)
    remote = SERVER if mode == BY_ADDRESS else OTHER_SERVER
    knock(gateway, protocol, remote, 99, port)
    row = gateway.session(HOST, 5000, protocol, remote, 99)
    assert row["out"]["marks"] == FROM_OUTSIDE
    answer = udp(HOST, 5000, remote, 99) if protocol == "udp" else tcp(HOST, 5000, remote, 99, SYN | ACK)
    result = gateway.outbound(answer)
    assert (result.port, result.counted) == (port, {})
    assert gateway.mappings == 1
    gateway.assert_tables_agree()


@EACH_PROTOCOL
def test_an_unmapped_port_is_the_gateways_own_in_every_mode(gateway: Gateway, protocol: str) -> None:
    for mode in MODES.values():
        gateway.filtering(mode)
        assert knock(gateway, protocol, SERVER, 53, 5000) == "own_inbound"
    port = opened(gateway, protocol)
    gateway.reap(gateway.slots(), 1)
    assert knock(gateway, protocol, SERVER, 53, port) == "own_inbound", "at rest"


@EACH_PROTOCOL
@pytest.mark.parametrize("mode", [BY_ADDRESS, OPEN], ids=["address", "endpoint-independent"])
def test_segments_that_open_nothing(gateway: Gateway, protocol: str, mode: int) -> None:
    gateway.filtering(mode)
    port = gateway.connect(HOST, 5000, SERVER, 53)
    before = len(gateway.slots())
    for flags in (RST, SYN | ACK, 0, SYN | RST):
        assert gateway.inbound(tcp(SERVER, 99, GATEWAY, port, flags)).verdict == "drop"
    assert len(gateway.slots()) == before


# --- whom a mapping has spoken to ------------------------------------------------------------------


def test_known_by_address_long_after_other_remotes(gateway: Gateway) -> None:
    gateway.filtering(BY_ADDRESS)
    port = opened(gateway, "udp")
    gateway.outbound(udp(HOST, 5000, OTHER_SERVER, 1))
    gateway.reap([slot for slot in gateway.slots() if slot != gateway.slot(HOST, 5000, "udp")], 1)
    assert knock(gateway, "udp", OTHER_SERVER, 2, port) == "slow_inbound", "the address, not the session, is known"


def test_forgotten_with_the_mappings_time(gateway: Gateway) -> None:
    gateway.filtering(BY_ADDRESS)
    port = opened(gateway, "udp")
    contacts = gateway.tables.maps["contacts"]
    ((keys, values),) = contacts.items(chunk=16384)
    for seconds, ended in ((299, "slow_inbound"), (301, "drop_filtered")):
        values[0]["seen_at"] = ago(seconds)
        contacts.set(keys[0], values[0])
        assert knock(gateway, "udp", SERVER, 1000 + seconds, port) == ended


def test_a_contact_of_the_ports_former_owner_is_no_contact(gateway: Gateway) -> None:
    gateway.filtering(BY_ADDRESS)
    gateway.pool(udp=((3000, 1),))
    opened(gateway, "udp")
    gateway.reap(gateway.slots(), 1)
    gateway.reap(gateway.slots(), 2)
    gateway.tables.sessions[65536 + 3000] = 0
    assert gateway.open(udp("192.168.0.3", 5000, OTHER_SERVER, 53)) == 3000
    assert knock(gateway, "udp", SERVER, 99, 3000) == "drop_filtered"


def test_nothing_is_remembered_in_other_modes(gateway: Gateway) -> None:
    for mode in (BY_ADDRESS_AND_PORT, OPEN):
        gateway.filtering(mode)
        opened(gateway, "udp")
        assert gateway.entries("contacts") == {}


@pytest.mark.req("7857-7")
@pytest.mark.parametrize("mode", [BY_ADDRESS, OPEN], ids=["address", "endpoint-independent"])
def test_a_refused_stranger_refreshes_nothing(gateway: Gateway, mode: int) -> None:
    """The host answers with a RST, or an ICMP error: its own session with another remote stays as old as it was."""
    from test_icmp_errors import icmp_error  # noqa: PLC0415

    gateway.filtering(mode)
    port = gateway.connect(HOST, 5000, SERVER, 53)
    udp_port = gateway.open(udp(HOST, 5000, SERVER, 53))
    rows = [gateway.session(HOST, 5000, protocol, SERVER, 53) for protocol in ("tcp", "udp")]
    for row in rows:
        age(row, 200)
    before = [row.tobytes()[:56] for row in rows]
    gateway.inbound(tcp(SERVER, 99, GATEWAY, port, SYN))
    gateway.outbound(tcp(HOST, 5000, SERVER, 99, RST | ACK, ack=1))
    gateway.inbound(udp(SERVER, 99, GATEWAY, udp_port))
    error = icmp_error(HOST, SERVER, udp(SERVER, 99, HOST, 5000), (3, 3))
    assert gateway.outbound(error).ended == "slow_icmp_error_outbound"
    assert [row.tobytes()[:56] for row in rows] == before
    assert gateway.session(HOST, 5000, "tcp", SERVER, 99)["out"]["tcp_seen"] & RST


def test_expired_and_knocked_at_again(gateway: Gateway) -> None:
    gateway.filtering(OPEN)
    port = opened(gateway, "udp")
    assert knock(gateway, "udp", OTHER_SERVER, 9, port) == "slow_inbound"
    age(gateway.session(HOST, 5000, "udp", OTHER_SERVER, 9), 301)
    result = gateway.inbound(udp(OTHER_SERVER, 9, GATEWAY, port))
    assert (result.ended, result.counted) == ("slow_inbound", {"session_reopened": 1})
    age(gateway.session(HOST, 5000, "udp", OTHER_SERVER, 9), 301)
    gateway.filtering(BY_ADDRESS_AND_PORT)
    assert gateway.inbound(udp(OTHER_SERVER, 9, GATEWAY, port)).ended == "drop_filtered"
