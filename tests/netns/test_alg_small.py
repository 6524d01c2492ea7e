"""ALGs end to end: what two ends announce to each other comes through the gateway, and its bytes are compared.

::

    a-box .2, b-box .3 ─ lan0 masq-gate wan0 203.0.113.1 ─ internet .10 and .11

The ends speak as the protocols' specifications say, or where there is none as the kernel's helpers and the modules of
ip_masq expect it. Each talk is held three times: with the ALG, without it, and with the kernel's helper instead.
Mode: tc. What an ALG reads never flies.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import socket
import struct
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Self

import pytest
from h323_messages import acknowledged, at, connect, sent, setup, system, tpkt, wanted
from netkit import Gateway, read, receive, rules, soon

from xdpmasq import algs
from xdpmasq.alg import switches
from xdpmasq.lab.topology import FAR as FAR_SERVER
from xdpmasq.lab.topology import FAR_NETWORK, INTERNET, INTERNET_TOO, PUBLIC, TRANSIT

pytestmark = pytest.mark.xdist_group("alg-small")

A_BOX, B_BOX = "192.168.0.2", "192.168.0.3"
A, OUTSIDE, FAR = map(IPv4Address, (A_BOX, PUBLIC, INTERNET))
EVERYBODY = "203.0.113.255"

Came = dict[str, bool]  # what of a talk has come, and as it should
Address = tuple[str, int]


class Stage:
    """A gateway, and the boxes with their sockets, all closed in the end.

    Args:
        patience_s: for what is to come, or is not.
        dnat: the kernel has the forwards already.
    """

    def __init__(self, gateway: Gateway, patience_s: float, *, dnat: bool = False) -> None:
        self.gateway, self.patience_s, self._dnat = gateway, patience_s, dnat
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def forward(self, protocol: str, port: int) -> None:
        """To the same port of a-box."""
        if not self._dnat:
            self._stack.enter_context(self.gateway.forward(protocol, str(port), f"{A_BOX}:{port}"))

    def udp(self, role: str, port: int = 0, address: str = "0.0.0.0", *, broadcast: bool = False) -> socket.socket:
        made = self._stack.enter_context(self.gateway.lab.socket(role, socket.SOCK_DGRAM))
        made.settimeout(self.patience_s)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, broadcast)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, broadcast)
        made.bind((address, port))
        return made

    def listen(self, role: str, port: int = 0, address: str = "0.0.0.0") -> socket.socket:
        made = self._stack.enter_context(self.gateway.listen(role, port, address))
        made.settimeout(self.patience_s)
        return made

    def gre(self, role: str) -> socket.socket:
        with self.gateway.inside(role):
            made = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_GRE))
        made.settimeout(self.patience_s)
        return made

    def connected(self, role: str, to: Address, door: socket.socket) -> tuple[socket.socket, socket.socket]:
        """The ends of a connection, who has opened it first.

        Raises:
            OSError: it does not come about.
        """
        near = self._stack.enter_context(self.gateway.tcp(role, to, timeout_s=self.patience_s))
        far = self._stack.enter_context(door.accept()[0])
        far.settimeout(self.patience_s)
        return near, far

    def connects(self, role: str, to: Address, door: socket.socket, size: int = 20_000) -> bool:
        """Whether a connection comes to who listens there, with what both say."""
        try:
            near, far = self.connected(role, to, door)
            for source, sink in ((near, far), (far, near)):
                text = os.urandom(size)
                source.sendall(text)
                if read(sink, size) != text:
                    return False
        except OSError:
            return False
        return True


def flows(one: socket.socket, to: Address, other: socket.socket, size: int = 1000) -> bool:
    """Whether a datagram comes from one to the other, and its answer back from where it was sent to."""
    text, back = os.urandom(size), os.urandom(size)
    try:
        one.sendto(text, to)
        came, peer = other.recvfrom(4096)
        other.sendto(back, peer)
        return (came, *one.recvfrom(4096)) == (text, back, to)
    except OSError:
        return False


def hears(listener: socket.socket, text: bytes) -> bool:
    """Whether it is what comes next."""
    try:
        return listener.recv(4096) == text
    except OSError:
        return False


# --- Amanda ----------------------------------------------------------------------------------------


def amanda(on: Stage) -> Came:
    """A backup client inside names the ports of its streams, the server connects to them."""
    on.forward("udp", 10080)
    client, server = on.udp("a-box", 10080), on.udp("internet")
    head = b"Amanda 2.6 %s HANDLE 000-00000000 SEQ 1234567890\n"
    request = head % b"REQ" + b"SECURITY USER root\nSERVICE sendbackup\nOPTIONS features=ffff;\nGNUTAR / 0\n"
    server.sendto(request, (PUBLIC, 10080))
    came, seen = client.recvfrom(4096)
    assert came == request
    client.sendto(head % b"ACK", seen)
    assert server.recv(4096) == head % b"ACK"
    names = ("DATA", "MESG", "INDEX")
    doors = {name: on.listen("a-box") for name in names}
    streams = " ".join(f"{name} {door.getsockname()[1]}" for name, door in doors.items())
    reply = head % b"REP" + b"CONNECT %s\n\nOPTIONS features=fffffeff9ffeffff00;\n"
    client.sendto(reply % streams.encode(), seen)
    heard = server.recv(4096)
    ports = [int(port) for port in re.findall(rb"(?:DATA|MESG|INDEX) (\d+)", heard)]
    assert heard == reply % " ".join(f"{name} {port}" for name, port in zip(names, ports, strict=True)).encode()
    return {
        name: on.connects("internet", (PUBLIC, port), doors[name]) for name, port in zip(names, ports, strict=True)
    }


# --- SANE ------------------------------------------------------------------------------------------


def sane(on: Stage) -> Came:
    """A scanner's server inside names the port of the picture, which comes in records."""
    on.forward("tcp", 6566)
    client, server = on.connected("internet", (PUBLIC, 6566), on.listen("a-box", 6566))
    door, picture = on.listen("a-box"), os.urandom(10_000)
    talk = (
        (struct.pack("!III4s", 0, 0x01000003, 4, b"lab\0"), struct.pack("!II", 0, 0x01000003)),  # SANE_NET_INIT
        (struct.pack("!II5s", 2, 5, b"test\0"), struct.pack("!III", 0, 9, 0) + bytes(4)),  # SANE_NET_OPEN
    )
    for call, answer in talk:
        client.sendall(call)
        assert read(server, len(call)) == call
        server.sendall(answer)
        assert read(client, len(answer)) == answer
    client.sendall(struct.pack("!II", 7, 9))  # SANE_NET_START
    assert read(server, 8) == struct.pack("!II", 7, 9)
    reply = struct.pack("!IIII", 0, door.getsockname()[1], 0x1234, 0)
    for piece in (reply[:6], reply[6:]):
        server.sendall(piece)
    status, port, order, resource = struct.unpack("!IIII", read(client, 16))
    assert (status, order, resource) == (0, 0x1234, 0)
    try:
        sink, source = on.connected("internet", (PUBLIC, port), door)
    except OSError:
        return {"picture": False}
    for begin in range(0, len(picture), 4000):
        record = picture[begin : begin + 4000]
        source.sendall(len(record).to_bytes(4, "big") + record)
    source.sendall(b"\xff\xff\xff\xff\5")  # the end, and SANE_STATUS_EOF
    records = b""
    while (length := int.from_bytes(read(sink, 4), "big")) != 0xFFFFFFFF:
        records += read(sink, length)
    return {"picture": records == picture and read(sink, 1) == b"\5"}


