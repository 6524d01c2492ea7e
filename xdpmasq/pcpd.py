"""The port where internal hosts ask for mappings: sockets on the LANs' addresses, bounds, announcements.

A socket is bound to one address of one LAN, and hears from that LAN only: a packet that came by another interface,
the WAN above all, is not read further (RFC 6887 section 8.2). What comes faster than is answered stays in the
socket's buffer, where the kernel drops it: a flood costs the agent a bounded share of its time.
"""

from __future__ import annotations

import logging
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, Protocol

from xdpmasq import pcp
from xdpmasq.allowance import Allowance, Bucket
from xdpmasq.errors import BusyError

log = logging.getLogger("xdpmasq")

PORT = 5351
ANNOUNCED_TO = ("224.0.0.1", 5350)
ANNOUNCEMENTS, FIRST_PAUSE_S = 10, 0.25  # each pause twice the one before (RFC 6886 section 3.2.1)
FROM_EACH, FROM_ALL = (10.0, 50.0), (50.0, 100.0)  # requests a second, and at once
READ = (1000.0, 200.0)  # datagrams a second that are looked at, and at once
PAUSE_S = 0.1  # when that is used up
_BUFFER = 65536  # bytes that wait in a socket

_IP_PKTINFO = 8  # Python has no name for it
_SO_RXQ_OVFL = 40  # tells how many datagrams the kernel has dropped
_PKTINFO = struct.Struct("=I4s4s")  # struct in_pktinfo
_DROPPED = struct.Struct("=I")
_CONTROL = socket.CMSG_SPACE(_PKTINFO.size) + socket.CMSG_SPACE(_DROPPED.size)


class Answerer(Protocol):
    """:class:`xdpmasq.pcpserver.Server`."""

    def answer(self, message: bytes, client: IPv4Address) -> bytes | None: ...
    def announcements(self) -> tuple[bytes, ...]: ...


@dataclass(frozen=True)
class Place:
    """Where to listen: an address of a LAN."""

    ifindex: int
    address: IPv4Address


@dataclass(frozen=True)
class Datagram:
    text: bytes
    client: tuple[str, int]
    ifindex: int


