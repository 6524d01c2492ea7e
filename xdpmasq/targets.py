"""Where records go: a file, the system's log, an IPFIX collector. Each has a room of its own for what it cannot take
at the moment; what finds no room there is lost, and counted.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from xdpmasq import ipfix
from xdpmasq.config import Log
from xdpmasq.errors import HostError
from xdpmasq.records import Record

log = logging.getLogger("xdpmasq")

ROOM = 65536  # records that wait
RETRY_S = 1.0
LOOK_S = 1.0  # a file is asked so often whether it is still the one of that name
TEMPLATES_S = 60.0  # RFC 7011 section 8.4: over UDP templates are repeated
DEV_LOG = "/dev/log"
_LINES = 512  # written to a file at once
_PERMISSIONS = 0o640  # whom internal hosts talk to is not everybody's business
_FACILITIES = ("kern", "user", "mail", "daemon", "auth", "syslog", "lpr", "news", "uucp", "cron", "authpriv", "ftp")
_INFO = 6
_IP_MTU, _IPV6_MTU = 14, 24
_HEADERS = {socket.AF_INET: 28, socket.AF_INET6: 48}  # of UDP over IP


class Target:
    """Takes records, and passes them on when told to.

    Attributes:
        written, lost: records.
    """

    name = ""

    def __init__(self) -> None:
        self._waiting: deque[Any] = deque()
        self._retry_at = 0.0
        self._trouble = ""
        self.written = self.lost = 0

    def take(self, records: Sequence[Record]) -> None:
        """Puts them behind those that wait."""
        for each in map(self._form, records):
            if each is not None:
                self._put(each)

    def remark(self, line: str) -> None:
        """A line about the log itself, where lines are written."""

    def _put(self, formed: Any) -> None:
        if len(self._waiting) >= ROOM:
            self._waiting.popleft()  # the latest are of most use to whoever looks for what is wrong
            self.lost += 1
        self._waiting.append(formed)

    @property
    def backlog(self) -> int:
        return len(self._waiting)

    def flush(self) -> None:
        """Passes on what waits; trouble is said once, and that it is over."""
        if time.monotonic() < self._retry_at:
            return
        try:
            self._write()
        except OSError as error:
            trouble = error.strerror or str(error)
            if trouble != self._trouble:
                log.warning("log: %s cannot be written: %s; records wait, at most %d", self.name, trouble, ROOM)
            self._trouble, self._retry_at = trouble, time.monotonic() + RETRY_S
        else:
            if self._trouble:
                log.info("log: %s is written again", self.name)
            self._trouble = ""

    def reopen(self) -> None:
        """At the next record, where that means anything."""

    def close(self) -> None:
        """What still waits then is lost."""
        self.lost += len(self._waiting)
        self._waiting.clear()

    def _form(self, record: Record) -> Any:
        return record.json()

    def _write(self) -> None:
        raise NotImplementedError


class File(Target):
    """JSON, a line for each record. The file may be moved or removed at any time: another is made in its place.

    Raises:
        HostError: it cannot be written.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self.name = "file"
        self._path, self._looked_at = Path(path), time.monotonic()
        self._rest, self._under_way = b"", 0  # of lines that are being written
        try:
            self._fd: int | None = self._open()
        except OSError as error:
            do = "name another by file in [log] of --config FILE; its directory must be there"
            raise HostError(f"cannot log to {path}", error.strerror or str(error), do) from error

    def remark(self, line: str) -> None:
        self._put(line)

    def reopen(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    @property
    def backlog(self) -> int:
        return super().backlog + self._under_way

    def close(self) -> None:
        self.lost += self._under_way
        super().close()
        self.reopen()

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, _PERMISSIONS)

    def _write(self) -> None:
        if time.monotonic() - self._looked_at >= LOOK_S:
            self._looked_at = time.monotonic()
            if self._fd is not None and not self._is_in_place(self._fd):
                self.reopen()
        if self._fd is None:
            self._fd = self._open()
        while self._rest or self._waiting:
            if not self._rest:
                self._under_way = min(_LINES, len(self._waiting))
                self._rest = "".join(f"{self._waiting.popleft()}\n" for _ in range(self._under_way)).encode()
            # A full disk takes part of it: the rest is written when there is room again.
            self._rest = self._rest[os.write(self._fd, self._rest) :]
            if not self._rest:
                self.written, self._under_way = self.written + self._under_way, 0

    def _is_in_place(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except FileNotFoundError:
            return False


class Syslog(Target):
    """The machine's own log, systemd's journal or a syslog daemon's, by its socket.

    Raises:
        HostError: there is none.
    """

    def __init__(self, facility: str) -> None:
        super().__init__()
        self.name = "syslog"
        number = 16 + int(facility[-1]) if facility.startswith("local") else _FACILITIES.index(facility)
        self._head = f"<{number * 8 + _INFO}>xdpmasq[{os.getpid()}]: "
        self._socket: socket.socket | None = None
        try:
            self._socket = self._connected()
        except OSError as error:
            why = f"{DEV_LOG}: {error.strerror or error}"
            raise HostError("cannot log to syslog", why, 'start the journal or a syslog daemon, or leave syslog = "" '
                            "in [log] of --config FILE") from error  # fmt: skip

    def remark(self, line: str) -> None:
        self._put(line)

    def close(self) -> None:
        super().close()
        if self._socket:
            self._socket.close()

    def _connected(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            made.settimeout(RETRY_S)
            made.connect(DEV_LOG)
        except OSError:
            made.close()
            raise
        return made

    def _write(self) -> None:
        self._socket = self._socket or self._connected()
        try:
            while self._waiting:
                self._socket.send((self._head + self._waiting[0]).encode())
                self._waiting.popleft()
                self.written += 1
        except OSError:
            self._socket.close()
            self._socket = None
            raise


class Ipfix(Target):
    """An IPFIX collector, by UDP.

    That nobody listens is told by an ICMP error after the fact, if at all: the last message is then sent again.
    """

    def __init__(self, address: str, port: int) -> None:
        super().__init__()
        self.name = "ipfix"
        self._endpoint = (address, port)
        self._family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket: socket.socket | None = None
        self._sequence, self._templates_at = 0, 0.0
        self._last: list[Any] = []  # the records of the last message

    def close(self) -> None:
        super().close()
        if self._socket:
            self._socket.close()

    def _form(self, record: Record) -> Any:
        return ipfix.encode(record)

    def _write(self) -> None:
        try:
            self._socket = self._socket or self._connected()
            if self._templates_at <= time.monotonic():
                self._socket.send(ipfix.message(ipfix.templates(), time.time(), self._sequence))
                self._templates_at = time.monotonic() + TEMPLATES_S
            for sets, records in self._messages(self._most(self._socket)):
                self._socket.send(ipfix.message(sets, time.time(), self._sequence))
                self._last = records
                self._sequence += len(records)
                self.written += len(records)
                for _ in records:
                    self._waiting.popleft()
        except OSError as error:
            if isinstance(error, ConnectionRefusedError):
                self._recall()
            self._templates_at = 0.0  # whoever comes then knows none
            if self._socket:
                self._socket.close()
            self._socket = None
            raise

    def _recall(self) -> None:
        self._waiting.extendleft(reversed(self._last))
        self.written -= len(self._last)
        self._last = []

    def _messages(self, most: int) -> Iterator[tuple[bytes, list[Any]]]:
        waiting = [*self._waiting]
        for sets, count in ipfix.data_sets(waiting, most):
            records, waiting = waiting[:count], waiting[count:]
            yield sets, records

    def _connected(self) -> socket.socket:
        made = socket.socket(self._family, socket.SOCK_DGRAM)
        try:
            made.setblocking(False)
            made.connect(self._endpoint)
        except OSError:
            made.close()
            raise
        return made

    def _most(self, connected: socket.socket) -> int:
        """How long a message may be: what the path is known to take."""
        with suppress(OSError):
            six = self._family == socket.AF_INET6
            level, option = (socket.IPPROTO_IPV6, _IPV6_MTU) if six else (socket.IPPROTO_IP, _IP_MTU)
            return max(ipfix.LEAST, min(connected.getsockopt(level, option), 1500) - _HEADERS[self._family])
        return ipfix.LEAST


def opened(config: Log) -> list[Target]:
    """Those that are named.

    Raises:
        HostError: one cannot be used.
    """
    made: list[Target] = []
    try:
        if config.file:
            made.append(File(config.file))
        if config.syslog:
            made.append(Syslog(config.syslog))
        if endpoint := config.collector:
            made.append(Ipfix(*endpoint))
    except HostError:
        for each in made:
            each.close()
        raise
    return made