# --- NetBIOS ---------------------------------------------------------------------------------------

NAME = b"\x20CK" + b"A" * 30 + b"\0"  # "*", as RFC 1001 section 14.1 writes it


def netbios(on: Stage) -> Came:
    """A name query by broadcast; two answer, each from its own address. And a datagram that says whom to answer."""
    asker = on.udp("a-box", broadcast=True)
    ear = on.udp("internet", 137, EVERYBODY, broadcast=True)
    query = struct.pack("!HHHHHH", 0x1234, 0x0110, 1, 0, 0, 0) + NAME + struct.pack("!HH", 0x20, 1)
    asker.sendto(query, (EVERYBODY, 137))
    came, seen = ear.recvfrom(4096)
    assert (came, seen[0]) == (query, PUBLIC)
    heard = {}
    for address in (INTERNET, INTERNET_TOO):
        found = struct.pack("!HHHHHH", 0x1234, 0x8500, 0, 1, 0, 0) + NAME
        found += struct.pack("!HHIHH4s", 0x20, 1, 300, 6, 0, IPv4Address(address).packed)
        on.udp("internet", 137, address, broadcast=True).sendto(found, seen)
        heard[address] = hears(asker, found)
    sender, receiver = on.udp("a-box", 138), on.udp("internet", 138, INTERNET)
    head, rest = struct.pack("!BBH", 0x10, 0x0A, 7), struct.pack("!HH", 70, 0) + NAME + NAME + b"user data"
    sender.sendto(head + A.packed + struct.pack("!H", 138) + rest, (INTERNET, 138))
    text, peer = receiver.recvfrom(4096)
    assert (text[:4], text[10:]) == (head, rest)
    named = (socket.inet_ntoa(text[4:8]), int.from_bytes(text[8:10], "big"))
    return {**heard, "datagram": named == peer and flows(receiver, named, sender)}


# --- SNMP ------------------------------------------------------------------------------------------


