"""Redirects: what a LAN sends to others, or the Internet to us, is answered by the gateway itself, unseen."""

import socket
from ipaddress import IPv4Network
from typing import Any

import numpy as np
import pytest
from harness import (
    ACK,
    FIN,
    GATEWAY,
    GATEWAY_INSIDE,
    HOST,
    OTHER_HOST,
    OTHER_SERVER,
    RST,
    SERVER,
    SYN,
    TICKS,
    Gateway,
    echo,
    rebuilt,
    tcp,
    udp,
    wire,
)
from scapy.layers.inet import ICMP, IP, fragment
from scapy.packet import Packet, Raw

from xdpmasq import bpf, redirecting, redirects

MAKE: dict[str, Any] = {"tcp": tcp, "udp": udp}
EACH_PROTOCOL = pytest.mark.parametrize("protocol", list(MAKE))
MODEM = "192.168.100.1"


def call(protocol: str, remote: str = SERVER, port: int = 80, sport: int = 5000, host: str = HOST) -> Packet:
    """The first packet of a connection from inside."""
    return MAKE[protocol](host, sport, remote, port, **({"flags": SYN} if protocol == "tcp" else {}))


def answer(protocol: str, sport: int = 3128, dport: int = 5000, host: str = HOST) -> Packet:
    """What the gateway's socket sends."""
    flags = {"flags": SYN | ACK} if protocol == "tcp" else {}
    return MAKE[protocol](GATEWAY_INSIDE, sport, host, dport, **flags)


def redirect(gateway: Gateway, *words: Any, **more: Any) -> redirects.Redirect:
    gateway.serve_redirects()
    return gateway.put(redirects.parse(*words, **more))


def age(gateway: Gateway, seconds: float) -> None:
    """Makes every redirected connection last seen so long ago."""
    table = gateway.tables.maps["redirects"]
    for keys, values in table.items(chunk=table.max_entries):
        values["last_seen"] = (bpf.jiffies() - int(seconds * TICKS)) % 2**32
        for key, value in zip(keys, values, strict=True):
            table.set(key, value)


# --- on a LAN --------------------------------------------------------------------------------------


@EACH_PROTOCOL
def test_there_and_back(gateway: Gateway, protocol: str) -> None:
    """The gateway's socket sees the client, the client whom it has called."""
    redirect(gateway, protocol, "80", "3128", "lan")
    packet = call(protocol)
    result = gateway.lan_in(packet)
    assert (result.ended, result.counted) == ("slow_redirected", {"redirect_opened": 1})
    assert result.bytes == wire(rebuilt(packet, dst=GATEWAY_INSIDE, dport=3128))
    back = gateway.lan_out(answer(protocol))
    assert (back.ended, back.counted) == ("slow_redirected_answer", {})
    assert back.bytes == wire(rebuilt(answer(protocol), src=SERVER, sport=80))
    assert gateway.lan_in(packet).counted == {}
    assert gateway.slots() == []


@pytest.mark.parametrize(("port", "local"), [(5000, 6000), (5003, 6003), (5010, 6010)])
def test_a_range_shifts_its_ports(gateway: Gateway, port: int, local: int) -> None:
    redirect(gateway, "udp", "5000-5010", "6000", "lan")
    assert gateway.lan_in(call("udp", port=port)).ip.dport == local
    for outside in (4999, 5011):
        assert gateway.lan_in(call("udp", port=outside)).verdict == "pass"


@pytest.mark.parametrize(
    ("packet", "more"),
    [
        pytest.param(call("udp", port=81), {}, id="another port"),
        pytest.param(call("tcp"), {}, id="another protocol"),
        pytest.param(call("udp", GATEWAY_INSIDE), {}, id="to the gateway"),
        pytest.param(call("udp", GATEWAY), {}, id="to the gateway's external address"),
        pytest.param(call("udp", "10.9.9.9"), {}, id="to another address of the gateway"),
        pytest.param(call("udp", OTHER_HOST), {}, id="within the LAN"),
        pytest.param(call("udp", "192.168.0.255"), {}, id="broadcast"),
        pytest.param(call("udp", "239.1.2.3"), {}, id="multicast"),
        pytest.param(call("udp", host="198.51.100.9"), {}, id="a foreign source"),
        pytest.param(call("udp"), {"not_to": ["203.0.113.0/24"]}, id="a spared destination"),
        pytest.param(call("udp"), {"source": OTHER_HOST}, id="for another host"),
        pytest.param(echo(HOST, SERVER, 80), {}, id="no ports"),
    ],
)
def test_left_alone(gateway: Gateway, packet: Packet, more: dict[str, Any]) -> None:
    redirecting.spare(gateway.tables, redirecting.EVERY_RULE, [IPv4Network("10.9.9.9")])
    redirect(gateway, "udp", "80", "3128", "lan", **more)
    result = gateway.lan_in(packet)
    assert (result.verdict, result.ended) == ("pass", "")


