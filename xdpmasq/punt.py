"""The punt port: a TAP on which the kernel's programs hand the agent what they cannot settle.

A frame's destination MAC says why it comes and of which interface it is (``struct punt_header`` of bpf/types.h), the
rest is the packet as the hook saw it, with its Ethernet header: by that it goes back the way it was on. Fragments
that overtook their first one go back unchanged, once that one is known. Packets of ALGs' sessions are read, put
together where they are in pieces, and go back edited (:mod:`xdpmasq.alg.service`). Senders of refused packets are
told by ICMP; what is too big for the WAN that it has to leave by goes back in pieces, or its sender is told. The TAP
lives as long as the agent.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Self

import numpy as np

from xdpmasq import bpf, expiry, ipv4, refusal
from xdpmasq.allowance import Allowance
from xdpmasq.errors import HostError
from xdpmasq.net import netdev, tun
from xdpmasq.orphans import Key, Orphans, Part
from xdpmasq.tables import Tables

MTU = 65521  # the most a TAP takes: no redirected packet is refused for its size
QUEUE = 500  # frames that wait for the agent
WAYS = 4096  # of ALGs' sessions, that are remembered
BUDGET = 64  # frames at one go: expiry and netlink have their turn, whatever comes in here

# enum punt_reason and struct punt_header of bpf/types.h
FRAGMENT_IN, FRAGMENT_OUT, REFUSED, TTL, TOO_BIG, ALG_IN, ALG_OUT = range(7)
LOCAL = 0x02
_HEADER = struct.Struct("!BBII2xH")
_ETH_P_IP = 0x0800
_LINK = 14  # an Ethernet header
_NO_LINK = bytes(_LINK)  # the kernel is to look for the way
_AHEAD = _HEADER.size + _LINK

_SOL_RAW, _ICMP_FILTER, _NO_TYPE = 255, 1, struct.pack("=I", 0xFFFFFFFF)  # linux/icmp.h

Refusal = str  # one of config.REFUSALS
Known = Callable[[Iterable[Key]], list[Key]]
Algs = Callable[[int, int, bytes], list[tuple[int, bytes]]]  # alg.service.Service.take

log = logging.getLogger("xdpmasq")


class Punt:
    """One punt port.

    Args:
        tap: the TAP, this object's from now on.
        known: of some datagrams, those whose first fragment the kernel has seen.
        icmp: a raw ICMP socket, this object's from now on.
        patience_s: how long fragments are held.
        refusal_: what is said of packets for which no session was possible.
        algs: reads packets of ALGs' sessions.

    Attributes:
        counts: fragments by what became of them (see :class:`Orphans`), and senders ``told`` and ``untold`` (too
            many at once, or the kernel refused).
    """

    def __init__(
        self,
        tap: tun.Tap,
        known: Known,
        icmp: socket.socket,
        patience_s: float,
        refusal_: Refusal = "prohibited",
        *,
        algs: Algs = lambda direction, _, packet: [(direction, packet)],
    ) -> None:
        self._tap, self._known, self._icmp = tap, known, icmp
        self._orphans, self._algs = Orphans(patience_s), algs
        self._ways: OrderedDict[tuple[int, bytes], bytes] = OrderedDict()
        self.set(patience_s, refusal_)
        self._allowance = Allowance(refusal.TO_EACH, refusal.TO_ALL)
        self.counts = self._orphans.counts
        self.counts |= {"told": 0, "untold": 0}

    @classmethod
    def open(cls, tables: Tables, patience_s: float, refusal_: Refusal, algs: Algs) -> Self:
        """Makes the TAP and brings it up; settings and the program on it are the caller's.

        Raises:
            MasqError: this machine lets us have none.
        """
        tap = tun.tap_create(f"{netdev.PUNT_PORT}%d", MTU, QUEUE)
        try:
            icmp = _icmp_socket()
        except OSError as error:
            os.close(tap.fd)
            raise HostError("cannot open a raw ICMP socket", error.strerror or "", "run it as root") from error
        return cls(tap, lambda keys: known_firsts(tables, keys), icmp, patience_s, refusal_, algs=algs)

    def set(self, patience_s: float, refusal_: Refusal) -> None:
        """As another configuration has it; what is held stays."""
        self._orphans.patience_s = patience_s
        self._messages = {REFUSED: refusal.REFUSALS[refusal_], TTL: refusal.TIME_EXCEEDED}

    def fileno(self) -> int:
        return self._tap.fd

    @property
    def is_open(self) -> bool:
        return self._icmp.fileno() >= 0

    @property
    def held(self) -> int:
        """Fragments that wait for their first."""
        return len(self._orphans)

    @property
    def name(self) -> str:
        return self._tap.name

    @property
    def ifindex(self) -> int:
        return self._tap.index

    def close(self) -> None:
        """The TAP goes, and what is held with it."""
        os.close(self._tap.fd)
        self._icmp.close()

    def receive(self, now: float) -> None:
        """Takes what has come, at most :data:`BUDGET` frames.

        Raises:
            OSError: the TAP is gone.
        """
        for _ in range(BUDGET):
            try:
                frame = os.read(self._tap.fd, MTU + _AHEAD)
            except BlockingIOError:
                break
            self._take(frame, now)

    def tick(self, now: float) -> float | None:
        """Puts back the fragments whose first has come.

        Returns:
            Seconds until the next call is needed; None: when something has been received.
        """
        if due := self._orphans.due(now):
            for key in self._known(due):
                for frame in self._orphans.release(key, now):
                    if not self._put_back(frame):
                        self._not_released(1)
        return self._orphans.pause(now)

    def _not_released(self, pieces: int) -> None:
        self.counts["released"] -= pieces
        self.counts["refused"] += pieces

    def _take(self, frame: bytes, now: float) -> None:
        if len(frame) < _AHEAD:
            return
        local, reason, ifindex, about, ethertype = _HEADER.unpack_from(frame)
        # The TAP is an interface like any other: who likes can send to it.
        if local != LOCAL or ethertype != _ETH_P_IP:
            return
        packet = frame[_AHEAD:]
        header = ipv4.parse(packet)
        if reason in (FRAGMENT_IN, FRAGMENT_OUT):
            if header and header.offset:
                self._hold(header, frame, now)
        elif reason in self._messages:
            self._tell(packet, self._messages[reason], now)
        elif reason == TOO_BIG and (pieces := ipv4.fragments(packet, about)):
            back = _HEADER.pack(LOCAL, FRAGMENT_OUT, ifindex, 0, _ETH_P_IP) + _NO_LINK  # of the WAN it was on
            for piece in pieces:
                self._put_back(back + piece)
        elif reason == TOO_BIG:
            self._tell(packet, refusal.TOO_BIG, now, about)
        elif reason in (ALG_IN, ALG_OUT) and header and header.flags & ipv4.MORE_FRAGMENTS:
            self._hold(header, frame, now)
        elif reason in (ALG_IN, ALG_OUT):
            self._give_to_alg(frame[:_AHEAD], packet, ipv4.LONGEST)

    def _hold(self, header: ipv4.Header, frame: bytes, now: float) -> None:
        """A fragment; an ALG's datagram that is whole with it is read."""
        key = Key(header.src, header.dst, header.id, header.protocol)
        part = Part(header.offset, header.total - header.length, bool(header.flags & ipv4.MORE_FRAGMENTS))
        if not self._orphans.hold(key, part, frame, now) or not self._orphans.is_whole(key):
            return
        frames = self._orphans.release(key, now)
        pieces = [each[_AHEAD:] for each in frames]
        if whole := ipv4.joined(pieces):
            first = next(each for each in frames if each[1] in (ALG_IN, ALG_OUT))
            self._give_to_alg(first[:_AHEAD], whole, max(map(len, pieces)))
        else:  # some contradict others
            self._not_released(len(frames))

    def _give_to_alg(self, ahead: bytes, packet: bytes, longest: int) -> None:
        """What becomes of it goes back, in pieces no longer than they were."""
        _, reason, ifindex, about, _ = _HEADER.unpack_from(ahead)
        out = self._way_out(reason, about, packet, ahead[_HEADER.size :])
        for direction, text in self._read(reason == ALG_IN, about, packet):
            way, later = (ALG_IN, FRAGMENT_IN) if direction else (ALG_OUT, FRAGMENT_OUT)
            link = _NO_LINK if direction else out
            pieces = ipv4.fragments(text, longest) if len(text) > longest else None
            for nth, piece in enumerate(pieces or [text]):
                back = _HEADER.pack(LOCAL, later if nth else way, ifindex, 0, _ETH_P_IP)
                self._put_back(back + link + piece)

    def _way_out(self, reason: int, mapping: int, packet: bytes, link: bytes) -> bytes:
        """The Ethernet header of what goes to a session's remote, as the latest that it was sent had it."""
        addresses = packet[12:20]
        if reason == ALG_IN:
            return self._ways.get((mapping, addresses[:4]), _NO_LINK)
        self._ways[mapping, addresses[4:]] = link
        self._ways.move_to_end((mapping, addresses[4:]))
        if len(self._ways) > WAYS:
            self._ways.popitem(last=False)
        return link

    def _read(self, inbound: bool, mapping: int, packet: bytes) -> list[tuple[int, bytes]]:
        try:
            return self._algs(int(inbound), mapping, packet)
        except Exception:  # a mistake of ours: traffic goes on
            log.exception("a packet has passed unread")
            return [(int(inbound), packet)]

    def _put_back(self, frame: bytes) -> bool:
        try:
            os.write(self._tap.fd, frame)
        except OSError:  # no memory, or the TAP is down: the sender will notice, as with any loss
            return False
        return True

    def _tell(self, packet: bytes, kind: tuple[int, int], now: float, mtu: int = 0) -> None:
        made = refusal.message(packet, kind, mtu)
        if made is None:
            return
        destination, text = made
        told = self._allowance.take(destination, now)
        if told:
            try:
                self._icmp.sendto(text, (str(destination), 0))
            except OSError:  # no route to it, a broadcast address, no room in the queue
                told = False
        self.counts["told" if told else "untold"] += 1


