"""Telling systemd how the agent is (sd_notify(3)): ready, alive, stopping, and a line for `systemctl status`.

A datagram to the socket that systemd names in the environment; without one (a shell, `attach`) nothing is said.
"""

from __future__ import annotations

import contextlib
import os
import socket

VARIABLE = "NOTIFY_SOCKET"
READY, ALIVE, STOPPING = "READY=1", "WATCHDOG=1", "STOPPING=1"


def send(*assignments: str) -> None:
    """Sends ``NAME=value`` lines. Nobody listening is no reason to fail."""
    name = os.environ.get(VARIABLE, "")
    if not name.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
        to.setblocking(False)  # a manager that does not read may not hold up the agent
        to.sendto("\n".join(assignments).encode(), name.replace("@", "\0", 1) if name[0] == "@" else name)


def status(text: str) -> str:
    """The line that `systemctl status` shows."""
    return f"STATUS={' '.join(text.split())}"
