"""What Linux has for a router goes on working beside xdpmasq: each piece with a real use of it, in both modes.

::

    a-box .2 ─┐                                                               ┌─ .10 .11 internet: echo, nginx
    b-box .3 ─┼─ lan0 192.168.0.1 [prerouting, route, forward] wan0 [qdisc] ──┤
    c-box .4 ─┘                       masq-gate                               └─ .254 transit ─ far: echo

What the forward chain does to flows under way is in test_firewall.py; here it is about who gets out, and how.
"""

import contextlib
import json
import re
import select
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from netkit import (
    CURL,
    ECHO,
    GATE,
    Gateway,
    answers,
    ask,
    chain,
    internal,
    read,
    rules,
    soon,
    who,
)

from xdpmasq.lab import netns
from xdpmasq.lab.servers import ECHO_PORT
from xdpmasq.lab.topology import FAR, HOSTS, INTERNET, INTERNET_TOO, PUBLIC

FAR_ECHO = (FAR, ECHO_PORT)
IP_RECVERR, MSG_ERRQUEUE = 11, 0x2000  # linux/in.h, linux/socket.h
CLOSED_PORT = 9


def mac(gateway: Gateway, role: str) -> bytes:
    text = gateway.lab.exec(role, ["cat", "/sys/class/net/eth0/address"]).stdout
    return bytes.fromhex(text.strip().replace(":", ""))


def told(gateway: Gateway, box: str, server: tuple[str, int]) -> tuple[int, int, str] | None:
    """Type, code and sender of the ICMP error that answers a datagram from a box, or None when none does."""
    with gateway.udp(box) as client:
        client.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        client.connect(server)
        client.send(b"may I?")
        waiting = select.poll()
        waiting.register(client, select.POLLIN)
        if not any(event & select.POLLERR for _, event in waiting.poll(500)):
            return None
        _, ((_, _, error),), _, _ = client.recvmsg(100, 512, MSG_ERRQUEUE)
    _, _, icmp_type, code = struct.unpack_from("=IBBB", error)  # struct sock_extended_err
    return icmp_type, code, socket.inet_ntoa(error[20:24])


def counted(gateway: Gateway) -> dict[str, int]:
    """Packets that came by each commented rule with a counter of the table test."""
    listed = json.loads(gateway.gate("nft", "-j", "list", "table", "inet", "test"))["nftables"]
    found = {}
    for rule in (each["rule"] for each in listed if "rule" in each):
        for expression in rule["expr"]:
            if isinstance(expression, dict) and "counter" in expression and "comment" in rule:
                found[rule["comment"]] = int(expression["counter"]["packets"])
    return found


# --- who gets out ----------------------------------------------------------------------------------

DENIALS = {
    "drop": ("drop", TimeoutError),
    "reset": ("reject with tcp reset", ConnectionRefusedError),
    "icmp": ("reject with icmp type host-unreachable", OSError),
}


@pytest.mark.parametrize(("verdict", "error"), DENIALS.values(), ids=DENIALS)
def test_a_denied_connection_leaves_no_trace_outside(
    gateway: Gateway, servers: object, verdict: str, error: type[OSError]
) -> None:
    """The sender sees the rule's answer; on the WAN nothing is sent, and no session or port is spent."""
    with (
        rules(gateway, chain(f"ip saddr {HOSTS['b-box']} tcp dport 80 {verdict}")),
        gateway.lab.capture("exchange", GATE, f"host {INTERNET}") as wire,
        gateway.counting() as grown,
    ):
        with pytest.raises(error):
            gateway.tcp("b-box", (INTERNET, 80), timeout_s=0.5)
        assert [frame for frame in wire.stop() if frame[12:14] == b"\x08\x00"] == []
    assert (grown["session_opened"], grown["mapping_opened"]) == (0, 0)
    gateway.tcp("b-box", (INTERNET, 80)).close()


REJECTIONS = {"net-unreachable": 0, "host-unreachable": 1, "prot-unreachable": 2, "port-unreachable": 3,
              "net-prohibited": 9, "host-prohibited": 10, "admin-prohibited": 13}  # fmt: skip


