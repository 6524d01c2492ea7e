#!/usr/bin/env python3
"""Shows the dashboards at work: the lab with traffic in it, an agent, and a Prometheus, all reachable on loopback.

    tools/dashboards.py                     until Ctrl-C
    tools/dashboards.py --pictures SECONDS  watches for so long, then draws docs/gateway.png and docs/host.png anew

Needs Debian's prometheus, and for pictures matplotlib (pip install '.[bench]').
"""

import argparse
import contextlib
import random
import select
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from xdpmasq import bpf
from xdpmasq.lab import Lab
from xdpmasq.lab.prometheus import AGENT, PORT, Prometheus
from xdpmasq.lab.servers import ECHO_PORT, EchoServer, WebServer
from xdpmasq.lab.topology import FAR, HOSTS, INTERNET, PUBLIC

ROOT = Path(__file__).resolve().parent.parent
NAME = "masq-dashboards"
GATE = "masq-gate"
CONFIG = f"""\
[metrics]
top_hosts = 5

[[forward]]
protocol = "udp"
ports = 8080
to = "{HOSTS["b-box"]}:80"
"""
TALKERS = {"a-box": 30, "b-box": 12, "c-box": 4}  # datagrams at once, of each
PAUSE_S = 0.05
SOCKETS = 40  # sessions that a box keeps


class Relay(socketserver.ThreadingTCPServer):
    """A port of this machine's loopback that leads to one of masq-gate's."""

    daemon_threads = True

    def __init__(self, lab: Lab, target: tuple[str, int]) -> None:
        self._lab, self._target = lab, target
        super().__init__(("127.0.0.1", 0), self._carry)  # type: ignore[arg-type]
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return "http://127.0.0.1:{1}".format(*self.server_address)

    def _carry(self, near: socket.socket, *_: object) -> None:
        with self._lab.socket(GATE, socket.SOCK_STREAM) as far:
            far.connect(self._target)
            ends = {near: far, far: near}
            while True:
                for end in select.select(list(ends), [], [])[0]:
                    if not (part := end.recv(65536)):
                        return
                    ends[end].sendall(part)


class Box:
    """A host that talks, more at some times than at others."""

    def __init__(self, lab: Lab, role: str, weight: int) -> None:
        self._lab, self._role, self._weight = lab, role, weight
        self._sockets: list[socket.socket] = []

    def talk(self) -> None:
        if len(self._sockets) < SOCKETS or random.random() < 0.05:
            self._sockets.append(self._lab.socket(self._role, socket.SOCK_DGRAM))
        if len(self._sockets) > SOCKETS:
            self._sockets.pop(0).close()
        tide = 1 + (time.monotonic() % 40) / 10
        for _ in range(int(self._weight * tide)):
            client = random.choice(self._sockets)
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                client.sendto(bytes(random.randrange(20, 1200)), (INTERNET, ECHO_PORT))
                client.recv(2048)

    def browse(self, address: str = INTERNET) -> None:
        with self._lab.socket(self._role, socket.SOCK_STREAM) as client, contextlib.suppress(OSError):
            client.settimeout(1)
            client.connect((address, 80))
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            while client.recv(4096):
                pass


def bustle(lab: Lab, over: threading.Event) -> None:
    """Traffic of many kinds until it is over."""
    boxes = [Box(lab, role, weight) for role, weight in TALKERS.items()]
    stranger = lab.socket("internet", socket.SOCK_DGRAM)
    while not over.wait(PAUSE_S):
        for box in boxes:
            box.talk()
        random.choice(boxes).browse(random.choice((INTERNET, INTERNET, FAR)))
        if random.random() < 0.2:
            with lab.socket("internet", socket.SOCK_DGRAM) as guest:
                guest.sendto(b"let me in", (PUBLIC, 8080))
        for _ in range(3):
            stranger.sendto(b"anybody there?", (PUBLIC, random.randrange(1024, 30000)))


@contextlib.contextmanager
def scene() -> Iterator[tuple[Lab, Prometheus]]:
    """Everything runs."""
    Lab(NAME).down()  # what a killed one left
    with Lab(NAME, offloads=False) as lab:
        for role, address in (("internet", INTERNET), ("far", FAR)):
            WebServer(lab, role, address)
        EchoServer(lab)
        config = lab.directory / "masq.toml"
        config.write_text(CONFIG)
        wanted = ["attach", "--wan", "wan0", "--lan", "lan0", "--mode", "xdp", "--config", config]
        lab.exec(GATE, [sys.executable, "-m", "xdpmasq", *wanted], timeout_s=120)
        prometheus = Prometheus(lab, rules=[ROOT / "dashboards" / "rules.yml"], interval_ms=1000)
        over = threading.Event()
        talking = threading.Thread(target=bustle, args=(lab, over))
        talking.start()
        try:
            yield lab, prometheus
        finally:
            over.set()
            talking.join()


def show() -> None:
    with scene() as (lab, _):
        address, port = AGENT.split(":")
        agent, prometheus = Relay(lab, (address, int(port))), Relay(lab, ("127.0.0.1", PORT))
        print(f"metrics     {agent.url}/metrics")
        print(f"Prometheus  {prometheus.url}/graph   {prometheus.url}/alerts")
        print("Grafana     import dashboards/*.json, with this Prometheus as data source")
        print("Ctrl-C ends it and clears everything away.", flush=True)
        signal.pause()


def draw(seconds: float) -> None:
    import pictures  # noqa: PLC0415  needs matplotlib

    with bpf.counting_runs(), scene() as (_, prometheus):
        time.sleep(seconds)
        values = {
            "$instance": AGENT,
            "$host": HOSTS["a-box"],
            "$__rate_interval": "5s",
            "$__range": f"{seconds:.0f}s",
        }
        for name in ("gateway", "host"):
            board = ROOT / "dashboards" / f"{name}.json"
            pictures.draw(board, ROOT / "docs" / f"{name}.png", prometheus, values, seconds - 10)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", metavar="SECONDS", type=float)
    wanted = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        draw(wanted.pictures) if wanted.pictures else show()


if __name__ == "__main__":
    main()