@pytest.mark.parametrize(
    ("packet", "more"),
    [
        (call("udp", OTHER_SERVER), {"not_to": ["203.0.113.0/24"]}),
        (call("udp"), {"source": HOST}),
        (call("udp", MODEM), {}),
    ],
)
def test_not_left_alone(gateway: Gateway, packet: Packet, more: dict[str, Any]) -> None:
    redirect(gateway, "udp", "80", "3128", "lan", **more)
    assert gateway.lan_in(packet).ended == "slow_redirected"


def test_the_narrower_source_wins(gateway: Gateway) -> None:
    redirect(gateway, "udp", "80", "3128", "lan")
    redirect(gateway, "udp", "80", "3129", "lan", source=OTHER_HOST)
    assert gateway.lan_in(call("udp")).ip.dport == 3128
    assert gateway.lan_in(call("udp", host=OTHER_HOST)).ip.dport == 3129


def test_nothing_before_answers_can_come_back(gateway: Gateway) -> None:
    """The agent has not attached what brings them back."""
    gateway.put(redirects.parse("udp", "80", "3128", "lan"))
    assert gateway.lan_in(call("udp")).verdict == "pass"


@EACH_PROTOCOL
def test_one_client_port_to_two_remotes(gateway: Gateway, protocol: str) -> None:
    """The gateway's socket could not tell them apart, so the second gets another source port, there and back."""
    redirect(gateway, protocol, "80", "3128", "lan")
    assert gateway.lan_in(call(protocol)).ip.sport == 5000
    second = gateway.lan_in(call(protocol, OTHER_SERVER))
    assert second.ended == "slow_redirected"
    assert (second.ip.src, second.ip.dst, second.ip.dport) == (HOST, GATEWAY_INSIDE, 3128)
    port = second.ip.sport
    assert port not in (0, 5000)
    for local, remote in ((5000, SERVER), (port, OTHER_SERVER)):
        back = gateway.lan_out(answer(protocol, dport=local))
        assert back.bytes == wire(rebuilt(answer(protocol, dport=local), src=remote, sport=80, dport=5000))
    assert gateway.lan_in(call(protocol, OTHER_SERVER)).ip.sport == port


def test_a_client_that_is_there_already(gateway: Gateway) -> None:
    """It speaks with the gateway's port itself, from the port of which another call is redirected there."""
    redirect(gateway, "tcp", "80", "3128", "lan")
    with socket.socket() as direct:
        direct.setblocking(False)
        direct.bind((GATEWAY_INSIDE, 3128))
        direct.connect_ex((HOST, 5000))
        assert gateway.lan_in(call("tcp")).ip.sport not in (0, 5000)
    assert gateway.lan_in(call("tcp", sport=5001)).ip.sport == 5001


@EACH_PROTOCOL
def test_an_ended_one_gives_its_place(gateway: Gateway, protocol: str) -> None:
    redirect(gateway, protocol, "80", "3128", "lan")
    gateway.lan_in(call(protocol))
    age(gateway, 301)
    assert gateway.lan_out(answer(protocol)).verdict == "pass"
    assert gateway.lan_in(call(protocol, OTHER_SERVER)).ip.sport == 5000
    again = gateway.lan_in(call(protocol))
    assert (again.ended, again.counted) == ("slow_redirected", {"redirect_opened": 1})
    assert again.ip.sport != 5000
    assert gateway.lan_out(answer(protocol)).ip.src == OTHER_SERVER


