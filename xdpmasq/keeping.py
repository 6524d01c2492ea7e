"""Sessions in a file, to be there again after a reboot: `sessions save` and `sessions load`.

The file is JSON lines: a header, and then for each session the words of `sessions list --json` and what the tables
know beyond them. Times are in seconds before the header's ``saved_at``. Time goes on while the machine is off: a
session comes back with what is left of its idle time.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import numpy as np

from xdpmasq import __version__, abi, bpf, listing, presence, programs, sessions, sockets
from xdpmasq.abi import CLASSES, EXTERNAL_SLOTS, LIFE_STATIC, PORTS
from xdpmasq.datapath import Attached
from xdpmasq.errors import ConfigError, HostError

FORMAT = 1
COUNTED, FROM_OUTSIDE, ALG = 2, 4, 16  # SESSION_*
SIDES = ("out", "in")  # by enum direction

# By enum restored of bpf/restore.c; the first are those that did come back.
RESULTS = (
    "loaded",
    "external port taken",
    "external port outside the pool",
    "internal endpoint has another mapping",
    "session there already",
    "internal host at its limit",
    "no room",
)
_OTHER_ADDRESS, _OVER, _NO_LAN, _OWN = (
    "other external address",
    "idle time over",
    "internal host behind no LAN",
    "port of a service of the gateway",
)
_SAVED = struct.Struct("=4s4sHHB3xIIIIIIIBB2xQQQQ")  # struct saved of bpf/restore.c
_AT = 16  # SAVED_AT
_AGE_MOST_S = 1_000_000  # ages in jiffies have 31 bits


# --- saving ----------------------------------------------------------------------------------------


def save(attached: Attached, path: Path) -> tuple[int, int]:
    """Writes all sessions into a file, readable for its owner only; in place of what is there, or not at all.

    Returns:
        How many were saved, and how many left out: those of whose texts an ALG has changed the length, and the
        gateway's own.

    Raises:
        HostError: the file cannot be written.
    """
    now, saved_at = attached.now(), time.time()
    slots = attached.live_slots()
    rows = attached.rows(slots)
    table = sessions.read(rows, attached.settings, now, attached.hz)
    rows = rows[table.slot]
    stays = ~_shifted(attached, rows) & (
        rows["in"]["new_addr"]["word"][:, 0] != rows["out"]["new_addr"]["word"][:, 0]
    )
    table, rows = table[stays], rows[stays]
    header = {
        "xdpmasq_sessions": FORMAT,
        "version": __version__,
        "saved_at": round(saved_at, 3),
        "externals": [str(place.address) for place in attached.places if place.address],
        "count": len(table),
    }
    more = map(_MORE.__mod__, zip(*_more_columns(attached, rows, now), strict=True))
    shown = (each for block in listing.json_objects(table) for each in block)
    _write(path, f"{json.dumps(header)}\n", (f"{one[:-1]}, {two}}}\n" for one, two in zip(shown, more, strict=True)))
    return len(table), int((~stays).sum())


_MORE = (
    '"age_s": %.1f, "silent_s": {"out": %.2f, "in": %.2f}, "tcp_seen": {"out": %d, "in": %d}, '
    '"acked": {"out": %d, "in": %d}, "from_outside": %s, "counted": %s, "shared": %s'
)


def _more_columns(attached: Attached, rows: bpf.Array, now: int) -> Iterator[list[Any]]:
    moment, words = np.uint32(now & 0xFFFFFFFF), ("false", "true")
    yield np.minimum((moment - rows["opened_at"]) / attached.hz, _AGE_MOST_S).tolist()
    for side in SIDES:  # signed, as another CPU's jiffies may be ahead
        silent = (moment - rows[side]["last_seen"]).view(np.int32)
        yield np.clip(silent / attached.hz, 0, _AGE_MOST_S).tolist()
    for side in SIDES:
        yield rows[side]["tcp_seen"].tolist()
    for side in SIDES:
        yield sessions.host_order(rows[side]["last_ack"]).tolist()
    owners = attached.sessions[rows["mapping"]]
    shared = (owners["life"] & LIFE_STATIC == 0) & (
        (owners["in"]["new_addr"]["word"][:, 0] != rows["in"]["new_addr"]["word"][:, 0])
        | (owners["in"]["new_port"] != rows["in"]["new_port"])
    )
    for marks in (rows["out"]["marks"] & FROM_OUTSIDE, rows["out"]["marks"] & COUNTED, shared):
        yield [words[bool(each)] for each in marks]


def _shifted(attached: Attached, rows: bpf.Array) -> Any:
    """Which TCP connections would break without the agent's memory of how much longer or shorter texts became."""
    found = set()
    for keys, controls in attached.maps["controls"].items():
        changed = (controls["shifts"]["count"] != 0).any(axis=1) | (controls["shifts"]["before"] != 0).any(axis=1)
        found |= {
            (int(key["mapping"]), int(key["remote"]["word"][0]), int(key["remote_port"])) for key in keys[changed]
        }
    out = rows["out"]
    names = zip(
        *(each.tolist() for each in (rows["mapping"], out["remote_addr"]["word"][:, 0], out["remote_port"])),
        strict=True,
    )
    return np.array([name in found for name in names], bool) if found else np.zeros(len(rows), bool)