def _icmp_socket() -> socket.socket:
    """Sends only. The kernel routes what it sends, and gives it the source address of that way."""
    made = socket.socket(
        socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.IPPROTO_ICMP
    )
    made.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, refusal.PRECEDENCE)
    made.setsockopt(_SOL_RAW, _ICMP_FILTER, _NO_TYPE)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # the least there is, for types that no filter names
    return made


def known_firsts(tables: Tables, keys: Iterable[Key]) -> list[Key]:
    """Those whose first fragment has left its translation, as ``fragment_recall`` of bpf/fragment.h sees it: were we
    to take an old one for known, its pieces would come back.
    """
    table, limit, now = tables.maps["fragments"], int(tables.settings["fragment"]), bpf.jiffies()
    firsts = {key: table.get(_fragment_key(key, table.key)) for key in keys}
    seen_at = {key: first["seen_at"] for key, first in firsts.items() if first is not None}
    ages = expiry.age(now, np.array([*seen_at.values()], np.uint32))
    return [key for key, age in zip(seen_at, ages, strict=True) if age <= limit]


def _fragment_key(key: Key, layout: np.dtype[Any]) -> Any:
    src, dst, id_ = (int.from_bytes(each, sys.byteorder) for each in (key.src, key.dst, key.id))
    return np.array((([src],), ([dst],), id_, key.protocol), layout)
