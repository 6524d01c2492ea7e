"""WAN to LAN through the slow path: who may come in."""

import socket

import pytest
from harness import (
    ACK,
    GATEWAY,
    GATEWAY_INSIDE,
    HOST,
    OTHER_SERVER,
    RST,
    SERVER,
    SYN,
    Gateway,
    echo,
    echo_reply,
    rebuilt,
    tcp,
    udp,
    wire,
)
from scapy.layers.inet import ICMP, IP, IPOption_RR
from scapy.packet import Packet, Raw


@pytest.mark.parametrize("payload", [b"", b"odd", bytes(1400)], ids=["empty", "odd", "large"])
def test_answers(gateway: Gateway, payload: bytes) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    packet = udp(SERVER, 53, GATEWAY, port, payload, ttl=1, tos=8)
    result = gateway.inbound(packet)
    assert (result.ended, result.counted) == ("slow_inbound", {})
    assert result.bytes == wire(rebuilt(packet, dst=HOST, dport=5000))

    port = gateway.open(tcp(HOST, 5000, SERVER, 80, SYN))
    packet = tcp(SERVER, 80, GATEWAY, port, SYN | ACK, payload=payload)
    assert gateway.inbound(packet).bytes == wire(rebuilt(packet, dst=HOST, dport=5000))

    identifier = gateway.open(echo(HOST, SERVER, 5000))
    packet = echo_reply(SERVER, GATEWAY, identifier, payload)
    assert gateway.inbound(packet).bytes == wire(rebuilt(packet, dst=HOST, id=5000))


def test_ip_options(gateway: Gateway) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    packet = udp(SERVER, 53, GATEWAY, port, options=[IPOption_RR(length=39, pointer=4, routers=["0.0.0.0"] * 9)])
    result = gateway.inbound(packet)
    assert result.bytes == wire(rebuilt(packet, dst=HOST, dport=5000))


@pytest.mark.req("5382-4")
def test_filtering_is_by_address_and_port(gateway: Gateway) -> None:
    """Silently: an answer from the gateway's stack would end a simultaneous open."""
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    for stranger in ((SERVER, 54), (OTHER_SERVER, 53), (OTHER_SERVER, 54), (SERVER, 0)):
        assert gateway.inbound(udp(*stranger, GATEWAY, port)).ended == "drop_filtered"
    port = gateway.connect(HOST, 5000, SERVER, 80)
    for stranger in ((SERVER, 81), (OTHER_SERVER, 80)):
        for flags in (SYN, SYN | ACK, ACK, RST):
            assert gateway.inbound(tcp(*stranger, GATEWAY, port, flags)).ended == "drop_filtered"
    identifier = gateway.open(echo(HOST, SERVER, 9))
    assert gateway.inbound(echo_reply(OTHER_SERVER, GATEWAY, identifier)).ended == "own_inbound"


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM], ids=["udp", "tcp"])
def test_a_service_started_on_a_mapped_port_is_reached(gateway: Gateway, kind: socket.SocketKind) -> None:
    udp_port, tcp_port = gateway.open(udp(HOST, 5000, SERVER, 53)), gateway.connect(HOST, 5000, SERVER, 80)
    port = udp_port if kind == socket.SOCK_DGRAM else tcp_port
    knock = (
        udp(OTHER_SERVER, 99, GATEWAY, port)
        if kind == socket.SOCK_DGRAM
        else tcp(OTHER_SERVER, 99, GATEWAY, port, SYN)
    )
    assert gateway.inbound(knock).ended == "drop_filtered"
    with socket.socket(socket.AF_INET, kind) as service:
        service.bind((GATEWAY, port))
        if kind == socket.SOCK_STREAM:
            service.listen()
        assert gateway.inbound(knock).ended == "own_inbound"


def test_unsolicited_is_the_gateways_own(gateway: Gateway) -> None:
    """No session: the gateway's own stack answers, or its firewall does. Nothing is opened."""
    for packet in (
        udp(SERVER, 53, GATEWAY, 5000),
        tcp(SERVER, 80, GATEWAY, 5000, SYN),
        echo_reply(SERVER, GATEWAY, 5000),
        echo(SERVER, GATEWAY, 5000),
        IP(src=SERVER, dst=GATEWAY) / ICMP(type=13) / Raw(bytes(12)),
        IP(src=SERVER, dst=GATEWAY, proto=47) / Raw(bytes(12)),
        udp("0.0.0.0", 0, GATEWAY, 0),
        udp(SERVER, 53, "203.0.113.2", 5000),
        udp(SERVER, 53, "224.0.0.251", 5353),
        udp(SERVER, 67, "255.255.255.255", 68),
    ):
        result = gateway.inbound(packet)
        assert (result.ended, result.counted) == ("own_inbound", {})
    assert gateway.slots() == []


def test_a_strangers_packet_refreshes_nothing(gateway: Gateway) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    before = gateway.session(HOST, 5000, "udp", SERVER, 53).tobytes()
    gateway.inbound(udp(OTHER_SERVER, 53, GATEWAY, port))
    assert gateway.session(HOST, 5000, "udp", SERVER, 53).tobytes() == before


def _to_internal(destination: str) -> list[Packet]:
    error = IP(src=SERVER, dst=destination) / ICMP(type=3, code=1) / udp(destination, 5000, SERVER, 53)
    return [
        udp(SERVER, 53, destination, 5000),
        tcp(SERVER, 80, destination, 5000, SYN),
        tcp(SERVER, 80, destination, 5000, ACK),
        echo(SERVER, destination, 5000),
        echo_reply(SERVER, destination, 5000),
        error,
        IP(src=SERVER, dst=destination) / ICMP(type=5) / udp(destination, 5000, SERVER, 53),
        IP(src=SERVER, dst=destination) / ICMP(type=13) / Raw(bytes(12)),
        IP(src=SERVER, dst=destination, proto=47) / Raw(bytes(12)),
        IP(src=SERVER, dst=destination, proto=17, frag=3) / Raw(bytes(12)),
        IP(src=SERVER, dst=destination, proto=17, flags="MF") / udp(SERVER, 53, destination, 5000).payload,
    ]


@pytest.mark.req("attacks-martian")
@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(packet, id=f"{packet.summary()} frag={packet.frag}")
        for destination in (HOST, GATEWAY_INSIDE)
        for packet in _to_internal(destination)
    ],
)
def test_addressed_to_an_internal_prefix(gateway: Gateway, packet: Packet) -> None:
    gateway.open(udp(HOST, 5000, SERVER, 53))
    assert gateway.inbound(packet).ended == "drop_destination_internal"
