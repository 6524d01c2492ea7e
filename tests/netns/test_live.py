"""What goes on, as it goes on: ``xdpmasq top`` and ``xdpmasq sessions watch``, on a terminal and for scripts.

::

    a-box ── lan0 masq-gate wan0 ── internet (echo on .10)
                  xdpmasq top
                  xdpmasq sessions watch   several at once
"""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from netkit import ECHO, GATE, Gateway, Stream, answers, soon

from xdpmasq import bpf
from xdpmasq.lab.topology import HOSTS

XDPMASQ = [sys.executable, "-m", "xdpmasq"]
ENVIRONMENT = {**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


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


def test_a_trace(gateway: Gateway) -> None:
    """Of a flow that XDP carries, too; afterwards it does so again."""
    flow = Stream(gateway)
    try:
        words = ("trace", "--internal", HOSTS["a-box"], "--protocol", "udp", "--remote", f":{ECHO[1]}")
        done = gateway.masq(*words, "--count", "20", "--json")
        seen = [json.loads(line) for line in done.stdout.splitlines()]
        if gateway.mode == "xdp":
            tables = gateway.tables
            before = tables.counters()["fast_inbound"]
            soon(lambda: tables.counters()["fast_inbound"] > before + 10, "it flies again", timeout_s=5)
    finally:
        flow.stop()
    assert done.stderr == ""
    hooks = {"lan-in", "wan-out", "wan-in", *(["lan-out"] if gateway.mode == "xdp" else [])}
    assert {(each["hook"], each["verdict"]) for each in seen} == {(hook, "passed") for hook in hooks}
    for each in seen:
        source, destination = each["after"]["source"], each["after"]["destination"]
        assert {"lan-in": HOSTS["a-box"], "wan-out": "203.0.113.1"}.get(each["hook"], ECHO[0]) == source["address"]
        assert (ECHO[1] in (source["port"], destination["port"])) is True
    reasons = {each["hook"]: each["reasons"][0]["name"] for each in seen}
    assert (reasons["wan-out"], reasons["wan-in"], reasons["lan-in"]) == ("slow_outbound", "slow_inbound", None)


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

        def top() -> subprocess.Popen[bytes]:
            command = fresh.lab.argv(GATE, [*XDPMASQ, "top", "--interval", "0.3"])
            process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT)
            stack.callback(process.kill)
            return process

        process = top()
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
        process = top()
        _read_until(ours, "1 of 1 hosts by rate")
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGTERM
        assert "\x1b[?1049l" in _read_until(ours, re.escape("\x1b[?1049l"))
        assert termios.tcgetattr(theirs) == before
        os.close(theirs)


def _read_until(terminal: int, pattern: str, timeout_s: float = 20) -> str:
    text, deadline = "", time.monotonic() + timeout_s
    while not re.search(pattern, text, re.DOTALL):
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, text
        text += os.read(terminal, 65536).decode()
    return text


class Watching:
    """``xdpmasq sessions watch --json`` in masq-gate."""

    def __init__(self, gateway: Gateway, stack: ExitStack, *filters: str) -> None:
        argv = gateway.lab.argv(GATE, [*XDPMASQ, "sessions", "watch", "--json", *filters])
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, env=ENVIRONMENT)
        stack.callback(self.process.wait)
        stack.callback(self.process.kill)
        maps = Path(f"/proc/{self.process.pid}/maps")
        soon(lambda: maps.read_text().count("bpf-map") == 2 and _is_watched(gateway), "it watches")

    def until(self, event: str, port: int, timeout_s: float = 10) -> dict[str, Any]:
        """The next such event of an internal port."""
        assert self.process.stdout
        deadline = time.monotonic() + timeout_s
        while True:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"no {event} of port {port}"
            found = json.loads(self.process.stdout.readline())
            if (found["event"], found["internal"]["port"]) == (event, port):
                return dict(found)


def _is_watched(gateway: Gateway) -> bool:
    until = int(gateway.tables.maps["watch"].view()["until"][0])
    return 0 < (until - bpf.jiffies()) % 2**32 < 4096


def test_several_watch_until_the_last_is_killed(gateway: Gateway) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(gateway.udp("a-box"))
        port = client.getsockname()[1]
        all_, some = Watching(gateway, stack), Watching(gateway, stack, "--internal", f":{port}")
        assert answers(client)
        external = written_port(gateway, port)
        for watching in (all_, some):
            opened = watching.until("opened", port)
            assert opened["external"]["port"] == external
            assert (opened["internal"]["address"], opened["why"]) == (HOSTS["a-box"], "internal")
        gateway.masq("sessions", "flush", "--internal", f":{port}")
        for watching in (all_, some):
            closed = watching.until("closed", port)
            assert (closed["why"], closed["out"]["packets"], closed["in"]["packets"]) == ("flushed", 1, 1)

        all_.process.kill()
        with gateway.settings(host_sessions=0):
            assert not answers(client)
        refused = some.until("refused", port)
        assert (refused["why"], refused["external"]) == ("host_limit", None)
        assert _is_watched(gateway)

        some.process.kill()
        soon(lambda: not _is_watched(gateway), "nobody watches any more")
        written = int(gateway.tables.maps["watch"].view()["next"][0])
        assert gateway.opens()
        assert int(gateway.tables.maps["watch"].view()["next"][0]) == written


def written_port(gateway: Gateway, port: int) -> int:
    """The external port of the session of an internal one."""
    (found,) = gateway.sessions("--internal", f":{port}")
    return int(found["external"]["port"])


@pytest.mark.parametrize("mode", ["tc"], indirect=True)
def test_watching_with_the_agent_dead(fresh: Gateway) -> None:
    fresh.kill_agent()
    with ExitStack() as stack:
        watching = Watching(fresh, stack)
        with fresh.udp("a-box") as client:
            assert answers(client)
            assert watching.until("opened", client.getsockname()[1])["remote"]["port"] == ECHO[1]