def ber(tag: int, *parts: bytes) -> bytes:
    contents = b"".join(parts)
    return bytes([tag, len(contents)]) + contents


RESPONSE, TRAP, TRAP_2 = 0xA2, 0xA4, 0xA7


def snmp_message(kind: int, address: IPv4Address) -> bytes:
    """With a host's address: ipAdEntAddr; a trap of version 1 has it as agent-addr, too."""
    binding = ber(0x30, bytes.fromhex("06 09 2b 06 01 02 01 04 14 01 01"), ber(0x40, address.packed))
    number, none = ber(2, b"\7"), ber(2, b"\0")
    trap = (bytes.fromhex("06 05 2b 06 01 04 01"), ber(0x40, address.packed), number, number, ber(0x43, b"\1\2"))
    head = trap if kind == TRAP else (number, none, none)
    return ber(0x30, ber(2, bytes([kind != TRAP])), ber(4, b"public"), ber(kind, *head, ber(0x30, binding)))


def snmp(on: Stage) -> Came:
    """An agent inside sends traps, and answers a manager outside: both hear of the address that they know."""
    agent, manager, came = on.udp("a-box"), on.udp("internet", 162, INTERNET), {}
    for name, kind in (("trap", TRAP), ("trap of version 2", TRAP_2)):
        agent.sendto(snmp_message(kind, A), (INTERNET, 162))
        came[name] = hears(manager, snmp_message(kind, OUTSIDE))
    on.forward("udp", 161)
    asked, asker = on.udp("a-box", 161), on.udp("internet")
    asker.sendto(snmp_message(0xA0, A), (PUBLIC, 161))
    asked.sendto(snmp_message(RESPONSE, A), asked.recvfrom(4096)[1])
    return came | {"response": hears(asker, snmp_message(RESPONSE, OUTSIDE))}


# --- CU-SeeMe --------------------------------------------------------------------------------------


def cuseeme_packet(to: IPv4Address, by: IPv4Address, kind: int, more: bytes) -> bytes:
    ends = struct.pack("!HH4sHH4s", 2, 7648, to.packed, 2, 7648, by.packed)
    return ends + struct.pack("!IHHH", 77, 0, kind, 26 + len(more)) + more


def cuseeme(on: Stage) -> Came:
    """To and from a reflector, which believes the headers; and the client, whom it has in its list."""
    client, reflector = on.udp("a-box", 7648), on.udp("internet", 7648, INTERNET)
    picture = os.urandom(1000)
    client.sendto(cuseeme_packet(FAR, A, 1, picture), (INTERNET, 7648))
    sent_, peer = reflector.recvfrom(4096)
    reflector.sendto(cuseeme_packet(OUTSIDE, FAR, 1, picture), peer)
    heard = client.recv(4096)
    others = struct.pack("!HI20s4s", 2, 5, b"\4Name", b"\1\1\0\2")
    members = [others + b"".join(each.packed + b"informed" for each in (FAR, who)) for who in (OUTSIDE, A)]
    reflector.sendto(cuseeme_packet(OUTSIDE, FAR, 101, members[0]), peer)
    return {
        "sent": sent_ == cuseeme_packet(FAR, OUTSIDE, 1, picture),
        "received": heard == cuseeme_packet(A, FAR, 1, picture),
        "participants": hears(client, cuseeme_packet(A, FAR, 101, members[1])),
    }


# --- VDOLive ---------------------------------------------------------------------------------------


def vdolive(on: Stage) -> Came:
    """A player says where it wants the film, in two pieces; the server plays it there."""
    player = on.udp("a-box")
    near, far = on.connected("a-box", (INTERNET, 7000), on.listen("internet", 7000, INTERNET))
    head, rest = struct.pack("!II16s8s", 36, 6, b"sixteen bytes...", b"VDO Live"), b"and the rest"
    near.sendall(head[:20])
    near.sendall(head[20:] + struct.pack("!I", player.getsockname()[1]) + rest)
    heard = read(far, 36 + len(rest))
    assert (heard[:32], heard[36:]) == (head, rest)
    return {"film": flows(on.udp("internet", 0, INTERNET), (PUBLIC, int.from_bytes(heard[32:36], "big")), player)}


# --- Quake -----------------------------------------------------------------------------------------


