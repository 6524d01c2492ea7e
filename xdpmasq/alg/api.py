"""What an ALG is: a class that reads messages, asks for pinholes, and returns the messages as they are to go on.

An ALG has no sockets, clocks, tables or threads. It gets bytes and gives bytes back; sequence numbers,
retransmissions, checksums and the order of segments are the agent's business. All that it may ask for is in
:class:`Openings`.

A message is a datagram, or of TCP what :meth:`Alg.ready` says is one or several whole ones at the beginning of what a
side has sent. Of what an ALG cannot read it says so, by raising :class:`Unparsed`; it passes as it came, counted.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Any, ClassVar, Protocol

Address = IPv4Address | IPv6Address


class Side(enum.Enum):
    """Who has sent a message."""

    INSIDE = "inside"
    OUTSIDE = "outside"


@dataclass(frozen=True, slots=True)
class Endpoint:
    address: Address
    port: int

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


class Unparsed(Exception):
    """The message is not understood, or is not to be: it passes unchanged."""


class Refused(Unparsed):
    """There is no such pinhole: not the host's own address, a port below 1024, too many, or no port is left."""


@dataclass(frozen=True, slots=True)
class Control:
    """The session that messages belong to.

    Attributes:
        protocol: "tcp" or "udp".
        external: what the remote knows the internal endpoint as.
        from_outside: the remote has opened it: the server is inside, behind a forward.
        memory: the ALG's own, for this session; empty at its beginning, and again when the agent has been restarted.
            With a true value for "over" in it, all that the session still says passes, and the ALG need not be asked.
    """

    protocol: str
    internal: Endpoint
    external: Endpoint
    remote: Endpoint
    from_outside: bool = False
    memory: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def server(self) -> Side:
        return Side.INSIDE if self.from_outside else Side.OUTSIDE

    @property
    def client(self) -> Side:
        return Side.OUTSIDE if self.from_outside else Side.INSIDE


class Openings(Protocol):
    """The NAT's side, for the messages of one session."""

    def open(
        self,
        protocol: str,
        internal: Endpoint,
        *,
        remote: Address | None,
        remote_port: int | None = None,
        lasts_s: float = 120.0,
        sessions: int = 1,
        pair: bool = False,
    ) -> Endpoint:
        """A pinhole: who comes to the endpoint returned, from ``remote`` (None: anybody), is led to ``internal``.

        The same ``internal`` gets the same endpoint again while its pinhole or a session of it lives, so that
        a message which is repeated gets the same text.

        Args:
            protocol: "tcp", "udp", or "gre", whose port is PPTP's call ID.
            internal: its address must be that of the session's own internal host, its port 1024 or above.
            lasts_s: it is gone after so long, unused; at most 300.
            sessions: it serves that many, then it is gone; 0: all that come while it lasts.
            pair: two neighbouring ports, the first one even, for the internal port (even, too) and the next: RTP
                and RTCP.

        Raises:
            Refused: not that one, or one message has asked for too many.
        """

    def external(self, protocol: str, internal: Endpoint) -> Endpoint | None:
        """What an internal endpoint is known as outside, when it has a mapping; opens nothing."""

    def internal(self, protocol: str, external: Endpoint) -> Endpoint | None:
        """Whose an external endpoint is, if it is the session's own host's."""

    def follow(self, endpoint: Endpoint) -> None:
        """The same ALG reads the TCP sessions that are opened to an endpoint, too.

        Args:
            endpoint: of the session's own remote, or, as inside, of its host, where a pinhole is open. It is
                forgotten 300 s later, but not while a session to it goes on.

        Raises:
            Refused: as many as :attr:`Alg.pinholes` are followed already.
        """


class Alg:
    """One protocol; subclasses are made without arguments, once.

    Attributes:
        name: as users write it.
        ports: of the servers, by protocol; users may name others.
        longest: bytes of one side that are held while a message is not complete (TCP).
        pinholes: ports that a session may have open at once; a pair has two.
    """

    name: ClassVar[str]
    ports: ClassVar[Mapping[str, tuple[int, ...]]]
    longest: ClassVar[int] = 4096
    pinholes: ClassVar[int] = 1

    def ready(self, data: bytes, side: Side, control: Control) -> int:
        """How many bytes at the beginning of ``data`` can be translated now; the rest waits for more (TCP only).

        ``data`` begins where a message does. Bytes that will never matter need not wait: the sender may wait for an
        answer to them. What is held longer than :attr:`longest` passes unchanged. The session's
        memory is only to be read here: the same bytes come again with more behind them.
        """
        return len(data)

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        """The messages in ``data``, as they are to go on: the same bytes where nothing needs to be changed.

        Raises:
            Unparsed: they pass unchanged.
        """
        raise NotImplementedError
