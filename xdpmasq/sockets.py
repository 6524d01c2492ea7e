"""The gateway's own services: which ports of this network namespace have a listener, and who that is."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

_TCP_LISTEN, _UDP_UNCONNECTED = "0A", "07"  # st in /proc/net/tcp and udp
_ANY = IPv4Address(0)
_MAPPED = "0000000000000000FFFF0000"  # the first three words of ::ffff:a.b.c.d


@dataclass(frozen=True)
class Listener:
    """A socket that takes what comes from anybody; on every address when it is 0.0.0.0."""

    protocol: str
    address: IPv4Address
    port: int
    inode: int

    def is_at(self, address: IPv4Address | None) -> bool:
        return self.address in (_ANY, address)

    def __str__(self) -> str:
        owner = _owner(self.inode)
        at = f"{self.protocol} {'*' if self.address == _ANY else self.address}:{self.port}"
        return f"{owner or 'something'} listens at {at}"


def listeners() -> Iterator[Listener]:
    """All in this thread's network namespace."""
    for name in ("tcp", "tcp6", "udp", "udp6"):
        protocol = name.removesuffix("6")
        state = _TCP_LISTEN if protocol == "tcp" else _UDP_UNCONNECTED
        # "thread-self", because a thread may have entered another namespace than its process
        with contextlib.suppress(FileNotFoundError):  # no IPv6
            lines = Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]
            yield from filter(None, (_listener(protocol, line.split(), state) for line in lines))


def _listener(protocol: str, columns: list[str], state: str) -> Listener | None:
    if columns[3] != state:
        return None
    word, _, number = columns[1].partition(":")
    port = int(number, 16)
    if len(word) > 8:  # IPv6
        if word.startswith(_MAPPED):
            word = word[-8:]
        # Whether the listener at [::] has IPv4 as well /proc does not tell, but then nobody else can bind it.
        elif int(word, 16) or not is_taken(protocol, port):
            return None
        else:
            word = "0"
    return Listener(protocol, IPv4Address(socket.ntohl(int(word, 16))), port, int(columns[9]))


def is_taken(protocol: str, port: int) -> bool:
    """Somebody has a port of IPv4, at whatever address: nobody else can bind it to all."""
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as probe:
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return True
    return False


def _owner(inode: int) -> str:
    """``nginx (process 123)``, or "" when nobody is found who has the socket."""
    wanted = f"socket:[{inode}]"
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # processes come and go
            if any(os.readlink(each) == wanted for each in (folder / "fd").iterdir()):
                return f"{(folder / 'comm').read_text().strip()} (process {folder.name})"
    return ""