def quake(on: Stage) -> Came:
    """A server accepts, and begins to speak from the game's port, or is spoken to there; on either side."""
    ask = struct.pack("!HHB6sB", 0x8000, 12, 1, b"QUAKE\0", 3)

    def accept(port: int) -> bytes:
        return struct.pack("!HHB", 0x8000, 9, 0x81) + struct.pack("<I", port)

    player, server, game = on.udp("a-box"), on.udp("internet", 26000, INTERNET), on.udp("internet", 0, INTERNET)
    player.sendto(ask, (INTERNET, 26000))
    came, seen = server.recvfrom(4096)
    assert came == ask
    server.sendto(accept(game.getsockname()[1]), seen)
    assert player.recv(4096) == accept(game.getsockname()[1])
    outside = flows(game, seen, player)
    on.forward("udp", 26000)
    player, server, game = on.udp("internet"), on.udp("a-box", 26000), on.udp("a-box")
    player.sendto(ask, (PUBLIC, 26000))
    came, seen = server.recvfrom(4096)
    assert came == ask
    server.sendto(accept(game.getsockname()[1]), seen)
    port = int.from_bytes(player.recv(4096)[5:], "little")
    return {"server outside": outside, "server inside": flows(player, (PUBLIC, port), game)}


# --- ICQ -------------------------------------------------------------------------------------------


def icq(on: Stage) -> Came:
    """A login tells where the client is; the server's other users connect to there."""
    door, client, server = on.listen("a-box"), on.udp("a-box"), on.udp("internet", 4000, INTERNET)
    head = struct.pack("<HHHI", 2, 1000, 8, 0x20768F)
    login = head + struct.pack("<IH", door.getsockname()[1], 7) + b"secret\0" + bytes.fromhex("72 00 04 00")
    rest = bytes.fromhex("04 00 00 00 00 03 00 00 00 02 00 00 00 00 00 04 00 72 00")
    client.sendto(login + A.packed + rest, (INTERNET, 4000))
    heard = server.recv(4096)
    assert heard[:10] + heard[14:27] + heard[31:] == head + login[14:] + rest
    where = (socket.inet_ntoa(heard[27:31]), int.from_bytes(heard[10:14], "little"))
    return {name: on.connects(role, where, door) for name, role in (("one", "far"), ("another", "internet"))}


# --- IRC, SIP, TFTP: for the comparison with the kernel's ------------------------------------------


def irc(on: Stage, role: str = "internet", server: str = INTERNET) -> Came:
    door = on.listen("a-box")
    near, far = on.connected("a-box", (server, 6667), on.listen(role, 6667, server))
    offer = b"PRIVMSG far :\x01DCC SEND file %d %d 20000\x01\r\n"
    near.sendall(offer % (int(A), door.getsockname()[1]))
    with far.makefile("rb") as lines:
        heard = lines.readline()
    host, port = map(int, re.findall(rb" (\d+) (\d+) 20000", heard)[0])
    assert heard == offer % (host, port)
    return {"file": on.connects(role, (str(IPv4Address(host)), port), door)}


SDP = "v=0\r\no=lab 1 1 IN IP4 {own}\r\ns=-\r\nc=IN IP4 {own}\r\nt=0 0\r\nm=audio {port} RTP/AVP 8\r\n{more}"
INVITE = """\
INVITE sip:far@{far} SIP/2.0
Via: SIP/2.0/UDP {own}:5060;branch=z9hG4bK1
Max-Forwards: 70
From: <sip:near@lab.test>;tag=1
To: <sip:far@lab.test>
Call-ID: {call}@lab.test
CSeq: 1 INVITE
Contact: <sip:near@{own}:5060>
Content-Type: application/sdp
Content-Length: {length}

""".replace("\n", "\r\n")


def invite(call: str, port: int, more: str = "") -> bytes:
    body = SDP.format(own=A_BOX, port=port, more=more)
    return (INVITE.format(far=INTERNET, own=A_BOX, call=call, length=len(body)) + body).encode()


def sip(on: Stage, more: str = "") -> Came:
    """The one who is called speaks first."""
    media = [on.udp("a-box", 7000 + nth) for nth in range(2)]
    near, far = on.udp("a-box", 5060), on.udp("internet", 5060, INTERNET)
    near.sendto(invite(os.urandom(4).hex(), 7000, more), (INTERNET, 5060))
    heard = far.recv(65535)
    head, _, body = heard.partition(b"\r\n\r\n")
    lengths = re.findall(rb"Content-Length: (\d+)", head)
    assert [int(each) for each in lengths] == [len(body)]
    assert body.decode().endswith(more)
    found = re.search(rb"c=IN IP4 (\S+)\r\n(?:.*\r\n)*?m=audio (\d+) ", body)
    assert found
    host, port = found[1].decode(), int(found[2])
    come = [flows(on.udp("internet", 6000 + nth, INTERNET), (host, port + nth), media[nth]) for nth in range(2)]
    return dict(zip(("RTP", "RTCP"), come, strict=True))


def tftp(on: Stage) -> Came:
    client, server = on.udp("a-box"), on.udp("internet", 69, INTERNET)
    client.sendto(b"\0\1file\0octet\0", (INTERNET, 69))
    came, seen = server.recvfrom(4096)
    assert came == b"\0\1file\0octet\0"
    return {"file": flows(on.udp("internet", 0, INTERNET), seen, client)}