def test_reject_answers_with_the_type_it_names(gateway: Gateway) -> None:
    """From the gateway's LAN address, about a packet that the box knows as its own: untranslated."""
    for name, code in REJECTIONS.items():
        with rules(gateway, chain(f'oifname "wan0" udp dport 7 reject with icmp type {name}')):
            assert told(gateway, "a-box", ECHO) == (3, code, "192.168.0.1"), name
    assert told(gateway, "a-box", ECHO) is None


@pytest.mark.req("5508-9")
def test_icmp_can_be_kept_out(gateway: Gateway) -> None:
    assert told(gateway, "a-box", (INTERNET, CLOSED_PORT)) == (3, 3, INTERNET)
    with rules(gateway, chain('iifname "wan0" icmp type destination-unreachable counter drop comment "kept"')):
        assert told(gateway, "a-box", (INTERNET, CLOSED_PORT)) is None
        assert counted(gateway) == {"kept": 1}
        assert gateway.opens("a-box")
    with rules(gateway, chain('iifname "lan0" icmp type echo-request counter drop comment "kept"')):
        ping = ["ping", "-n", "-c1", "-W1", INTERNET]
        assert gateway.lab.exec("a-box", ping, check=False).returncode == 1
        assert counted(gateway) == {"kept": 1}


def test_a_mac_filter(gateway: Gateway) -> None:
    """It sees the box's own MAC, also when the box tries with another address."""
    address = "192.168.0.33"
    with rules(gateway, chain(f"ether saddr {mac(gateway, 'b-box').hex(':')} drop")):
        assert not gateway.opens("b-box")
        assert gateway.opens("a-box")
        gateway.lab.exec("b-box", ["ip", "address", "add", f"{address}/24", "dev", "eth0"])
        try:
            with gateway.udp("b-box", address=address) as client:
                assert not answers(client)
        finally:
            gateway.lab.exec("b-box", ["ip", "address", "del", f"{address}/24", "dev", "eth0"])
    assert gateway.opens("b-box")


FEW = 5
LIMIT = chain(f"udp dport {ECHO_PORT} limit rate over 1/hour burst {FEW} packets drop")


def test_a_rate_limit_on_new_sessions(gateway: Gateway) -> None:
    with rules(gateway, LIMIT):
        assert [gateway.opens("a-box") for _ in range(FEW + 3)] == [True] * FEW + [False] * 3
    assert gateway.opens("a-box")


def test_a_rate_limit_on_a_running_flow(gateway: Gateway) -> None:
    """In TC mode every packet counts; what rides XDP does not come by, as with a flowtable."""
    with gateway.udp("a-box") as client:
        for _ in range(10):
            ask(client, b"?")
        with rules(gateway, LIMIT), gateway.counting() as grown:
            passed = [answers(client) for _ in range(FEW + 3)]
        assert passed == [True] * FEW + [gateway.mode == "xdp"] * 3
        assert bool(grown["fast_outbound"]) == (gateway.mode == "xdp")


# --- logging ---------------------------------------------------------------------------------------


def test_a_log_rule(gateway: Gateway) -> None:
    """It logs a new session as it is inside, on its way from the one interface to the other.

    Read through nfnetlink: what a log rule with a level says goes to the kernel's log, which namespaces other than
    the machine's first one may not write to (net.netfilter.nf_log_all_netns). That such a rule is passed is counted.
    """
    logging = chain(
        f'ip saddr {HOSTS["c-box"]} udp dport {ECHO_PORT} log level warn prefix "level " counter comment "level"',
        f'ip saddr {HOSTS["c-box"]} udp dport {ECHO_PORT} log group 77 prefix "new session " counter comment "group"',
    )
    with rules(gateway, logging):
        with gateway.lab.capture(GATE, "nflog:77") as log, gateway.udp("c-box") as client:
            assert ask(client, b"for the log") == b"for the log"
            endpoint = internal("c-box", client)
            soon(lambda: bool(log.frames), "it is logged")
            (entry,) = log.frames
        assert counted(gateway) == {"level": 1, "group": 1}
    attributes = nflog(entry)
    assert attributes[NFULA_PREFIX] == b"new session \0"
    packet = attributes[NFULA_PAYLOAD]
    assert (packet[12:16], packet[16:20]) == (socket.inet_aton(HOSTS["c-box"]), socket.inet_aton(INTERNET))
    assert int.from_bytes(packet[20:22], "big") == int(endpoint.rpartition(":")[2])
    with gateway.inside():
        indices = [socket.if_nametoindex(name) for name in ("lan0", "wan0")]
    found = [int.from_bytes(attributes[each], "big") for each in (NFULA_IFINDEX_INDEV, NFULA_IFINDEX_OUTDEV)]
    assert found == indices