@pytest.mark.parametrize(
    ("handshake", "end", "idle_s", "alive"),
    [
        pytest.param(False, None, 239, True, id="half open"),
        pytest.param(False, None, 241, False, id="half open for long"),
        pytest.param(True, None, 7439, True, id="established"),
        pytest.param(True, None, 7441, False, id="established for very long"),
        pytest.param(True, FIN | ACK, 241, False, id="closed"),
        pytest.param(True, RST, 241, False, id="reset"),
    ],
)
def test_tcp_timers(gateway: Gateway, handshake: bool, end: int | None, idle_s: int, alive: bool) -> None:
    redirect(gateway, "tcp", "80", "3128", "lan")
    gateway.lan_in(call("tcp"))
    if handshake:
        gateway.lan_out(answer("tcp"))
        gateway.lan_in(tcp(HOST, 5000, SERVER, 80, ACK))
    if end:
        gateway.lan_in(tcp(HOST, 5000, SERVER, 80, end))
        gateway.lan_out(tcp(GATEWAY_INSIDE, 3128, HOST, 5000, end))
    age(gateway, idle_s)
    redirecting.forget(gateway.tables)
    left = int(alive)
    assert (len(gateway.entries("redirects")), len(gateway.entries("answers"))) == (left, left)


@pytest.mark.parametrize(
    ("flags", "ended"),
    [(SYN, "slow_redirected"), (ACK, "slow_redirected"), (FIN | ACK, "drop_tcp_no_session"), (0, "drop_tcp_flags")],
)
def test_what_opens(gateway: Gateway, flags: int, ended: str) -> None:
    redirect(gateway, "tcp", "80", "3128", "lan")
    assert gateway.lan_in(tcp(HOST, 5000, SERVER, 80, flags)).ended == ended


def test_connections_that_run_go_on(gateway: Gateway) -> None:
    gateway.connect(HOST, 5000, SERVER, 80)
    redirect(gateway, "tcp", "80", "3128", "lan")
    for flags in (ACK, FIN | ACK, SYN | ACK):
        assert gateway.lan_in(tcp(HOST, 5000, SERVER, 80, flags)).verdict == "pass"
    assert gateway.lan_in(tcp(HOST, 5000, OTHER_SERVER, 80, SYN)).ended == "slow_redirected"


def test_what_came_from_outside_is_answered(gateway: Gateway) -> None:
    """An internal server's answer is no call, though its remote's port is one that is redirected."""
    gateway.forward("udp", 53, (HOST, 53))
    gateway.inbound(udp(SERVER, 53, GATEWAY, 53))
    redirect(gateway, "udp", "53", "53", "lan")
    assert gateway.lan_in(udp(HOST, 53, SERVER, 53)).verdict == "pass"


@EACH_PROTOCOL
def test_armed_flows_do_not_pass_by(gateway: Gateway, protocol: str) -> None:
    """A new redirect disarms; and a new connection over the endpoints of an old one does."""
    gateway.accelerate()
    packet = udp(HOST, 5000, SERVER, 80) if protocol == "udp" else tcp(HOST, 5000, SERVER, 80, ACK, seq=101, ack=501)
    if protocol == "tcp":
        gateway.connect(HOST, 5000, SERVER, 80)
    gateway.outbound(packet)
    assert gateway.fast_outbound(packet).ended == "fast_outbound"
    redirect(gateway, protocol, "80", "3128", "lan")
    assert gateway.fast_outbound(packet).ended == "up_not_armed"
    gateway.outbound(packet)  # as a running TCP connection does
    assert gateway.lan_in(call(protocol)).ended == "slow_redirected"
    assert gateway.fast_outbound(packet).ended == "up_not_armed"


def test_deleted(gateway: Gateway) -> None:
    """Running ones go on, unless they are ended; new ones are not made."""
    rule = redirect(gateway, "udp", "80", "3128", "lan", not_to=["198.51.100.0/24"])
    gateway.lan_in(call("udp"))
    assert redirecting.running(gateway.tables)[0] == 1
    gateway.withdraw(rule)
    assert gateway.lan_in(call("udp")).ended == "slow_redirected"
    assert gateway.lan_in(call("udp", sport=5001)).verdict == "pass"
    assert redirecting.end(gateway.tables, 0) == 1
    for name in ("redirects", "answers", "forwards", "spared"):
        assert gateway.entries(name) == {}
    assert gateway.lan_in(call("udp")).verdict == "pass"