# --- PPTP ------------------------------------------------------------------------------------------

CALL = 7  # both clients choose it


def pptp_message(kind: int, fields: bytes) -> bytes:
    return struct.pack("!HHIHH", 12 + len(fields), 1, 0x1A2B3C4D, kind, 0) + fields


def pptp_start(result: int) -> bytes:
    return pptp_message(
        2 if result else 1, struct.pack("!HBBIIHH64s64s", 0x100, result, 0, 1, 1, 0, 1, b"lab", b"lab")
    )


def pptp_request(call: int) -> bytes:
    return pptp_message(7, struct.pack("!HHIIIIHHHH64s64s", call, 1, 300, 10**8, 3, 3, 64, 0, 0, 0, b"", b""))


def pptp_reply(call: int, peers: int) -> bytes:
    return pptp_message(8, struct.pack("!HHBBHIHHI", call, peers, 1, 0, 0, 10**8, 64, 0, 0))


def call_is_set_up(on: Stage, role: str, called: Address, door: socket.socket, servers: int) -> tuple[int, int]:
    """Control messages by which a client's call begins; both ends' numbers for it, as the other knows them."""
    client, server = on.connected(role, called, door)

    def says(source: socket.socket, sink: socket.socket, message: bytes) -> bytes:
        source.sendall(message)
        return read(sink, len(message))

    assert says(client, server, pptp_start(0)) == pptp_start(0)
    assert says(server, client, pptp_start(1)) == pptp_start(1)
    request = says(client, server, pptp_request(CALL))
    number = int.from_bytes(request[12:14], "big")
    assert request == pptp_request(number)
    reply = says(server, client, pptp_reply(servers, number))
    other = int.from_bytes(reply[12:14], "big")
    assert reply == pptp_reply(other, CALL)
    return number, other


def gre_packet(call: int, sequence: int, text: bytes) -> bytes:
    """Version 1, with key and sequence number (RFC 2637 section 4.1)."""
    return struct.pack("!HHHHI", 0x3001, 0x880B, len(text), call, sequence) + text


def pptp(on: Stage, size: int = 1000) -> Came:
    """Two clients, whose calls have the same number; packets go to and fro between each and the server."""
    came: Came = {}
    door, far = on.listen("internet", 1723, INTERNET), on.gre("internet")
    near = {role: on.gre(role) for role in ("a-box", "b-box")}
    numbers = {role: call_is_set_up(on, role, (INTERNET, 1723), door, 1001 + nth) for nth, role in enumerate(near)}
    assert [other for _, other in numbers.values()] == [1001, 1002]
    for sequence in range(2):
        for nth, (role, client) in enumerate(near.items()):
            if not came.get(f"{role} to", True):  # it has been waited for once
                continue
            text, back = os.urandom(size), os.urandom(size)
            client.sendto(gre_packet(1001 + nth, sequence, text), (INTERNET, 0))
            to = comes(far, gre_packet(1001 + nth, sequence, text), PUBLIC)
            far.sendto(gre_packet(numbers[role][0], sequence, back), (PUBLIC, 0))
            fro = comes(client, gre_packet(CALL, sequence, back), INTERNET)
            for way, has_come in (("to", to), ("fro", fro)):
                came[f"{role} {way}"] = came.get(f"{role} {way}", True) and has_come
    return came


def pptp_server_inside(on: Stage) -> Came:
    on.forward("tcp", 1723)
    near, far = on.gre("a-box"), on.gre("internet")
    number, other = call_is_set_up(on, "internet", (PUBLIC, 1723), on.listen("a-box", 1723), 1001)
    text, back = os.urandom(1000), os.urandom(1000)
    far.sendto(gre_packet(other, 0, text), (PUBLIC, 0))
    to = comes(near, gre_packet(1001, 0, text), INTERNET)
    near.sendto(gre_packet(number, 0, back), (INTERNET, 0))
    return {"to": to, "fro": comes(far, gre_packet(CALL, 0, back), PUBLIC)}


def comes(listener: socket.socket, text: bytes, source: str) -> bool:
    try:
        return bool(
            receive(listener, lambda packet: (packet[20:], packet[12:16]) == (text, socket.inet_aton(source)))
        )
    except TimeoutError:
        return False


# --- H.323 -----------------------------------------------------------------------------------------


def message(stream: socket.socket) -> bytes:
    """The next TPKT."""
    head = read(stream, 4)
    return head + read(stream, int.from_bytes(head[2:], "big") - 4)


def named(text: bytes) -> list[Address]:
    """The endpoints of a-box in a message, by its own address or by that which it has outside."""
    found = re.findall(b"(" + re.escape(A.packed) + b"|" + re.escape(OUTSIDE.packed) + b")(..)", text, re.DOTALL)
    return [(socket.inet_ntoa(host), int.from_bytes(port, "big")) for host, port in found]