NFULA_IFINDEX_INDEV, NFULA_IFINDEX_OUTDEV, NFULA_PAYLOAD, NFULA_PREFIX = 4, 5, 9, 10  # linux/nfnetlink_log.h


def nflog(entry: bytes) -> dict[int, bytes]:
    """The attributes of a frame of LINKTYPE_NFLOG: length, type, value, padded to four bytes."""
    attributes, at = {}, 4
    while at < len(entry):
        length, kind = struct.unpack_from("=HH", entry, at)
        attributes[kind & 0x7FFF] = entry[at + 4 : at + length]
        at += length + -length % 4
    return attributes


# --- policy routing --------------------------------------------------------------------------------


@pytest.fixture
def other_way(gateway: Gateway) -> Iterator[None]:
    """Table 100 leads out by internet instead of transit, and internet takes it on to far."""
    lab = gateway.lab
    netns.set_sysctls(lab.namespace("internet"), {"net/ipv4/conf/all/send_redirects": 0})
    netns.set_sysctls(lab.namespace("internet"), {"net/ipv4/conf/eth0/send_redirects": 0, "net/ipv4/ip_forward": 1})
    gateway.gate("ip", "route", "add", "default", "via", INTERNET, "dev", "wan0", "table", "100")
    yield
    gateway.gate("ip", "route", "flush", "table", "100")
    netns.set_sysctls(lab.namespace("internet"), {"net/ipv4/ip_forward": 0})


@contextlib.contextmanager
def rule(gateway: Gateway, *words: str) -> Iterator[None]:
    gateway.gate("ip", "rule", "add", *words)
    try:
        yield
    finally:
        gateway.gate("ip", "rule", "del", *words)


def next_hops(gateway: Gateway, box: str) -> set[bytes]:
    """The MACs to which the packets of a box's new flow with far go, once it may ride XDP."""
    with gateway.lab.capture("exchange", GATE, f"src host {PUBLIC} and dst host {FAR}") as wire:
        with gateway.udp(box) as client:
            for _ in range(10):
                assert ask(client, b"which way?", FAR_ECHO) == b"which way?"
        frames = wire.stop()
    assert len(frames) == 10
    return {frame[:6] for frame in frames}


@pytest.mark.usefixtures("other_way")
@pytest.mark.parametrize("by", ["source", "mark"])
def test_a_rule_sends_one_host_another_way(gateway: Gateway, by: str) -> None:
    internet, transit = mac(gateway, "internet"), mac(gateway, "transit")
    marking = f"""chain prerouting {{
        type filter hook prerouting priority mangle;
        ip saddr {HOSTS["b-box"]} meta mark set 5
    }}"""
    words = ["from", HOSTS["b-box"]] if by == "source" else ["fwmark", "5"]
    with rules(gateway, marking if by == "mark" else ""), rule(gateway, *words, "lookup", "100"):
        with gateway.counting() as grown:
            assert next_hops(gateway, "b-box") == {internet}
        assert bool(grown["fast_outbound"]) == (gateway.mode == "xdp")
        assert next_hops(gateway, "a-box") == {transit}
    assert next_hops(gateway, "b-box") == {transit}


@pytest.mark.usefixtures("other_way")
def test_a_rule_turns_a_running_flow(gateway: Gateway) -> None:
    with gateway.udp("b-box") as client:
        endpoint = who(client, FAR_ECHO)
        for _ in range(5):
            ask(client, b"?", FAR_ECHO)
        with (
            rule(gateway, "from", HOSTS["b-box"], "lookup", "100"),
            gateway.lab.capture(
                "internet", "eth0", f"dst host {FAR} and ether src not {mac(gateway, 'internet').hex(':')}"
            ) as turned,
        ):

            def has_turned() -> bool:
                ask(client, b"?", FAR_ECHO)
                return bool(turned.frames)

            soon(has_turned, "it takes the other way")
            assert who(client, FAR_ECHO) == endpoint