def test_no_room(gateway: Gateway) -> None:
    """Refused rather than let by: a proxy may be there for a policy."""
    redirect(gateway, "udp", "80", "3128", "lan")
    table = gateway.tables.maps["redirects"]
    key, value = np.zeros((), table.key), np.zeros((), table.value)
    for number in range(table.max_entries):
        key["client"]["word"] = number
        table.set(key, value)
    assert gateway.lan_in(call("udp")).ended == "drop_redirects_full"
    assert gateway.entries("answers") == {}
    age(gateway, 301)
    redirecting.forget(gateway.tables)
    assert gateway.lan_in(call("udp")).ended == "slow_redirected"


def test_fragments(gateway: Gateway) -> None:
    """The later ones follow the first, both ways; what overtakes it is not let out to the Internet."""
    redirect(gateway, "udp", "80", "3128", "lan")
    for packet, send, ended, changes in (
        (udp(HOST, 5000, SERVER, 80, bytes(3000), id=7), gateway.lan_in, "slow_redirected", {"dst": GATEWAY_INSIDE}),
        (
            udp(GATEWAY_INSIDE, 3128, HOST, 5000, bytes(3000), id=8),
            gateway.lan_out,
            "slow_redirected_answer",
            {"src": SERVER},
        ),
    ):
        first, *later = fragment(packet, fragsize=1400)
        begun = send(first)
        assert begun.ended == ended
        for piece in later:
            result = send(piece)
            piece.id = begun.ip.id  # an answer's is another than the gateway gave it
            assert result.ended == ended
            assert result.bytes == wire(rebuilt(piece, **changes))


def test_a_fragment_that_overtakes_its_first(gateway: Gateway) -> None:
    redirect(gateway, "udp", "80", "3128", "lan")
    first, second = fragment(udp(HOST, 5000, SERVER, 80, bytes(2000), id=9), fragsize=1400)
    assert gateway.lan_in(second).verdict == "pass"
    assert gateway.lan_in(first).ended == "slow_redirected"
    assert gateway.outbound(second).ended == "drop_fragment_orphan"


def test_an_identification_that_comes_again(gateway: Gateway) -> None:
    """A redirected datagram's, then one's that goes out: its pieces do not go to where the redirect led."""
    redirect(gateway, "udp", "80", "3128", "lan")
    redirected, _ = fragment(udp(HOST, 5000, SERVER, 80, bytes(2000), id=9), fragsize=1400)
    first, second = fragment(udp(HOST, 5000, SERVER, 53, bytes(2000), id=9), fragsize=1400)
    assert gateway.lan_in(redirected).ended == "slow_redirected"
    assert gateway.outbound(first).ended == "slow_outbound"
    result = gateway.outbound(second)
    assert (result.ended, result.ip.src, result.ip.dst) == ("slow_fragment_outbound", GATEWAY, SERVER)


def unreachable(src: str, dst: str, quoted: Packet) -> Packet:
    return IP(src=src, dst=dst) / ICMP(type=3, code=3) / Raw(wire(quoted)[:64])


@EACH_PROTOCOL
@pytest.mark.parametrize("moved", [False, True], ids=["own port", "another client port"])
def test_icmp_errors(gateway: Gateway, protocol: str, moved: bool) -> None:
    """About a packet to the gateway, and about one of its answers: both sides find what they sent in the quote."""
    redirect(gateway, protocol, "80", "3128", "lan")
    if moved:
        gateway.lan_in(call(protocol, OTHER_SERVER))
    port = gateway.lan_in(call(protocol)).ip.sport
    assert (port != 5000) == moved

    told = gateway.lan_out(
        unreachable(GATEWAY_INSIDE, HOST, rebuilt(call(protocol), dst=GATEWAY_INSIDE, sport=port, dport=3128))
    )
    assert (told.ended, told.ip.src, told.ip.dst) == ("slow_redirected_answer", SERVER, HOST)
    assert told.bytes[28:] == wire(call(protocol))[:64]

    got = rebuilt(answer(protocol), src=SERVER, sport=80)
    told = gateway.lan_in(unreachable(HOST, SERVER, got))
    assert (told.ended, told.ip.src, told.ip.dst) == ("slow_redirected", HOST, GATEWAY_INSIDE)
    assert told.bytes[28:] == wire(answer(protocol, dport=port))[:64]


