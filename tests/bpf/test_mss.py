"""MSS clamping: the option of SYNs is lowered where it is more than the way takes, wherever it stands."""

import pytest
from harness import ACK, FIN, GATEWAY, HOST, SERVER, SYN, Gateway, rebuilt, tcp, wire
from scapy.layers.inet import IP, TCP
from scapy.packet import Packet, Raw

NOP = ("NOP", None)
TIMES = ("Timestamp", (1, 0))
LISTS = {
    "alone": ["mss"],
    "first": ["mss", ("SAckOK", b""), TIMES, NOP, ("WScale", 7)],
    "last": [TIMES, NOP, ("WScale", 7), "mss"],
    "at an odd place": [NOP, "mss"],
    "at an odd place, late": [NOP, ("WScale", 7), ("SAckOK", b""), NOP, "mss"],
    "after 11 no-operations": [NOP] * 11 + ["mss"],
    "after 36, the last that there is room for": [NOP] * 36 + ["mss"],
    "twice": ["mss", NOP],
}


def with_options(packet: Packet, options: list[object], mss: int, payload: bytes = b"") -> Packet:
    packet[TCP].options = [("MSS", mss) if each == "mss" else each for each in options]
    return IP(wire(packet / Raw(payload) if payload else packet))


@pytest.fixture
def clamped(gateway: Gateway) -> Gateway:
    gateway.tables.set_interface(gateway.bench.wan, "wan", xdp_from=True, xdp_to=True, mss=1400)
    return gateway


@pytest.mark.parametrize("mss", [65535, 8960, 1460, 1401, 1400, 1399, 536, 1, 0])
@pytest.mark.parametrize("options", LISTS.values(), ids=LISTS)
def test_both_ways(clamped: Gateway, options: list[object], mss: int) -> None:
    packet = with_options(tcp(HOST, 5000, SERVER, 80, SYN), options, mss)
    expected = with_options(tcp(HOST, 5000, SERVER, 80, SYN), options, min(mss, 1400))
    out = _uncounted(clamped, packet, outbound=True)
    assert out == wire(rebuilt(expected, src=GATEWAY, sport=IP(out).sport))
    port = IP(out).sport
    packet = with_options(tcp(SERVER, 80, GATEWAY, port, SYN | ACK), options, mss)
    expected = with_options(tcp(SERVER, 80, GATEWAY, port, SYN | ACK), options, min(mss, 1400))
    assert _uncounted(clamped, packet, outbound=False) == wire(rebuilt(expected, dst=HOST, dport=5000))


def _uncounted(gateway: Gateway, packet: Packet, *, outbound: bool) -> bytes:
    result = gateway.outbound(packet) if outbound else gateway.inbound(packet)
    assert result.ended == ("slow_outbound" if outbound else "slow_inbound")
    return result.bytes


@pytest.mark.parametrize(("flags", "changed"), [(SYN, True), (SYN | ACK, True), (ACK, False), (FIN | ACK, False)])
def test_only_segments_that_open(clamped: Gateway, flags: int, changed: bool) -> None:
    port = clamped.connect(HOST, 5000, SERVER, 80)
    packet = with_options(tcp(SERVER, 80, GATEWAY, port, flags), ["mss"], 1460)
    result = clamped.inbound(packet)
    assert (result.bytes[42:44] == (1400).to_bytes(2, "big")) == changed


RAW = {
    "none": b"",
    "end of the list before it": b"\x00\x02\x04\x05\xb4\x00\x00\x00",
    "length 0": b"\x99\x00\x02\x04\x05\xb4\x00\x00",
    "length 1": b"\x99\x01\x02\x04\x05\xb4\x00\x00",
    "an option longer than the header": b"\x99\x22\x02\x04\x05\xb4\x00\x00",
    "MSS of 3 bytes": b"\x02\x03\x05\xb4\x00\x00\x00\x00",
    "MSS of 5 bytes": b"\x02\x05\x05\xb4\x00\x00\x00\x00",
    "cut off by the header's end": b"\x01\x01\x01\x01\x01\x01\x02\x04",
    "in another option's value": b"\x99\x08\x02\x04\x05\xb4\x00\x00",
}


@pytest.mark.req("attacks-truncated")
@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
def test_lists_without_an_option_to_lower(clamped: Gateway, raw: bytes) -> None:
    """Also none in the data that follows."""
    segment = bytearray(wire(tcp(HOST, 5000, SERVER, 80, SYN))[20:])
    segment[12] = (5 + len(raw) // 4) << 4
    packet = wire(IP(src=HOST, dst=SERVER, proto=6) / Raw(bytes(segment) + raw + b"\x05\xb4\x02\x04\x05\xb4"))
    result = clamped.outbound(Raw(packet))
    assert result.ended == "slow_outbound"
    assert result.bytes[40:] == packet[40:]


def test_never_where_it_is_not_wanted(gateway: Gateway) -> None:
    packet = with_options(tcp(HOST, 5000, SERVER, 80, SYN), ["mss"], 65535)
    result = gateway.outbound(packet)
    assert result.bytes == wire(rebuilt(packet, src=GATEWAY, sport=result.port))


def test_of_a_forwards_session(clamped: Gateway) -> None:
    clamped.forward("tcp", 8080, (HOST, 80))
    result = clamped.inbound(with_options(tcp(SERVER, 7000, GATEWAY, 8080, SYN), ["mss"], 1460))
    assert dict(result.ip[TCP].options)["MSS"] == 1400
    result = clamped.outbound(with_options(tcp(HOST, 80, SERVER, 7000, SYN | ACK), ["mss"], 1460))
    assert dict(result.ip[TCP].options)["MSS"] == 1400
