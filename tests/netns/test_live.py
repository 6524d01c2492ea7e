"""What goes on, as it goes on: ``xdpmasq top`` on a terminal and for scripts.

::

    a-box ── lan0 masq-gate wan0 ── internet (echo on .10)
                  xdpmasq top
"""

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from contextlib import ExitStack

import pytest
from netkit import GATE, Gateway, Stream

from xdpmasq.lab.topology import HOSTS

TOP = [sys.executable, "-m", "xdpmasq", "top"]


def test_who_carries_most(gateway: Gateway) -> None:
    flow = Stream(gateway)
    try:
        found = json.loads(gateway.masq("top", "--once", "--interval", "0.5", "--json").stdout)
        each = json.loads(gateway.masq("top", "--once", "--interval", "0.5", "--sessions", "--json").stdout)
    finally:
        flow.stop()
    first = found["top"][0]
    assert first["host"] == HOSTS["a-box"]
    for way in ("out", "in"):
        assert 50 < first[way]["packets_per_s"] < 2000
        assert found[way]["bytes_per_s"] >= first[way]["bytes_per_s"] > 50 * 28
    assert found["fast_share"] > 0.5 if gateway.mode == "xdp" else found["fast_share"] == 0
    assert found["sessions"]["udp"] >= 1
    assert each["top"][0]["internal"]["address"] == HOSTS["a-box"]
    assert (each["top"][0]["protocol"], each["top"][0]["state"]) == ("udp", "REPLIED")


@pytest.mark.parametrize("mode", ["tc"], indirect=True)
def test_a_terminal_with_the_agent_dead(fresh: Gateway) -> None:
    """80 columns and 24 lines, as over ssh: it is filled, listens to keys, and is left as it was."""
    fresh.kill_agent()
    flow = Stream(fresh)
    with ExitStack() as stack:
        stack.callback(flow.stop)
        ours, theirs = pty.openpty()
        stack.callback(os.close, ours)
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        before = termios.tcgetattr(theirs)
        environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            fresh.lab.argv(GATE, [*TOP, "--interval", "0.3"]),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
        )
        stack.callback(process.kill)
        _read_until(ours, "1 of 1 hosts by rate")
        os.write(ours, b"t")
        _read_until(ours, "1 of 1 sessions by rate")
        os.write(ours, b"p")
        shown = _read_until(ours, r"by packets.*IN-PACKETS.*h host")
        assert re.search(rf"udp\s+{HOSTS['a-box']}:\d+\s+203\.0\.113\.10:7\s+\d+ pps", shown)
        os.write(ours, b"q")
        assert process.wait(10) == 0
        assert "\x1b[?1049l" in _read_until(ours, re.escape("\x1b[?1049l"))  # the other screen is left
        assert termios.tcgetattr(theirs) == before
        os.close(theirs)


def _read_until(terminal: int, pattern: str, timeout_s: float = 20) -> str:
    text, deadline = "", time.monotonic() + timeout_s
    while not re.search(pattern, text, re.DOTALL):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, text
        text += os.read(terminal, 65536).decode()
    return text