def h323_from_inside(on: Stage) -> Came:
    """Media as the Setup has them, fast; and as H.245 has them, to the port that the Connect names."""
    fast, slow = ([on.udp("a-box", port + nth) for nth in range(2)] for port in (5000, 5004))
    near, far = on.connected("a-box", (INTERNET, 1720), on.listen("internet", 1720, INTERNET))
    own = near.getsockname()[1]

    def said(host: IPv4Address, port: int, media: int) -> bytes:
        return setup(at(FAR, 1720), at(host, port), sent(host, media + 1), wanted(host, media, media + 1))

    near.sendall(said(A, own, 5000))
    heard = message(far)
    *_, media, reports = named(heard)
    door = on.listen("internet", address=INTERNET)
    answer = connect(at(FAR, door.getsockname()[1]))
    far.sendall(answer)
    assert message(near) == answer
    control, other = on.connected("a-box", (INTERNET, door.getsockname()[1]), door)
    channel = tpkt(system(sent(FAR, 6001)))
    other.sendall(channel)
    assert message(control) == channel
    control.sendall(acknowledged(A, 5004, 5005))
    later = named(message(other))
    calls = [on.udp("internet", 6000 + nth, INTERNET) for nth in range(2)]
    return {
        "Setup": heard == said(OUTSIDE, far.getpeername()[1], media[1]),
        **{f"fast {nth}": flows(calls[nth], (media, reports)[nth], fast[nth]) for nth in range(2)},
        **{f"slow {nth}": flows(calls[nth], later[nth], slow[nth]) for nth in range(2)},
    }


def h323_from_outside(on: Stage) -> Came:
    """Who is called names a port for H.245, and there where it wants media."""
    on.forward("tcp", 1720)
    media = [on.udp("a-box", 5000 + nth) for nth in range(2)]
    far, near = on.connected("internet", (PUBLIC, 1720), on.listen("a-box", 1720))
    far.sendall(setup(at(OUTSIDE, 1720), at(FAR, far.getsockname()[1])))
    heard = message(near)
    door = on.listen("a-box")
    near.sendall(connect(at(A, door.getsockname()[1])))
    (called,) = named(message(far))
    came = {"Setup": heard == setup(at(A, 1720), at(FAR, far.getsockname()[1])), "H.245": False}
    try:
        other, control = on.connected("internet", called, door)
    except OSError:
        return came
    channel = tpkt(system(sent(FAR, 6001)))
    other.sendall(channel)
    assert message(control) == channel
    control.sendall(acknowledged(A, 5000, 5001))
    wants = named(message(other))
    calls = [on.udp("internet", 6000 + nth, INTERNET) for nth in range(2)]
    return came | {"H.245": True} | {f"media {nth}": flows(calls[nth], wants[nth], media[nth]) for nth in range(2)}


# --- with the ALG, without, and the kernel's -------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A talk.

    Attributes:
        without: what comes all the same when the ALG is off.
        kernels: what comes with the kernel's helper; None: it has none.
    """

    alg: str
    talk: Callable[[Stage], Came]
    without: frozenset[str] = frozenset()
    kernels: frozenset[str] | None = None


def these(*names: str) -> frozenset[str]:
    return frozenset(names)


FIRST = these("a-box to", "a-box fro")  # whoever speaks first has the remote's GRE

CASES = {
    "amanda": Case("amanda", amanda, kernels=these("DATA", "MESG", "INDEX")),
    "cuseeme": Case("cuseeme", cuseeme),
    "h323-from-inside": Case("h323", h323_from_inside, kernels=these("Setup", "fast 0", "fast 1")),
    "h323-from-outside": Case("h323", h323_from_outside, kernels=these("Setup")),
    "icq": Case("icq", icq),
    "irc": Case("irc", irc, kernels=these("file")),
    "netbios": Case("netbios", netbios, kernels=these()),
    "pptp": Case(
        "pptp", pptp, these("a-box to", "a-box fro"), these("a-box to", "a-box fro", "b-box to", "b-box fro")
    ),
    "pptp-server-inside": Case("pptp", pptp_server_inside, these("fro"), kernels=these("to", "fro")),
    "quake": Case("quake", quake),
    "sane": Case("sane", sane, kernels=these()),
    "sip": Case("sip", sip, kernels=these("RTP", "RTCP")),
    "snmp": Case("snmp", snmp, kernels=these("trap of version 2")),
    "tftp": Case("tftp", tftp, kernels=these("file")),
    "vdolive": Case("vdolive", vdolive),
}


def has_come(came: Came) -> set[str]:
    return {name for name, well in came.items() if well}


def broadcasts_are_forwarded(gateway: Gateway) -> None:
    for name in ("all", "lan0"):
        gateway.sysctl(f"net.ipv4.conf.{name}.bc_forwarding", 1)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Gateway.in_new_lab("tc", attach=False) as made:
        made.attach_with(algs=tuple(algs.Use.parse(name) for name in sorted({case.alg for case in CASES.values()})))
        broadcasts_are_forwarded(made)
        yield made


@pytest.fixture(autouse=True)
def _forgotten(gateway: Gateway) -> Iterator[None]:
    """Whom a remote's GRE belongs to lasts for minutes."""
    yield
    for name in ("calls", "callers", "bindings"):
        table = gateway.tables.maps[name]
        for keys, _ in table.items(chunk=table.max_entries):
            for key in keys:
                table.delete(key)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_announced_comes(gateway: Gateway, case: Case) -> None:
    with Stage(gateway, 5) as stage:
        came = case.talk(stage)
    assert has_come(came) == {*came}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_without_the_alg_it_does_not(gateway: Gateway, case: Case) -> None:
    tables = gateway.tables
    (use,) = (each for each in switches.read(tables) if each.name == case.alg)
    switches.take(tables, case.alg)
    try:
        with Stage(gateway, 1 if case.without else 0.4) as stage:
            assert has_come(case.talk(stage)) == case.without
    finally:
        switches.put(tables, use)