def test_a_rule_that_prohibits(gateway: Gateway) -> None:
    """For new sessions and for those under way, whatever they ride on."""
    with gateway.udp("c-box") as client:
        for _ in range(5):
            ask(client, b"?")
        with rule(gateway, "from", HOSTS["c-box"], "prohibit"):
            soon(lambda: not answers(client), "the flow ends")
            with gateway.lab.capture("exchange", GATE, "udp or tcp") as wire, gateway.counting() as grown:
                assert told(gateway, "c-box", ECHO) == (3, 13, "192.168.0.1")
                assert wire.stop() == []
            assert grown["session_opened"] == 0
            assert gateway.opens("a-box")
        soon(lambda: answers(client), "it goes on")


# --- shaping ---------------------------------------------------------------------------------------

in_tc = pytest.mark.parametrize(
    "shared", [pytest.param("tc", marks=pytest.mark.xdist_group("gateway-tc"))], indirect=True
)  # what XDP redirects passes no qdisc


@contextlib.contextmanager
def qdisc(gateway: Gateway, *words: str) -> Iterator[None]:
    """The WAN's root qdisc."""
    gateway.gate("tc", "qdisc", "add", "dev", "wan0", "root", *words)
    try:
        yield
    finally:
        gateway.gate("tc", "qdisc", "del", "dev", "wan0", "root")


def class_bytes(gateway: Gateway) -> dict[str, int]:
    """What each htb class of the WAN has sent."""
    listed = gateway.gate("tc", "-s", "class", "show", "dev", "wan0")
    return {
        name: int(sent) for name, sent in re.findall(r"^class htb (\S+) .*\n Sent (\d+) bytes", listed, re.MULTILINE)
    }


def upload(gateway: Gateway, box: str, size: int) -> float:
    """Sends so many bytes through a new connection; returns the seconds until the last one was there."""
    with gateway.connection(box) as connection, ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        sending = pool.submit(connection.near.sendall, bytes(size))
        assert len(read(connection.far, size)) == size
        sending.result()
        return time.monotonic() - started


@in_tc
def test_a_token_bucket_on_the_wan(gateway: Gateway) -> None:
    """Nothing is faster than the bucket lets it, by its own books and by the clock."""
    size, bytes_per_s, burst = 1_500_000, 1_000_000, 50_000
    with qdisc(gateway, "tbf", "rate", "8mbit", "burst", str(burst), "latency", "300ms"):
        seconds = upload(gateway, "a-box", size)
        listed = json.loads(gateway.gate("tc", "-s", "-j", "qdisc", "show", "dev", "wan0"))
        (bucket,) = (each for each in listed if each["kind"] == "tbf")
    assert bucket["bytes"] >= size
    assert bucket["overlimits"] > 0
    assert seconds >= (size - burst) / (1.5 * bytes_per_s)


@in_tc
def test_classes_by_internal_host(gateway: Gateway) -> None:
    """Beyond the NAT all have one address; the forward chain, which is before it, picks a host's class."""
    size = 300_000
    with (
        qdisc(gateway, "handle", "1:", "htb", "default", "20"),
        rules(gateway, chain(f'oifname "wan0" ip saddr {HOSTS["b-box"]} meta priority set 1:10')),
    ):
        for number, rate in (("10", "20mbit"), ("20", "1gbit")):
            gateway.gate(
                "tc", "class", "add", "dev", "wan0", "parent", "1:", "classid", f"1:{number}", "htb", "rate", rate
            )
        upload(gateway, "b-box", size)
        sent = class_bytes(gateway)
        assert sent["1:10"] >= size
        assert sent["1:20"] < size / 10
        upload(gateway, "a-box", 2 * size)
        later = class_bytes(gateway)
    assert later["1:10"] - sent["1:10"] < size / 10
    assert later["1:20"] >= 2 * size


# --- an active firewall ----------------------------------------------------------------------------