def _write(path: Path, header: str, lines: Iterator[str]) -> None:
    temporary = None
    try:
        number, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)  # mode 0600
        with open(number, "w", encoding="utf-8") as file:
            file.write(header)
            file.writelines(lines)
            file.flush()
            os.fsync(number)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            os.unlink(temporary)
        why = error.strerror or str(error)
        raise HostError(f"cannot write {path}", why, "what was there is there still; name another file") from error


# --- loading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """One session of a file; times in seconds as of the file's."""

    protocol: str
    internal: tuple[IPv4Address, int]
    external: tuple[IPv4Address, int]
    remote: tuple[IPv4Address, int]
    left_s: float
    age_s: float
    silent_s: tuple[float, float]
    tcp_seen: tuple[int, int]
    acked: tuple[int, int]
    traffic: tuple[int, int, int, int]
    marks: int
    shared: bool

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Kept:
        """From a line; raises KeyError, TypeError or ValueError where it is none of ours."""
        protocol = fields["protocol"]
        if protocol not in CLASSES:
            raise ValueError(f"there is no protocol {protocol}")
        return cls(
            protocol,
            _endpoint(fields["internal"]),
            _endpoint(fields["external"]),
            _endpoint(fields["remote"]),
            _number(fields["remaining_s"], _AGE_MOST_S),
            _number(fields["age_s"], _AGE_MOST_S),
            _both(fields["silent_s"], _AGE_MOST_S, float),
            _both(fields["tcp_seen"], 0xFF, int),
            _both(fields["acked"], 0xFFFFFFFF, int),
            tuple(_whole(fields[side][name], (1 << 63) - 1) for side in SIDES for name in ("packets", "bytes")),  # type: ignore[arg-type]
            FROM_OUTSIDE * _switch(fields["from_outside"]) | COUNTED * _switch(fields["counted"]),
            _switch(fields["shared"]),
        )

    def packed(self, slot: int, elapsed_s: float, now: int, hz: int) -> bytes:
        """``struct saved``."""

        def moment(before_s: float) -> int:
            return now - round(min(before_s + elapsed_s, _AGE_MOST_S) * hz) & 0xFFFFFFFF

        return _SAVED.pack(
            *(self.internal[0].packed, self.remote[0].packed),
            *(socket.htons(self.internal[1]), socket.htons(self.remote[1]), self.marks),
            *(slot, self.shared, moment(self.age_s), *map(moment, self.silent_s)),
            *(*map(socket.htonl, self.acked), *self.tcp_seen, *self.traffic),
        )


def _number(value: Any, most: int) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise ValueError(f"{value!r} is no number from 0 to {most}")
    return value


def _whole(value: Any, most: int) -> int:
    if not isinstance(_number(value, most), int):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _both(fields: Mapping[str, Any], most: int, kind: type) -> Any:
    return tuple(kind((_whole if kind is int else _number)(fields[side], most)) for side in SIDES)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _endpoint(fields: Mapping[str, Any]) -> tuple[IPv4Address, int]:
    port = 0 if fields["port"] is None else _whole(fields["port"], PORTS - 1)
    return IPv4Address(str(fields["address"])), port


@dataclass(frozen=True)
class File:
    """A file's sessions, all of them good."""

    saved_at: float
    sessions: list[Kept]

    @classmethod
    def read(cls, path: Path) -> File:
        """Reads and checks the whole of it.

        Raises:
            ConfigError: with the line, where it is not what `sessions save` has written.
        """
        try:
            header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
        except OSError as error:
            raise ConfigError(f"cannot read {path}", error.strerror or str(error)) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"cannot read {path}", f"not UTF-8 at byte {error.start}") from error
        saved_at, count = _header(path, header)
        found = []
        for number, line in enumerate(lines, 2):
            try:
                found.append(Kept.of(json.loads(line)))
            except (KeyError, TypeError, ValueError) as error:
                what = f"{path}, line {number}: this is no session"
                why = f"{error} is missing" if isinstance(error, KeyError) else str(error)
                raise ConfigError(
                    what, why, "nothing is loaded; mend or remove the line, and count, or save anew"
                ) from error
        if len(found) != count:
            why = f"it has {len(found)} sessions, its first line says {count}"
            raise ConfigError(f"{path} is not whole", why, "nothing is loaded; save anew")
        return cls(saved_at, found)


