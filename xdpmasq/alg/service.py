"""The agent's part of ALGs: packets that come by the punt port are read, edited, and given back.

Whose a packet is stands in the kernel's tables (``struct control`` of bpf/types.h), so an agent that was started anew
goes on where it can: it knows the shifts of an earlier one, and takes the first text that it sees of a session for
the beginning of a message.

An ALG is somebody's code, and what it reads is anybody's text. Of one that raises, returns what it may not, or takes
longer than :data:`LONG_S`, the message passes unchanged. A session with a late message is not read any further, and
an ALG that is late :data:`LATE_MOST` times running is asked nothing for :data:`PAUSE_S`: with one that always is, the
agent would do nothing else; what one peer can say that takes long does not switch it off for all others.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any, NamedTuple, NoReturn, TypeVar

from xdpmasq import abi, bpf
from xdpmasq.abi import CLASSES, EXTERNAL_SLOTS, PORTS
from xdpmasq.alg import packets, switches
from xdpmasq.alg.api import Address, Alg, Control, Endpoint, Refused, Side, Unparsed
from xdpmasq.alg.openings import SessionsOpenings
from xdpmasq.alg.packets import Packet
from xdpmasq.alg.stream import ROUND, Outcome, Shifts, Step, Stream, before
from xdpmasq.alg.timelimit import TimeLimit, TooLongError
from xdpmasq.errors import ConfigError
from xdpmasq.pinholes import Pinholes
from xdpmasq.tables import Tables

log = logging.getLogger("xdpmasq")

LONG_S = 0.1
LATE_MOST = 8  # all that the agent does waits meanwhile
PAUSE_S = 60.0
WINDOW = 1024  # of an acknowledgement to somebody whose other side has not said one yet
SIDES = (Side.INSIDE, Side.OUTSIDE)  # by enum direction


T = TypeVar("T")


class _Syn(NamedTuple):
    sequence: int
    text: bytes


@dataclass
class _Session:
    alg: Alg
    control: Control
    openings: SessionsOpenings
    opened_at: int
    over: bool = False
    streams: list[Stream] = field(default_factory=list)  # by direction
    window: list[int] = field(default_factory=lambda: [WINDOW, WINDOW])
    acked: list[int] = field(default_factory=lambda: [0, 0])
    asked: list[_Syn | None] = field(default_factory=lambda: [None, None])
    begun: list[int] = field(default_factory=list)  # numbers of the SYNs of the connection


class _NothingOpens:
    """:class:`xdpmasq.alg.api.Openings` for what cannot be changed any more."""

    def open(self, *_: Any, **__: Any) -> NoReturn:
        raise Refused("nobody would be told of it")

    follow = open

    def external(self, *_: Any) -> None:
        return None

    internal = external


class Service:
    """Reads what is punted.

    Args:
        find: an ALG by its name; raises ConfigError.

    Attributes:
        pinholes: where sessions to come have theirs.
        counts: by ALG: messages that came, of those edited, unparsed, refused, failed, late and unasked ones.
    """

    def __init__(self, tables: Tables, pinholes: Pinholes, find: Callable[[str], Alg]) -> None:
        self._tables, self.pinholes, self._find = tables, pinholes, find
        self._controls, self._algs = tables.maps["controls"], tables.maps["algs"]
        self._sessions: dict[bytes, _Session] = {}
        self._loaded: dict[str, Alg | None] = {}
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._blamed: set[tuple[str, str]] = set()
        self._late: Counter[str] = Counter()  # running
        self._pauses_until: dict[str, float] = {}  # time.monotonic()

    # --- packets

    def take(self, direction: int, mapping: int, packet: bytes) -> list[tuple[int, bytes]]:
        """What becomes of a packet: those that go on, each with its direction (0: out, 1: in).

        Args:
            mapping: slot of the mapping that it is of.
        """
        parsed = packets.parse(packet)
        session = self._session(direction, mapping, parsed) if parsed else None
        if not parsed or not session:
            return [(direction, packet)]
        if parsed.protocol == "udp":
            return [(direction, self._datagram(session, direction, parsed, packet))]
        return self._segment(session, direction, parsed)

    def _datagram(self, session: _Session, direction: int, parsed: Packet, packet: bytes) -> bytes:
        text = self._edited(session, SIDES[direction], parsed.text)
        self._end_when_over(session)
        try:
            return packet if text == parsed.text else packets.datagram(parsed, text)
        except ValueError:
            self.counts[session.alg.name]["failed"] += 1
            return packet

    def _segment(self, session: _Session, direction: int, parsed: Packet) -> list[tuple[int, bytes]]:
        stream = session.streams[direction]
        session.window[direction] = parsed.window
        if parsed.flags & packets.ACK:
            self._acknowledges(session, 1 - direction, parsed.ack)
        if parsed.flags & packets.SYN:
            self._handshake(session, direction, parsed)
            return [(direction, each) for each in packets.segments(parsed, parsed.sequence, parsed.text)]
        outcome = stream.segment(parsed.sequence, parsed.text, last=bool(parsed.flags & packets.FIN))
        if stream.jumped:  # or whoever makes us miss something chooses where we begin to read
            session.control.memory["over"] = True
        released = stream.release() if session.control.memory.get("over") else ()
        if outcome.shifted:
            self._write(session)
        self._end_when_over(session)
        pieces = [
            (direction, each)
            for piece in (*outcome.pieces, *released)
            for each in packets.segments(parsed, piece.sequence, piece.text)
        ]
        return pieces + self._acknowledged(session, direction, parsed, outcome)

    def _end_when_over(self, session: _Session) -> None:
        """What is not read any more need not come by here: as soon as nothing is held."""
        if session.control.memory.get("over") and not session.over and all(each.settled for each in session.streams):
            session.over = True
            for each in session.streams:
                each.fold()
            self._write(session)

    def _handshake(self, session: _Session, direction: int, parsed: Packet) -> None:
        """A connection begins when a SYN has been answered by another; one alone may be anybody's (RFC 5961).

        Its text (RFC 7413) goes on as it came: only the answer tells whether the other side takes any of it.
        """
        answer, question = _Syn(parsed.sequence, parsed.text), session.asked[1 - direction]
        known = session.asked[direction]
        if known and known.sequence == answer.sequence and len(known.text) > len(answer.text):
            answer = known  # sent again, without the text
        session.asked[direction] = answer
        if not parsed.flags & packets.ACK or question is None:
            return
        taken = before((question.sequence + 1) % ROUND, parsed.ack)
        begun = [question.sequence, answer.sequence]
        if not 0 <= taken <= len(question.text) or begun == session.begun:  # said again
            return
        session.begun = begun
        session.asked = [None, None]  # another answer is none without another question
        self._begin(session)
        self._acknowledges(session, 1 - direction, parsed.ack)
        for way, syn, text in ((1 - direction, question, question.text[:taken]), (direction, answer, answer.text)):
            session.streams[way].begin(syn.sequence, len(text))
            if text:
                self._gone(session, SIDES[way], text)

    def _gone(self, session: _Session, side: Side, text: bytes) -> None:
        """It has gone on as it was, and its ALG has only to know where what follows begins."""
        counts = self.counts[session.alg.name]
        counts["messages"] += 1
        found = self._trusted(session, lambda: session.alg.translate(text, side, session.control, _NothingOpens()))
        if found not in (None, text):
            counts["unparsed"] += 1

    def _acknowledged(
        self, session: _Session, direction: int, parsed: Packet, outcome: Outcome
    ) -> list[tuple[int, bytes]]:
        """To the sender of what is held. The numbers are as the other side would say them."""
        if outcome.acked is None:
            return []
        ends = session.control.remote, session.control.external
        source, destination = ends if direction == 0 else (session.control.internal, session.control.remote)
        answer = packets.acknowledgement(
            parsed,
            source,
            destination,
            sequence=parsed.ack,
            ack=session.streams[direction].shifts.seen(outcome.acked),
            window=session.window[1 - direction],
        )
        return [(1 - direction, answer)]

    # --- sessions

    def _session(self, direction: int, mapping: int, parsed: Packet) -> _Session | None:
        remote = parsed.source if direction else parsed.destination
        owner = abi.control_key(mapping, remote)
        record = self._controls.get(owner)
        if record is None:  # it has just ended
            self._sessions.pop(owner, None)
            return None
        known = self._sessions.get(owner)
        if known is None or known.opened_at != record["opened_at"]:
            made = self._open(owner, mapping, record, parsed.protocol, packets.endpoint(remote))
            if made is None:
                return None
            self._sessions[owner] = known = made
        if known.streams:
            for nth, ack in enumerate(record["acked"].tolist()):
                self._acknowledges(known, nth, ack)
        return known

    def _acknowledges(self, session: _Session, direction: int, ack: int) -> None:
        """Of what goes in that direction. The kernel knows of bare acknowledgements, we of those with a text."""
        known = session.acked[direction]
        if ack and (not known or before(known, ack) > 0):
            session.acked[direction] = ack

    def _open(self, owner: bytes, mapping: int, record: Any, protocol: str, remote: Endpoint) -> _Session | None:
        settings, external = self._tables.settings, mapping // EXTERNAL_SLOTS
        address = IPv4Address(settings["external"]["word"][external, :1].tobytes())
        inner = record["internal"]
        internal = Endpoint(IPv4Address(inner["addr"]["word"][:1].tobytes()), socket.ntohs(int(inner["port"])))
        from_outside = bool(record["from_outside"])
        alg = self._alg_of(protocol, internal.port if from_outside else remote.port, internal)
        if alg is None:
            return None
        control = Control(protocol, internal, Endpoint(address, mapping % PORTS), remote, from_outside)
        openings = SessionsOpenings(
            self.pinholes,
            self._tables,
            owner,
            int(settings["external_wan"][external]),
            control,
            alg.pinholes,
            alg.name,
        )
        session = _Session(alg, control, openings, int(record["opened_at"]))
        if protocol == "tcp":
            self._begin(session, [_shifts(each) for each in record["shifts"]])
        return session

    def _begin(self, session: _Session, shifts: Sequence[Shifts | None] = (None, None)) -> None:
        """Both directions anew."""
        session.over = False
        session.control.memory.clear()
        session.acked = [0, 0]
        session.streams = [
            Stream(
                lambda data, side=SIDES[nth]: self._ready(session, side, data),  # type: ignore[misc]
                lambda data, side=SIDES[nth]: self._edited(session, side, data),  # type: ignore[misc]
                session.alg.longest,
                lambda nth=nth: self._delivered(session, nth),  # type: ignore[misc]
                shifts[nth],
            )
            for nth in range(2)
        ]

    def _alg_of(self, protocol: str, port: int, internal: Endpoint) -> Alg | None:
        assert isinstance(internal.address, IPv4Address)
        bits = switches.ALG_ANY + internal.address.max_prefixlen
        class_ = CLASSES.index(protocol)
        record = self._algs.get((bits, class_, socket.htons(port), abi.addr(internal.address)))
        if record is None:
            return None
        return self._alg(switches.name_of(record))

    def _alg(self, name: str) -> Alg | None:
        if name not in self._loaded:
            try:
                self._loaded[name] = self._find(name)
            except ConfigError as error:
                log.warning("%s; its sessions are carried without it", error)
                self._loaded[name] = None
        return self._loaded[name]

    def _delivered(self, session: _Session, direction: int) -> int | None:
        acked = session.acked[direction]
        return session.streams[direction].shifts.acked(acked) if acked else None

    def _write(self, session: _Session) -> None:
        """What the kernel goes by: shifts, and whether it need not come by here any more."""
        record = self._controls.get(session.openings.owner)
        if record is None:
            return
        record["over"] = session.over
        for direction, stream in enumerate(session.streams):
            shifts, steps = record["shifts"][direction], stream.shifts.steps
            shifts["before"], shifts["count"] = stream.shifts.base, len(steps)
            for nth, step in enumerate(steps):
                shifts["shift"][nth] = tuple(step)
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            self._controls.set(session.openings.owner, record, bpf.UPDATE_EXIST)

    # --- texts

    def _ready(self, session: _Session, side: Side, data: bytes) -> int:
        alg = session.alg
        if session.control.memory.get("over"):
            return len(data)
        found = self._trusted(session, lambda: _length(alg.ready(data, side, session.control), len(data)))
        return len(data) if found is None else found

    def _edited(self, session: _Session, side: Side, data: bytes) -> bytes:
        alg, counts = session.alg, self.counts[session.alg.name]
        if session.control.memory.get("over"):
            return data
        counts["messages"] += 1
        session.openings.asked = 0
        found = self._trusted(session, lambda: _text(alg.translate(data, side, session.control, session.openings)))
        if found is None:
            return data
        counts["edited"] += found != data
        return found

    def _trusted(self, session: _Session, call: Callable[[], T]) -> T | None:
        """What it returns; None, and it is counted, where it does not."""
        alg, counts = session.alg, self.counts[session.alg.name]
        if time.monotonic() < self._pauses_until.get(alg.name, 0.0):
            counts["unasked"] += 1
            return None
        try:
            with TimeLimit(LONG_S, spared=SessionsOpenings.__module__):
                found = call()
            self._late[alg.name] = 0
            return found
        except Refused:
            counts["refused"] += 1
        except Unparsed:
            counts["unparsed"] += 1
        except TooLongError:
            counts["late"] += 1
            self._blame(alg, f"took longer than {LONG_S * 1000:.0f} ms", None)
            session.control.memory["over"] = True
            self._late[alg.name] += 1
            if self._late[alg.name] >= LATE_MOST:
                log.warning("the ALG %s was late %d times running; it pauses for %d s", alg.name, LATE_MOST, PAUSE_S)
                self._late[alg.name] = 0
                self._pauses_until[alg.name] = time.monotonic() + PAUSE_S
        except Exception as error:
            counts["failed"] += 1
            self._blame(alg, f"failed: {error!r}", error)
        return None

    def _blame(self, alg: Alg, what: str, error: Exception | None) -> None:
        kind = "late" if error is None else type(error).__name__
        if (alg.name, kind) not in self._blamed:
            self._blamed.add((alg.name, kind))
            log.warning("the ALG %s %s; the message has passed unchanged", alg.name, what, exc_info=error)

    # --- the rest

    @property
    def report(self) -> dict[str, dict[str, int]]:
        """The counts, for the manifest."""
        return {name: dict(counts) for name, counts in sorted(self.counts.items())}

    def tick(self) -> None:
        """Forgets sessions that have ended, reads no more in those whose ALG was switched off.

        What another session has had followed is, as long as it lives.
        """
        if self._sessions:
            self._look_after_sessions()
        switches.forget(self._tables)
        for name in switches.names(self._tables):  # or its first message would wait for its module
            self._alg(name)

    def _look_after_sessions(self) -> None:
        """The table is read as a whole, and each question asked once: there may be thousands of sessions."""
        records: dict[bytes, tuple[int, list[int]]] = {}
        for keys, values in self._controls.items(chunk=self._controls.max_entries):
            names = (key.tobytes() for key in keys)
            records |= zip(
                names, zip(values["opened_at"].tolist(), values["acked"].tolist(), strict=True), strict=True
            )
        readers: dict[tuple[str, Address, int], Alg | None] = {}
        followed: set[tuple[str, Address, int]] = set()
        for name, session in list(self._sessions.items()):
            opened_at, acked = records.get(name, (None, []))
            if opened_at != session.opened_at:
                del self._sessions[name]
                continue
            control = session.control
            port = control.internal.port if control.from_outside else control.remote.port
            about = control.protocol, control.internal.address, port
            if about not in readers:
                readers[about] = self._alg_of(control.protocol, port, control.internal)
            if readers[about] is not session.alg:
                control.memory["over"] = True
            elif control.protocol == "tcp" and not session.over and about not in followed:
                followed.add(about)
                session.openings.follow_on(port)
            for nth, ack in enumerate(acked):
                self._acknowledges(session, nth, ack)
            if any([stream.fold() for stream in session.streams]):
                self._write(session)


def _shifts(record: Any) -> Shifts:
    steps = record["shift"][: int(record["count"])]
    return Shifts(int(record["before"]), [Step(*map(int, each)) for each in steps])


def _length(found: Any, most: int) -> int:
    if not isinstance(found, int) or not 0 <= found <= most:
        raise ValueError(f"ready() of {most} bytes returned {found!r}")
    return found


def _text(found: Any) -> bytes:
    if not isinstance(found, bytes):
        raise TypeError(f"translate() returned {type(found).__name__}, not bytes")
    return found
