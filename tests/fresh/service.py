"""The service under a real systemd, run inside a machine of its own by tests/fresh/run.

::

    a-box 192.168.0.2 ── lan0 [ the machine ] wan0 203.0.113.1 ── near 203.0.113.10
    b-box 192.168.1.2 ── lan1 [             ] wan1 198.51.100.1 ── far 198.51.100.10

One TCP connection of a-box lives through all that may not end a session; then the service is stopped.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ETC = Path("/etc/xdpmasq")
PORT = 7
CONFIG = '[interfaces]\nwan = "{wan}"\nlan = ["{lan}"]\n[metrics]\nlisten = "127.0.0.1:{port}"\n'
ECHO = f"""
import socket, threading
threading.excepthook = lambda args: None  # who has gone has gone
server = socket.create_server(("", {PORT}))
def echo(one):
    while data := one.recv(4096):
        one.sendall(data)
while True:
    threading.Thread(target=echo, args=(server.accept()[0],), daemon=True).start()
"""
# Sends a number every 20 ms, and says at the end how many came back and the longest time between two.
PROBE = f"""
import socket, sys, time
one = socket.create_connection((sys.argv[1], {PORT}), 5)
one.settimeout(3)
print("connected", flush=True)
last, longest, count = time.monotonic(), 0.0, 0
try:
    while True:
        one.sendall(b"x")
        if not one.recv(1):
            break
        now = time.monotonic()
        longest, last, count = max(longest, now - last), now, count + 1
        time.sleep(0.02)
        print(count, round(longest, 3), flush=True)
except OSError as error:
    print("ended:", error, flush=True)