def _header(path: Path, line: str) -> tuple[float, int]:
    """When it was saved, and how many sessions it has."""
    try:
        fields = json.loads(line)
        version = fields["xdpmasq_sessions"]
        saved_at, count = float(fields["saved_at"]), int(fields["count"])
    except (KeyError, TypeError, ValueError) as error:
        why = "its first line does not say so"
        raise ConfigError(
            f"{path} is no file of sessions", why, "name one that `xdpmasq sessions save` wrote"
        ) from error
    if version != FORMAT:
        why = f"it is of format {version}, this xdpmasq {__version__} reads {FORMAT}"
        raise ConfigError(f"{path} is of another xdpmasq", why, "load it with that one")
    return saved_at, count


def load(attached: Attached, path: Path) -> Counter[str]:
    """Opens a file's sessions beside those that there are.

    Returns:
        How many came back ("loaded"), and how many did not, by reason.

    Raises:
        ConfigError: the file is wrong, none of its external addresses is one of ours, or ports are given out in
            blocks, which the saved ones would not be of; nothing has changed.
    """
    file = File.read(path)
    if attached.settings["block_bits"]:
        why = "hosts have their ports in blocks (ports.block_size), and the log would not tell whose these were"
        raise ConfigError("sessions cannot be loaded", why, "nothing is loaded; hosts open theirs anew")
    theirs = {each.external[0] for each in file.sessions}
    with presence.changing():
        indices = {place.address: nth for nth, place in reversed([*enumerate(attached.places)]) if place.address}
        if theirs and not theirs & indices.keys():
            what = f"the sessions of {path} have another external address"
            why = f"{_listed(theirs)}; here it is {_listed(set(indices)) or 'none'}"
            raise ConfigError(what, why, "nothing is loaded: the remotes know them by that address only")
        return _Loading(attached, indices, file).run()


def _listed(addresses: set[Any]) -> str:
    return ", ".join(map(str, sorted(addresses)))


class _Loading:
    def __init__(self, attached: Attached, indices: Mapping[Any, int], file: File) -> None:
        self._attached, self._indices, self._file = attached, indices, file
        self._elapsed_s = max(0.0, time.time() - file.saved_at)  # a clock that stands earlier tells nothing
        self._program, self._hz = programs.restorer(attached), attached.hz
        self._services = {(each.protocol, each.port) for each in sockets.listeners()}
        self._inside: dict[IPv4Address, bool] = {}

    def run(self) -> Counter[str]:
        found: Counter[str] = Counter()
        hopeful = []
        for kept in self._file.sessions:
            if why := self._why_not(kept):
                found[why] += 1
            else:
                hopeful.append(kept)
        hopeful.sort(key=lambda each: each.shared)  # whoever shares a port comes after its owner
        now = self._attached.now()  # once: to ask it costs as much as a session, and idle times count in minutes
        found.update(self._one(each, now) for each in hopeful)
        return found

    def _why_not(self, kept: Kept) -> str:
        """What is known before the tables are asked."""
        if kept.external[0] not in self._indices:
            return _OTHER_ADDRESS
        if kept.left_s <= self._elapsed_s:
            return _OVER
        if not self._is_inside(kept.internal[0]):
            return _NO_LAN
        return _OWN if (kept.protocol, kept.external[1]) in self._services else ""

    def _one(self, kept: Kept, now: int) -> str:
        """One at a time: several in a run would be more than the verifier walks through."""
        saved = kept.packed(self._slot(kept), self._elapsed_s, now, self._hz)
        # an EtherType for local experiments (IEEE 802), which keeps the kernel from reading more
        return RESULTS[self._program.test_run(bytes(12) + b"\x88\xb5" + bytes(_AT - 14) + saved).verdict]

    def _slot(self, kept: Kept) -> int:
        base = self._indices[kept.external[0]] * EXTERNAL_SLOTS + CLASSES.index(kept.protocol) * PORTS
        return base + kept.external[1]

    def _is_inside(self, address: IPv4Address) -> bool:
        if address not in self._inside:
            self._inside[address] = self._attached.role_of(address) == abi.PREFIX_INTERNAL
        return self._inside[address]