KERNELS = """
table ip xdpmasq_test {
    ct helper amanda { type "amanda" protocol udp; }
    ct helper h323 { type "Q.931" protocol tcp; }
    ct helper irc { type "irc" protocol tcp; }
    ct helper netbios { type "netbios-ns" protocol udp; }
    ct helper pptp { type "pptp" protocol tcp; }
    ct helper sane { type "sane" protocol tcp; }
    ct helper sip { type "sip" protocol udp; }
    ct helper trap { type "snmp_trap" protocol udp; }
    ct helper snmp { type "snmp" protocol udp; }
    ct helper tftp { type "tftp" protocol udp; }
    chain marked {
        type filter hook prerouting priority filter;
        udp dport 10080 ct helper set "amanda"
        tcp dport 1720 ct helper set "h323"
        tcp dport 6667 ct helper set "irc"
        udp dport 137 ct helper set "netbios"
        tcp dport 1723 ct helper set "pptp"
        tcp dport 6566 ct helper set "sane"
        udp dport 5060 ct helper set "sip"
        udp dport 162 ct helper set "trap"
        udp dport 161 ct helper set "snmp"
        udp dport 69 ct helper set "tftp"
    }
    chain inwards {
        type nat hook prerouting priority dstnat;
        iifname "wan0" udp dport { 161, 10080 } dnat to 192.168.0.2
        iifname "wan0" tcp dport { 1720, 1723, 6566 } dnat to 192.168.0.2
    }
    chain out { type nat hook postrouting priority srcnat; oifname "wan0" masquerade; }
}
"""


@pytest.fixture(scope="module")
def kernels() -> Iterator[Gateway]:
    """nftables' masquerade, with all the helpers there are for these."""
    with Gateway.in_new_lab("tc", attach=False) as made:
        made.sysctl("net.ipv4.ip_forward", 1)
        broadcasts_are_forwarded(made)
        made.lab.exec("masq-gate", ["nft", "-f", "-"], input=KERNELS)
        yield made


HELPED = {name: case for name, case in CASES.items() if case.kernels is not None}


@pytest.mark.parametrize("case", HELPED.values(), ids=HELPED)
def test_the_kernels_helper_does_no_more(kernels: Gateway, case: Case) -> None:
    with Stage(kernels, 1.5 if case.kernels else 0.4, dnat=True) as stage:
        assert has_come(case.talk(stage)) == case.kernels


# --- switched off while they run -------------------------------------------------------------------


@contextlib.contextmanager
def switched_off(gateway: Gateway, name: str) -> Iterator[None]:
    gateway.masq("alg", "disable", name)
    yield
    gateway.masq("alg", "enable", name)


def test_a_connection_goes_on_unread(gateway: Gateway) -> None:
    """What was edited stays shifted; a session to come is read again when the ALG is on."""
    offer = "PRIVMSG far :\x01DCC SEND file %d 5000 20000\x01\r\n"
    ours, theirs = ((offer % int(address)).encode() for address in (A, OUTSIDE))

    def hears_of(near: socket.socket, lines: io.BufferedReader) -> bytes:
        near.sendall(ours)
        return re.sub(rb" \d+ 20000", b" 5000 20000", lines.readline())

    with Stage(gateway, 5) as on:
        door = on.listen("internet", 6667, INTERNET)
        near, far = on.connected("a-box", (INTERNET, 6667), door)
        with far.makefile("rb") as lines:
            assert hears_of(near, lines) == theirs
            with switched_off(gateway, "irc"):
                soon(lambda: hears_of(near, lines) == ours, "it is not read any more", 5)
                with gateway.counting() as grown:
                    assert hears_of(near, lines) == ours
                    far.sendall(b"PING\r\n")
                    assert read(near, 6) == b"PING\r\n"
                assert grown["punt_alg"] == 0
                other, end = on.connected("a-box", (INTERNET, 6667), door)
                with end.makefile("rb") as others:
                    assert hears_of(other, others) == ours
            assert hears_of(near, lines) == ours
            other, end = on.connected("a-box", (INTERNET, 6667), door)
            with end.makefile("rb") as others:
                assert hears_of(other, others) == theirs
        near.shutdown(socket.SHUT_WR)
        assert far.recv(10) == b""