class _Socket:
    """One place's. Raises OSError where it cannot be had."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.lost = 0  # dropped by the kernel
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RXQ_OVFL, 1)
            self._socket.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            to = struct.pack("=4s4si", bytes(4), place.address.packed, place.ifindex)  # struct ip_mreqn
            self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, to)
            self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
            self._socket.bind((str(place.address), PORT))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def receive(self) -> Datagram | None:
        """What has come, longer messages cut to one byte more than is allowed; None: nothing."""
        try:
            text, control, _, client = self._socket.recvmsg(pcp.LONGEST + 1, _CONTROL)
        except OSError:  # nothing, or an ICMP error about an answer of ours
            return None
        ifindex = 0
        for level, kind, data in control:
            if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
                ifindex = _PKTINFO.unpack(data)[0]
            elif (level, kind) == (socket.SOL_SOCKET, _SO_RXQ_OVFL):
                self.lost = _DROPPED.unpack(data)[0]
        return Datagram(text, client, ifindex)

    def send(self, text: bytes, to: tuple[str, int]) -> None:
        try:
            self._socket.sendto(text, to)
        except OSError as error:  # the interface is down, a neighbour gone: it will ask again
            log.debug("no answer to %s: %s", to[0], error)


class Service:
    """Listens, answers within bounds, announces.

    Args:
        is_internal: whether a client's own packets come by the interface of that index.
        changing: held while answers may change forwards; raises BusyError.

    Attributes:
        answered, dropped: requests since the start; dropped ones were too many, or from where none may come.
        due_at: when :meth:`serve` is needed next if nothing comes before; monotonic seconds.
    """

    def __init__(
        self,
        server: Answerer,
        selector: selectors.BaseSelector,
        is_internal: Callable[[IPv4Address, int], bool],
        changing: Callable[[], Any],
    ) -> None:
        self._server, self._selector = server, selector
        self._is_internal, self._changing = is_internal, changing
        self._sockets: dict[Place, _Socket] = {}
        self._refused: dict[Place, str] = {}
        self._read = Bucket(*READ)
        self._allowance = Allowance(FROM_EACH, FROM_ALL)
        self._resume_at: float | None = None
        self._announce_at: float | None = None
        self._announced = 0
        self._lost = 0
        self.answered = self._unwanted = 0

    # --- where

    def follow(self, places: Iterable[Place]) -> None:
        """Listens in these places and no others."""
        wanted = set(places)
        for place in self._sockets.keys() - wanted:
            self._close(place)
        for place in wanted - self._sockets.keys():
            self._open(place)
        self._refused = {place: why for place, why in self._refused.items() if place in wanted}

    def _open(self, place: Place) -> None:
        try:
            self._sockets[place] = _Socket(place)
        except OSError as error:
            why = error.strerror or str(error)
            if self._refused.get(place) != why:
                log.warning("cannot listen at %s, UDP port %d: %s", place.address, PORT, why)
            self._refused[place] = why
            return
        self._refused.pop(place, None)
        if self._resume_at is None:
            self._selector.register(self._sockets[place], selectors.EVENT_READ)

    def _close(self, place: Place) -> None:
        gone = self._sockets.pop(place)
        if self._resume_at is None:
            self._selector.unregister(gone)
        self._lost += gone.lost
        gone.close()

    def drop(self) -> None:
        """Listens nowhere any more."""
        self.follow(())

    @property
    def listening(self) -> Sequence[str]:
        return sorted(str(place.address) for place in self._sockets)

    @property
    def dropped(self) -> int:
        return self._unwanted + self._lost + sum(each.lost for each in self._sockets.values())

    # --- answering

    @property
    def due_at(self) -> float:
        return min(each for each in (self._resume_at, self._announce_at, float("inf")) if each is not None)

    def serve(self) -> None:
        """Answers what has come, and announces when it is time."""
        now = time.monotonic()
        if self._announce_at is not None and now >= self._announce_at:
            self._announce(now)
        if self._resume_at is not None:
            if now < self._resume_at:
                return
            self._listen_again()
        for each in list(self._sockets.values()):
            while (datagram := each.receive()) is not None:
                self._answer(each, datagram, now)
                if not self._may_read(now):
                    return

    def _may_read(self, now: float) -> bool:
        if self._read.has_one(now):
            self._read.take()
            return True
        for each in self._sockets.values():
            self._selector.unregister(each)
        self._resume_at = now + PAUSE_S
        return False

    def _listen_again(self) -> None:
        self._resume_at = None
        for each in self._sockets.values():
            self._selector.register(each, selectors.EVENT_READ)

    def _answer(self, by: _Socket, datagram: Datagram, now: float) -> None:
        client = IPv4Address(datagram.client[0])
        if (
            datagram.ifindex != by.place.ifindex
            or not self._allowance.take(client, now)
            or not self._is_internal(client, datagram.ifindex)
        ):
            self._unwanted += 1
            return
        try:
            with self._changing():
                answer = self._server.answer(datagram.text, client)
        except BusyError:  # a command is changing forwards; clients ask again
            self._unwanted += 1
            return
        if answer is not None:
            self.answered += 1
            by.send(answer, datagram.client)

    # --- announcing

    def announce(self) -> None:
        """Tells every host, several times, that the epoch has begun anew."""
        self._announced = 0
        self._announce_at = time.monotonic()

    def _announce(self, now: float) -> None:
        for text in self._server.announcements():
            for each in self._sockets.values():
                each.send(text, ANNOUNCED_TO)
        pause = FIRST_PAUSE_S * 2**self._announced
        self._announced += 1
        self._announce_at = now + pause if self._announced < ANNOUNCEMENTS else None