@pytest.mark.parametrize("quoted", [call("udp", port=81), call("udp", OTHER_SERVER)])
def test_other_icmp_errors(gateway: Gateway, quoted: Packet) -> None:
    redirect(gateway, "udp", "80", "3128", "lan")
    gateway.lan_in(call("udp"))
    assert gateway.lan_out(unreachable(GATEWAY_INSIDE, HOST, quoted)).verdict == "pass"
    back = udp(quoted.dst, quoted.dport, HOST, 5000)
    assert gateway.lan_in(unreachable(HOST, quoted.dst, back)).verdict == "pass"


# --- on the WAN ------------------------------------------------------------------------------------


def knock(protocol: str, port: int = 80, remote: str = SERVER, sport: int = 7000) -> Packet:
    flags = {"flags": SYN} if protocol == "tcp" else {}
    return MAKE[protocol](remote, sport, GATEWAY, port, **flags)


@EACH_PROTOCOL
def test_from_outside(gateway: Gateway, protocol: str) -> None:
    gateway.put(redirects.parse(protocol, "80-81", "8080", "wan"))
    for port, local in ((80, 8080), (81, 8081)):
        result = gateway.inbound(knock(protocol, port))
        assert (result.ended, result.counted) == ("slow_inbound", {"forward_opened": 1, "session_opened": 1})
        assert result.bytes == wire(rebuilt(knock(protocol, port), dport=local))
        flags = {"flags": SYN | ACK} if protocol == "tcp" else {}
        own = MAKE[protocol](GATEWAY, local, SERVER, 7000, **flags)
        back = gateway.outbound(own, local=True)
        assert (back.ended, back.bytes) == ("slow_outbound", wire(rebuilt(own, sport=port)))
        gateway.assert_tables_agree()
    assert gateway.inbound(knock(protocol, 82)).ended == "own_inbound"
    other = MAKE[protocol](GATEWAY, 8080, OTHER_SERVER, 7000)
    assert gateway.outbound(other, local=True).ended == "own_outbound"


def test_from_some_outside(gateway: Gateway) -> None:
    """A forward may have the port for the others."""
    gateway.forward("udp", 80, (HOST, 80))
    gateway.put(redirects.parse("udp", "80", "8080", "wan", source="198.51.100.0/24"))
    assert gateway.inbound(knock("udp")).ip.dst == HOST
    result = gateway.inbound(knock("udp", remote=OTHER_SERVER))
    assert (result.ip.dst, result.ip.dport) == (GATEWAY, 8080)


def test_two_ports_to_one_do_not_mix_up(gateway: Gateway) -> None:
    """From one remote endpoint: the gateway's socket could not tell them apart, so the second is refused."""
    gateway.put(redirects.parse("udp", "80", "8080", "wan"))
    gateway.put(redirects.parse("udp", "8000", "8080", "wan"))
    assert gateway.inbound(knock("udp")).ended == "slow_inbound"
    assert gateway.inbound(knock("udp", 8000)).ended == "drop_reply_taken"
    assert gateway.inbound(knock("udp", 8000, sport=7001)).ended == "slow_inbound"


def test_from_outside_the_gateways_errors(gateway: Gateway) -> None:
    gateway.put(redirects.parse("udp", "80", "8080", "wan"))
    gateway.inbound(knock("udp"))
    result = gateway.outbound(unreachable(GATEWAY, SERVER, rebuilt(knock("udp"), dport=8080)), local=True)
    assert (result.ended, result.bytes[28:]) == ("slow_icmp_error_outbound", wire(knock("udp"))[:64])


@EACH_PROTOCOL
def test_from_inside_the_external_address_stays_the_gateways(gateway: Gateway, protocol: str) -> None:
    gateway.put(redirects.parse(protocol, "80", "8080", "wan"))
    assert gateway.lan_in(call(protocol, GATEWAY)).verdict == "pass"
    assert gateway.lo_out(MAKE[protocol](GATEWAY, 5000, GATEWAY, 80)).verdict == "pass"