def test_datagrams_go_on_unread(gateway: Gateway) -> None:
    """And come by the agent no more."""
    with Stage(gateway, 5) as on:
        agent, manager = on.udp("a-box"), on.udp("internet", 162, INTERNET)

        def heard() -> bytes:
            agent.sendto(snmp_message(TRAP, A), (INTERNET, 162))
            return manager.recv(4096)

        assert heard() == snmp_message(TRAP, OUTSIDE)
        with switched_off(gateway, "snmp"):
            soon(lambda: heard() == snmp_message(TRAP, A), "they are not read any more", 5)
            with gateway.counting() as grown:
                assert heard() == snmp_message(TRAP, A)
            assert grown["punt_alg"] == 0


# --- in pieces -------------------------------------------------------------------------------------


def test_a_long_invitation_comes_in_pieces(gateway: Gateway) -> None:
    """And is read as a whole: its text becomes longer than it was, and its media come."""
    with Stage(gateway, 5) as stage, gateway.counting() as grown:
        assert sip(stage, "".join(f"a=x-{number:03}:{'x' * 60}\r\n" for number in range(60))) == {
            "RTP": True,
            "RTCP": True,
        }
    assert (grown["alg_bypassed"], grown["slow_fragment_outbound"]) == (0, 3)


@pytest.mark.parametrize("size", [100, 4000])
def test_an_answer_comes_in_pieces(gateway: Gateway, size: int) -> None:
    """In it the client finds itself again."""
    with Stage(gateway, 5) as on:
        near, far = on.udp("a-box", 5060), on.udp("internet", 5060, INTERNET)
        request = invite(os.urandom(4).hex(), 7000, f"a={'x' * size}\r\n")
        near.sendto(request, (INTERNET, 5060))
        heard, peer = far.recvfrom(65535)
        via = re.search(rb"Via: [^\r]*\r\n", heard)
        assert via
        assert via[0] not in request
        answer = b"SIP/2.0 486 Busy Here\r\n%sX: " + b"x" * size + b"\r\nContent-Length: 0\r\n\r\n"
        far.sendto(answer % via[0], peer)
        own = re.search(rb"Via: [^\r]*\r\n", request)
        assert own
        assert near.recv(65535) == answer % own[0]


def test_calls_come_in_pieces(gateway: Gateway) -> None:
    """Of both hosts."""
    with Stage(gateway, 5) as stage:
        came = pptp(stage, 4000)
    assert has_come(came) == {*came}


# --- the way of what is read -----------------------------------------------------------------------


def unacknowledged(stream: socket.socket) -> int:
    """Bytes."""
    return int.from_bytes(fcntl.ioctl(stream, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


MARKS = "chain marked { type filter hook prerouting priority mangle; ip saddr 192.168.0.2 meta mark set 7; }"


def test_it_goes_the_way_that_rules_for_marks_say(gateway: Gateway) -> None:
    """The only one that there is to the server."""
    rule = ("rule", "add", "fwmark", "7", "table", "77")
    ways = (f"{FAR_NETWORK} via {TRANSIT} table 77", f"unreachable {FAR_NETWORK}")
    with ExitStack() as stack:
        gateway.gate("ip", *rule)
        stack.callback(gateway.gate, "ip", "rule", "del", *rule[2:])
        for way in ways:
            gateway.gate("ip", "route", "add", *way.split())
            stack.callback(gateway.gate, "ip", "route", "del", *way.split())
        stack.enter_context(rules(gateway, MARKS))
        with Stage(gateway, 5) as on:
            assert irc(on, "far", FAR_SERVER) == {"file": True}
        on = stack.enter_context(Stage(gateway, 5))
        near, far = on.connected("a-box", (FAR_SERVER, 6667), on.listen("far", 6667, FAR_SERVER))
        far.sendall(b"NOTICE")  # is held, and acknowledged by the agent
        soon(lambda: not unacknowledged(far), "it is acknowledged", 3)
        far.sendall(b" me\r\n")
        assert read(near, 11) == b"NOTICE me\r\n"