FIREWALL = """
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state related counter accept comment "related"
        ct state established accept
        ct state invalid counter drop comment "invalid"
        iifname "lan*" oifname "wan0" ct state new counter accept comment "new"
        counter comment "refused"
    }
"""


def test_behind_an_active_firewall(gateway: Gateway, servers: object) -> None:
    """Connections open, fly, carry data both ways, and close, and conntrack has followed each step."""
    with rules(gateway, FIREWALL):
        with gateway.connection("a-box") as connection, gateway.udp("b-box") as client:
            client_endpoint = who(client)
            connection.talk(5)
            with gateway.counting() as grown:
                connection.talk(200, size=3000)
                for _ in range(50):
                    assert who(client) == client_endpoint
            for direction in ("outbound", "inbound"):
                assert (grown[f"fast_{direction}"] > 100) == (gateway.mode == "xdp")
            near = internal("a-box", connection.near)
            assert state_of(gateway, near) == "ESTABLISHED"
            connection.near.shutdown(socket.SHUT_WR)
            assert connection.far.recv(1) == b""
            connection.far.sendall(b"and the other half goes on")
            assert connection.near.recv(100) == b"and the other half goes on"
            connection.far.close()
            assert connection.near.recv(1) == b""
            soon(lambda: state_of(gateway, near) in ("TIME_WAIT", "LAST_ACK"), "conntrack has seen it close")
        web = servers.web  # type: ignore[attr-defined]
        output = gateway.lab.exec("d-box", ["sh", "-c", f"{' '.join(CURL)} {web.big_url} | sha256sum"]).stdout
        assert output.split()[0] == web.big_sha256
        found = counted(gateway)
    assert found["new"] == 3
    assert (found["invalid"], found["refused"]) == (0, 0)


def state_of(gateway: Gateway, endpoint: str) -> str:
    """What conntrack makes of the TCP connection of an internal endpoint."""
    host, _, port = endpoint.rpartition(":")
    listed = gateway.gate("conntrack", "-L", "-p", "tcp", "-s", host, "--sport", port).split()
    return listed[3] if listed else ""


def test_icmp_errors_through_an_active_firewall(gateway: Gateway) -> None:
    """They are *related* to what they quote: unreachable ports, ended TTLs, and the MTU of a narrow link."""
    with rules(gateway, FIREWALL):
        assert told(gateway, "a-box", (INTERNET_TOO, CLOSED_PORT)) == (3, 3, INTERNET_TOO)
        assert counted(gateway)["related"] == 1
        trace = gateway.lab.exec("b-box", ["traceroute", "-n", "-q1", "-N1", "-w2", "-m4", FAR]).stdout
        assert [line.split()[1] for line in trace.splitlines()[1:]] == ["192.168.0.1", "203.0.113.254", FAR]
        found = gateway.lab.exec("c-box", ["tracepath", "-n", FAR]).stdout
        assert "Resume: pmtu 1400 " in found
        with gateway.udp("internet") as server, gateway.udp("a-box") as client:
            client.sendto(b"?", (INTERNET, server.getsockname()[1]))
            _, source = server.recvfrom(10)
            client.close()
            server.connect(source)
            server.send(b"too late")
            with pytest.raises(ConnectionRefusedError):  # the box's own error, on its way out
                server.recv(10)
        found_counts = counted(gateway)
    gateway.lab.exec("c-box", ["ip", "route", "flush", "cache"])
    assert (found_counts["invalid"], found_counts["refused"]) == (0, 0)
    assert found_counts["related"] >= 4


def test_an_active_firewall_refuses_what_nobody_asked_for(gateway: Gateway) -> None:
    """From outside to a mapped port: dropped already by the NAT's own filtering, so it never gets this far."""
    with rules(gateway, FIREWALL), gateway.udp("a-box", timeout_s=0.2) as client, gateway.udp("internet") as stranger:
        host, _, port = who(client).rpartition(":")
        with gateway.counting() as grown:
            stranger.sendto(b"boo", (host, int(port)))
            with pytest.raises(TimeoutError):
                client.recv(10)
        assert grown["drop_filtered"] == 1
        assert ask(client, b"still there") == b"still there"
        assert counted(gateway)["refused"] == 0
