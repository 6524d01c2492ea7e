"""Reloads, restarts and kills the agent under load, and counts what is lost: `.venv/bin/python tools/soak.py --help`.

::

    a-box: iperf3, 20,000 datagrams of 64 bytes a second ─┐
    b-box: TCP connections that talk all the time         ├─ lan0 masq-gate wan0 ─ internet
    c-box: new UDP and TCP sessions all the time ─────────┘

Every line is of one phase. LOST, RESET and REFUSED are to be 0; OVERRUN is what arrived at a receiver that had no
room for it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "netns"))

from netkit import Gateway, read, soon

from xdpmasq.lab.servers import IPERF_PORT, EchoServer, IperfServer
from xdpmasq.lab.topology import INTERNET

RATE = 20_000  # datagrams a second
LENGTH = 64
CONFIG = '[interfaces]\nwan = "wan0"\nlan = ["lan0"]\nmode = "{mode}"\n[timeouts]\nudp_s = {udp_s}\n'
ROW = "%-10s %6s %8s %10s %6s %8s %6s %8s %8s %8s %9s"


class Talkers:
    """TCP connections from b-box, each of which says something every so often; counts those that break."""

    def __init__(self, gateway: Gateway, count: int) -> None:
        self.broken = self.said = 0
        self._stop = threading.Event()
        with gateway.listen("internet", address=INTERNET) as listener:
            self._pairs = []
            for _ in range(count):
                near = gateway.tcp("b-box", (INTERNET, listener.getsockname()[1]))
                self._pairs.append((near, listener.accept()[0]))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            for pair in list(self._pairs):
                text = os.urandom(100)
                try:
                    for one, other in (pair, pair[::-1]):
                        other.settimeout(30)
                        one.sendall(text)
                        if read(other, 100) != text:
                            raise OSError("another text")
                    self.said += 1
                except OSError:
                    self.broken += 1
                    self._pairs.remove(pair)
            time.sleep(0.05)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        for pair in self._pairs:
            for each in pair:
                each.close()


class Churn:
    """New sessions from c-box; counts those that come to nothing."""

    def __init__(self, gateway: Gateway) -> None:
        self.opened = self.failed = 0
        self._gateway, self._stop = gateway, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._gateway.udp("c-box", timeout_s=1) as client:
                client.sendto(b"who", (INTERNET, 7))
                try:
                    client.recv(100)
                    self.opened += 1
                except TimeoutError:
                    self.failed += 1
            time.sleep(random.uniform(0, 0.02))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def datagrams(gateway: Gateway) -> Iterator[None]:
    """What has been lost of them, iperf3's server knows: see :func:`server_report`."""
    command = ["iperf3", "-c", INTERNET, "-p", str(IPERF_PORT), "-u", "-l", str(LENGTH), "-t", "86400"]
    process = gateway.lab.popen("a-box", [*command, "-b", str(RATE * LENGTH * 8)])
    time.sleep(1)
    yield
    process.send_signal(signal.SIGINT)
    process.wait(timeout=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reloads", type=int, default=1000)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--mode", choices=("tc", "xdp"), default="tc")
    wanted = parser.parse_args()
    with Gateway.in_new_lab(wanted.mode, attach=False) as gateway:
        file = gateway.lab.directory / "config.toml"
        file.write_text(CONFIG.format(mode=wanted.mode, udp_s=300))
        gateway.masq("attach", "--config", str(file))
        EchoServer(gateway.lab)
        IperfServer(gateway.lab)
        again = ("attach", "--config", str(file))

        def reload_() -> None:
            file.write_text(CONFIG.format(mode=wanted.mode, udp_s=random.randint(200, 400)))
            gateway.masq("reload")

        def restart() -> None:
            os.kill(gateway.agent_pid or 0, signal.SIGTERM)
            soon(lambda: gateway.agent_pid is None, "the agent has ended")
            gateway.masq(*again)

        def kill() -> None:
            gateway.kill_agent()
            time.sleep(0.5)
            gateway.masq(*again)

        heads = ("PHASE", "TIMES", "SECONDS", "DATAGRAMS", "LOST", "OVERRUN", "RESET", "TALKS", "OPENED", "REFUSED")
        print(ROW % (*heads, "AGENT-KB"))
        good = True
        for name, times, act in (
            ("reloads", wanted.reloads, reload_),
            ("restarts", wanted.restarts, restart),
            ("kill -9", wanted.kills, kill),
        ):
            good &= phase(gateway, name, times, act, wanted.connections)
        drops = {
            name: count for name, count in gateway.tables.counters().items() if count and name.startswith("drop")
        }
        print("drops:", drops or "none")
    sys.exit(0 if good else 1)


def phase(gateway: Gateway, name: str, times: int, act: Callable[[], None], connections: int) -> bool:
    talkers, churn, overrun = Talkers(gateway, connections), Churn(gateway), overruns(gateway)
    started = time.monotonic()
    with datagrams(gateway):
        for _ in range(times):
            act()
        time.sleep(1)
    seconds = time.monotonic() - started
    churn.stop()
    talkers.stop()
    report, overrun = server_report(gateway), overruns(gateway) - overrun
    lost = report["lost"] - overrun
    row = (name, times, f"{seconds:.0f}", report["packets"], lost, overrun, talkers.broken, talkers.said)
    print(ROW % (*row, churn.opened, churn.failed, resident_kb(gateway)), flush=True)
    return report["packets"] > 0 and not (lost or talkers.broken or churn.failed)


def overruns(gateway: Gateway) -> int:
    """Datagrams that reached internet, whose socket had no room: on a busy machine iperf3's server is too slow."""
    text = gateway.lab.exec("internet", ["cat", "/proc/net/snmp"]).stdout
    names, values = (line.split()[1:] for line in text.splitlines() if line.startswith("Udp:"))
    return int(dict(zip(names, values, strict=True))["RcvbufErrors"])


def server_report(gateway: Gateway) -> dict[str, int]:
    """What iperf3's server says at the end of a run: a line as "… 0.00-9.04 sec … 0/180000 (0%)  receiver"."""
    text = ""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        (log,) = gateway.lab.directory.glob("iperf3-*/log")
        lines = [line for line in log.read_text().splitlines() if "receiver" in line]
        if lines:
            text = lines[-1]
            log.write_text("")
            break
        time.sleep(0.2)
    share = next((word for word in text.split() if "/" in word and word[0].isdigit()), "0/0")
    lost, packets = map(int, share.split("/"))
    return {"lost": lost, "packets": packets}


def resident_kb(gateway: Gateway) -> int:
    lines = Path(f"/proc/{gateway.agent_pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    main()
