"""The gateway's own traffic: untouched, except where it would collide with a session."""

import socket

import pytest
from harness import (
    ACK,
    FIN,
    GATEWAY,
    HOST,
    OTHER_SERVER,
    RST,
    SERVER,
    SYN,
    Gateway,
    age,
    echo,
    echo_reply,
    rebuilt,
    tcp,
    udp,
    wire,
)
from scapy.layers.inet import ICMP, IP
from scapy.packet import Packet, Raw


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(udp(GATEWAY, 53, SERVER, 5000), id="UDP"),
        *(
            pytest.param(tcp(GATEWAY, 22, SERVER, 5000, flags), id=f"TCP {flags:#x}")
            for flags in (SYN, ACK, FIN, RST, 0)
        ),
        pytest.param(echo_reply(GATEWAY, SERVER, 7), id="ping's answer"),
        pytest.param(IP(src=GATEWAY, dst=SERVER) / ICMP(type=13) / Raw(bytes(12)), id="ICMP timestamp"),
        pytest.param(IP(src=GATEWAY, dst=SERVER, proto=47) / Raw(bytes(12)), id="GRE"),
        pytest.param(IP(src=GATEWAY, dst=SERVER, frag=5) / Raw(bytes(12)), id="fragment"),
        pytest.param(
            IP(src=GATEWAY, dst=SERVER, flags="MF") / udp(GATEWAY, 1, SERVER, 2).payload, id="first fragment"
        ),
        pytest.param(IP(src=GATEWAY, dst="224.0.0.22", proto=2) / Raw(bytes(8)), id="IGMP"),
        pytest.param(udp("0.0.0.0", 68, "255.255.255.255", 67), id="DHCP without an address"),
        pytest.param(IP(src="0.0.0.0", dst="224.0.0.22", proto=2) / Raw(bytes(8)), id="IGMP without an address"),
    ],
)
def test_untouched(gateway: Gateway, packet: Packet) -> None:
    gateway.open(udp(HOST, 5000, SERVER, 53))
    result = gateway.outbound(packet, local=True)
    assert (result.ended, result.counted) == ("own_outbound", {})


@pytest.mark.parametrize("ethertype", ["0806", "86dd", "8863", "88cc", "0000"])
def test_not_ip(gateway: Gateway, ethertype: str) -> None:
    frame = bytes(12) + bytes.fromhex(ethertype) + wire(udp(HOST, 5000, SERVER, 53))
    assert gateway.outbound(frame).ended == "own_not_ip"
    assert gateway.inbound(frame).ended == "own_not_ip"
    assert gateway.fast_outbound(frame).ended == "up_not_ip"
    assert gateway.fast_inbound(frame).ended == "up_not_ip"


@pytest.mark.parametrize("source", ["10.9.9.9", "127.0.0.1", "169.254.7.7", "172.17.0.1"])
@pytest.mark.req("attacks-leak")
def test_a_private_address_of_its_own_does_not_leave(gateway: Gateway, source: str) -> None:
    assert gateway.outbound(udp(source, 53, SERVER, 5000), local=True).ended == "drop_source_private"


@pytest.mark.req("attacks-leak")
def test_sent_from_its_inner_address(gateway: Gateway) -> None:
    packet = udp("192.168.0.1", 5000, SERVER, 53)
    result = gateway.outbound(packet, local=True)
    assert result.bytes == wire(rebuilt(packet, src=GATEWAY, sport=result.port))


def _collide(gateway: Gateway, kind: str) -> tuple[Packet, Packet]:
    """A host's live session, and the packet of an own socket over the very same endpoints outside."""
    if kind == "udp":
        port = gateway.open(udp(HOST, 5000, SERVER, 53))
        return udp(GATEWAY, port, SERVER, 53), udp(SERVER, 53, GATEWAY, port)
    port = gateway.connect(HOST, 5000, SERVER, 80)
    return tcp(GATEWAY, port, SERVER, 80, SYN), tcp(SERVER, 80, GATEWAY, port, ACK)


@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_own_socket_over_a_live_session_is_translated(gateway: Gateway, kind: str) -> None:
    own, answer = _collide(gateway, kind)
    port = own.sport
    result = gateway.outbound(own, local=True)
    assert result.ended == "slow_outbound"
    assert result.port != port
    assert result.bytes == wire(rebuilt(own, src=GATEWAY, sport=result.port))
    assert gateway.inbound(answer).ip.dst == HOST, "the host's session is its own"
    back = rebuilt(answer, dport=result.port)
    assert gateway.inbound(back).bytes == wire(rebuilt(back, dst=GATEWAY, dport=port))


@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_it_stays_translated_when_the_other_session_ends(gateway: Gateway, kind: str) -> None:
    own, _ = _collide(gateway, kind)
    port = gateway.outbound(own, local=True).port
    age(gateway.session(HOST, 5000, kind, SERVER, own.dport), 7441)
    assert gateway.outbound(own, local=True).port == port


def test_own_socket_beside_a_session_with_another_remote(gateway: Gateway) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind((GATEWAY, port))
        assert gateway.outbound(udp(GATEWAY, port, OTHER_SERVER, 53), local=True).ended == "own_outbound"
        assert gateway.inbound(udp(OTHER_SERVER, 53, GATEWAY, port)).ended == "own_inbound"


def test_own_socket_over_an_expired_session(gateway: Gateway) -> None:
    own, answer = _collide(gateway, "udp")
    age(gateway.session(HOST, 5000, "udp", SERVER, 53), 301)
    assert gateway.outbound(own, local=True).ended == "own_outbound"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as socket_of_its_own:
        socket_of_its_own.bind((GATEWAY, own.sport))
        assert gateway.inbound(answer).ended == "own_inbound"


def test_own_ping_keeps_its_identifier(gateway: Gateway) -> None:
    packet = echo(GATEWAY, SERVER, 77)
    result = gateway.outbound(packet, local=True)
    assert result.bytes == wire(packet)
    answer = echo_reply(SERVER, GATEWAY, 77)
    assert gateway.inbound(answer).bytes == wire(answer)


def test_own_ping_beside_a_hosts_with_the_same_identifier(gateway: Gateway) -> None:
    taken = gateway.open(echo(HOST, SERVER, 5))
    result = gateway.outbound(echo(GATEWAY, SERVER, taken), local=True)
    assert result.port != taken
    answer = gateway.inbound(echo_reply(SERVER, GATEWAY, result.port))
    assert (answer.ip.dst, answer.ip[ICMP].id) == (GATEWAY, taken)
    assert gateway.inbound(echo_reply(SERVER, GATEWAY, taken)).ip.dst == HOST


def test_a_second_address_of_its_own_is_left_alone(gateway: Gateway) -> None:
    from ipaddress import IPv4Network  # noqa: PLC0415

    from xdpmasq.abi import PREFIX_OWN  # noqa: PLC0415

    second = "203.0.113.2"
    key = (32, ([int.from_bytes(IPv4Network(second).network_address.packed, "little")],))
    gateway.tables.maps["prefixes"].set(key, PREFIX_OWN)
    for packet in (udp(second, 5000, SERVER, 53), echo(second, SERVER, 5), tcp(second, 22, SERVER, 9, ACK)):
        assert gateway.outbound(packet, local=True).ended == "own_outbound"