"""


def run(*command: str, fails: bool = False) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if (done.returncode != 0) is not fails:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{said}\n{journal()}")
    return said


def journal() -> str:
    return subprocess.run(["journalctl", "-n", "40", "--no-pager"], stdout=subprocess.PIPE, text=True).stdout  # noqa: PLW1510


def show(unit: str, what: str) -> str:
    return run("systemctl", "show", "-P", what, unit).strip()


def wait(until: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {seconds} s: {what}\n{journal()}")
        time.sleep(0.1)


def build(box: str, lan: str, inner: str, *, wan: str, public: str, outside: str, server: str) -> None:
    """A cable to a host inside and one to a server outside."""
    for namespace, link, ours, theirs in ((box, lan, f"{inner}.1", f"{inner}.2"), (outside, wan, public, server)):
        run("ip", "netns", "add", namespace)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        run("ip", "address", "add", f"{ours}/24", "dev", link)
        run("ip", "link", "set", link, "up")
        run("ip", "-n", namespace, "address", "add", f"{theirs}/24", "dev", "eth0")
        for each in ("eth0", "lo"):
            run("ip", "-n", namespace, "link", "set", each, "up")
    run("ip", "-n", box, "route", "add", "default", "via", f"{inner}.1")


class Probe:
    """A connection from a box, in a process of its own."""

    def __init__(self, box: str, server: str) -> None:
        command = ["ip", "netns", "exec", box, sys.executable, "-c", PROBE, server]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.last = "nothing said"
        threading.Thread(target=self._read, daemon=True).start()
        wait(lambda: self.count > 5, f"{box} reaches {server}")

    def _read(self) -> None:
        assert self._child.stdout
        for line in self._child.stdout:
            self.last = line.strip()

    @property
    def count(self) -> int:
        return int(self.last.split()[0]) if self.last[0].isdigit() else 0

    def lives(self, through: str) -> None:
        before = self.count
        time.sleep(1)
        if self.count <= before:
            raise SystemExit(f"the connection did not live through {through}: {self.last}")
        print(f"  {through}: the connection goes on, longest silence {self.last.split()[1]} s", flush=True)

    def ends(self) -> None:
        wait(lambda: self.last.startswith("ended"), "the connection ends")
        self._child.wait()


@contextlib.contextmanager
def servers(*namespaces: str) -> Iterator[None]:
    children = [subprocess.Popen(["ip", "netns", "exec", each, sys.executable, "-c", ECHO]) for each in namespaces]
    try:
        yield
    finally:
        for child in children:
            child.terminate()


def attached(wan: str) -> bool:
    return subprocess.run(["xdpmasq", "status", "--wan", wan], capture_output=True, check=False).returncode == 0


def main() -> None:
    build("a-box", "lan0", "192.168.0", wan="wan0", public="203.0.113.1", outside="near", server="203.0.113.10")
    build("b-box", "lan1", "192.168.1", wan="wan1", public="198.51.100.1", outside="far", server="198.51.100.10")
    with servers("near", "far"):
        refused_until_configured()
        lives_through()
        instances()
    print("the service does what it should")


def refused_until_configured() -> None:
    run("systemctl", "start", "xdpmasq", fails=True)
    wait(lambda: show("xdpmasq", "ActiveState") == "failed", "an empty configuration is refused")
    assert show("xdpmasq", "ExecMainStatus") == "2", show("xdpmasq", "ExecMainStatus")
    assert "no WAN interface named" in run("journalctl", "-u", "xdpmasq", "--no-pager")
    print("  the configuration as installed: refused in words, and not tried again", flush=True)


def lives_through() -> None:
    (ETC / "config.toml").write_text(CONFIG.format(wan="wan0", lan="lan0", port=9477))
    run("systemctl", "reset-failed", "xdpmasq")
    started = time.monotonic()
    run("systemctl", "start", "xdpmasq")
    print(f"  started in {time.monotonic() - started:.1f} s: {show('xdpmasq', 'StatusText')}", flush=True)
    assert show("xdpmasq", "StatusText") == "masquerading lan0 out of wan0 as 203.0.113.1"
    status = json.loads(run("xdpmasq", "status", "--json"))
    assert not (status.get("punt") or {}).get("why_not"), status["punt"]
    probe = Probe("a-box", "203.0.113.10")
    assert run("sh", "-c", "cat /proc/sys/net/ipv4/ip_forward").strip() == "1"

    probe.lives("its start")
    run("systemctl", "restart", "xdpmasq")
    probe.lives("restart")
    agent = show("xdpmasq", "MainPID")
    os.kill(int(agent), signal.SIGKILL)
    wait(lambda: show("xdpmasq", "MainPID") not in ("0", agent), "systemd starts it anew")
    wait(lambda: show("xdpmasq", "ActiveState") == "active", "it works again")
    probe.lives("a crash")
    with impatient_watchdog():
        agent = show("xdpmasq", "MainPID")
        probe.lives("a restart with another watchdog")
        os.kill(int(agent), signal.SIGSTOP)
        wait(lambda: show("xdpmasq", "MainPID") not in ("0", agent), "the watchdog ends it, systemd starts it anew")
        wait(lambda: show("xdpmasq", "ActiveState") == "active", "it works again")
    assert "watchdog" in run("journalctl", "-u", "xdpmasq", "--no-pager").lower()
    probe.lives("a hung agent and the watchdog")
    agent = show("xdpmasq", "MainPID")
    for package in Path("/root").glob("xdpmasq_*_all.deb"):
        run("dpkg", "--force-confold", "-i", str(package))
    assert show("xdpmasq", "MainPID") != agent, "an upgrade has to restart the agent"
    probe.lives("an upgrade")
    run("systemctl", "stop", "xdpmasq")
    assert show("xdpmasq", "ActiveState") == "inactive", show("xdpmasq", "ActiveState")
    assert not attached("wan0"), "stop leaves the translation"
    assert run("sh", "-c", "cat /proc/sys/net/ipv4/ip_forward").strip() == "0"
    probe.ends()
    run("systemctl", "start", "xdpmasq")
    run("xdpmasq", "detach")
    wait(lambda: show("xdpmasq", "ActiveState") == "inactive", "detach ends the service")
    print(
        "  stop: the connection has ended, nothing is attached, ip_forward is 0 again; so it is after detach",
        flush=True,
    )


@contextlib.contextmanager
def impatient_watchdog() -> Iterator[None]:
    drop_in = Path("/run/systemd/system/xdpmasq.service.d/watchdog.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text("[Service]\nWatchdogSec=3\nTimeoutAbortSec=1\n")  # a stopped process hears of no ABRT
    run("systemctl", "daemon-reload")
    run("systemctl", "restart", "xdpmasq")
    try:
        yield
    finally:
        drop_in.unlink()
        run("systemctl", "daemon-reload")


def instances() -> None:
    (ETC / "one.toml").write_text(CONFIG.format(wan="wan0", lan="lan0", port=9477))
    (ETC / "two.toml").write_text(CONFIG.format(wan="wan1", lan="lan1", port=9478))
    run("systemctl", "start", "xdpmasq@one", "xdpmasq@two")
    first, second = Probe("a-box", "203.0.113.10"), Probe("b-box", "198.51.100.10")
    run("systemctl", "stop", "xdpmasq@one")
    second.lives("the other instance's stop")
    first.ends()
    run("systemctl", "stop", "xdpmasq@two")
    second.ends()
    for each in ("one", "two"):
        (ETC / f"{each}.toml").unlink()
    print("  two instances: each has its own translation", flush=True)


if __name__ == "__main__":
    main()
