"""Reloads, restarts and kills the agent under load, and counts what is lost: `.venv/bin/python tools/soak.py --help`.

::

    a-box: iperf3, 20,000 datagrams of 64 bytes a second ─┐
           files by active FTP, one after another         │
    b-box: TCP connections that talk all the time         ├─ lan0 masq-gate wan0 ─ internet
    c-box: new UDP sessions all the time ─────────────────┘

Every line is of one phase. LOST, RESET, REFUSED, LEAKED and LEFT are to be 0. Which of its datagrams arrived,
iperf3's server knows; what its own socket had no room for is told apart (OVERRUN), and what a queue of the kernel's
had none for, of whatever on the machine (BACKLOG): the gateway has counted neither. AGAIN are transfers that needed a
second try, as without an agent there is no ALG. LEFT are sessions and mappings after all have been ended, AGENT-KB is
the agent's own memory, TABLES-KB the kernel's for the maps.

`--minutes` has it go round: some of each, then the WAN gets another address, and so on.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "netns"))

from netkit import Gateway, own_bytes, read, soon
from test_algs import FtpServer

from xdpmasq.lab.servers import IPERF_PORT, EchoServer, IperfServer
from xdpmasq.lab.topology import HOSTS, INTERNET, PUBLIC

LENGTH = 64
CONFIG = '[interfaces]\nwan = "wan0"\nlan = ["lan0"]\nmode = "{mode}"\n[timeouts]\nudp_s = {udp_s}\n'
ADDRESSES = (PUBLIC, "203.0.113.5")
COLUMNS = (
    *("PHASE", "TIMES", "SECONDS", "DATAGRAMS", "LOST", "OVERRUN", "BACKLOG", "RESET", "TALKS", "OPENED", "REFUSED"),
    *("FILES", "AGAIN", "LEAKED", "LEFT", "AGENT-KB", "TABLES-KB"),
)
PRIVATE = "10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16"
WATCH = f"""table ip soak {{
    chain in {{
        type filter hook prerouting priority -300
        ip saddr {{ {PRIVATE} }} counter
    }}
}}"""


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


class Transfers:
    """Files fetched by a-box in active mode: the server calls back, to the port that the ALG has opened."""

    def __init__(self, gateway: Gateway, server: FtpServer) -> None:
        self.done = self.again = 0
        self.whys: Counter[str] = Counter()
        self._gateway, self._wanted, self._stop = gateway, digest(server.given), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        file = self._gateway.lab.directory / "fetched"
        curl = ["curl", "-sS", "--ftp-port", HOSTS["a-box"], "--disable-eprt", "--max-time", "20", "-o", file]
        while not self._stop.is_set():
            file.unlink(missing_ok=True)
            ended = self._gateway.lab.exec("a-box", [*curl, f"ftp://{INTERNET}/given"], check=False)
            good = ended.returncode == 0 and digest(file.read_bytes()) == self._wanted
            self.done += good
            self.again += not good
            if not good:
                self.whys[ended.stderr.strip()] += 1
            time.sleep(1)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


@contextlib.contextmanager
def datagrams(gateway: Gateway, rate: int) -> Iterator[None]:
    """What has been lost of them, iperf3's server knows: see :func:`server_report`."""
    command = ["iperf3", "-c", INTERNET, "-p", str(IPERF_PORT), "-u", "-l", str(LENGTH), "-t", "86400"]
    process = gateway.lab.popen("a-box", [*command, "-b", str(rate * LENGTH * 8)])
    time.sleep(1)
    yield
    process.send_signal(signal.SIGINT)
    process.wait(timeout=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reloads", type=int, default=1000)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--minutes", type=int, default=0, help="go round for so long, with a tenth of these each time"
    )
    parser.add_argument("--rate", type=int, default=20_000, help="datagrams a second")
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--mode", choices=("tc", "xdp"), default="tc")
    wanted = parser.parse_args()
    with Gateway.in_new_lab(wanted.mode, attach=False) as gateway:
        good = soak(gateway, wanted)
    sys.exit(0 if good else 1)


def soak(gateway: Gateway, wanted: argparse.Namespace) -> bool:
    file = gateway.lab.directory / "config.toml"
    file.write_text(CONFIG.format(mode=wanted.mode, udp_s=300))
    again = ("attach", "--config", str(file))
    gateway.masq(*again)
    EchoServer(gateway.lab)
    IperfServer(gateway.lab)
    server = FtpServer(gateway.lab)
    gateway.lab.exec("internet", ["nft", WATCH])

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

    def change() -> None:
        """The WAN's address; and says after how long new sessions had it."""
        old, new = ADDRESSES[round_ % 2], ADDRESSES[(round_ + 1) % 2]
        gateway.readdress(f"{new}/24")
        started = time.monotonic()
        soon(lambda: seen(gateway) == new, "new sessions have the new address", 10)
        took = time.monotonic() - started
        stale = [each for each in gateway.mappings().values() if each.startswith(f"{old}:")]
        print(f"{old} → {new}: in use after {took:.2f} s, {len(stale)} stale mappings left", flush=True)

    print(" ".join(f"{each:>9}" for each in COLUMNS))
    good, round_, deadline = True, 0, time.monotonic() + 60 * wanted.minutes
    while True:
        for name, times, act in (
            ("reloads", wanted.reloads, reload_),
            ("restarts", wanted.restarts, restart),
            ("kill -9", wanted.kills, kill),
        ):
            good &= phase(
                gateway,
                server,
                name=name,
                times=times // 10 if wanted.minutes else times,
                act=act,
                wanted=wanted,
            )
        if time.monotonic() > deadline:
            break
        change()
        round_ += 1
    drops = {name: count for name, count in gateway.tables.counters().items() if count and name.startswith("drop")}
    print("drops:", drops or "none")
    return good


def phase(
    gateway: Gateway, server: FtpServer, *, name: str, times: int, act: Callable[[], None], wanted: argparse.Namespace
) -> bool:
    talkers, churn, transfers = Talkers(gateway, wanted.connections), Churn(gateway), Transfers(gateway, server)
    overrun, behind, leaked = overruns(gateway), backlog(), leaks(gateway)
    started = time.monotonic()
    with datagrams(gateway, wanted.rate):
        for _ in range(times):
            act()
        time.sleep(1)
    seconds = time.monotonic() - started
    for each in (transfers, churn, talkers):
        each.stop()
    report = server_report(gateway)
    overrun, behind, leaked = overruns(gateway) - overrun, backlog() - behind, leaks(gateway) - leaked
    lost = report["lost"] - overrun
    left = flushed(gateway)
    row = (
        *(name, times, f"{seconds:.0f}", report["packets"], lost, overrun, behind, talkers.broken, talkers.said),
        *(churn.opened, churn.failed, transfers.done, transfers.again, leaked, len(left)),
        *(own_bytes(gateway.agent_pid or 0) // 1024, tables_kb(gateway)),
    )
    print(" ".join(f"{each:>9}" for each in row), flush=True)
    for each in left:
        print("left:", each, flush=True)
    for why, count in transfers.whys.items():
        print(f"{count} transfers: {why}", flush=True)
    broken = max(lost - behind, 0) + talkers.broken + churn.failed + leaked + len(left)
    return report["packets"] > 0 and not broken


def flushed(gateway: Gateway) -> list[str]:
    """What is left of sessions and mappings after all have been ended, and nobody has sent for a while.

    Connections that were being closed may send until then, and what they send is of new sessions.
    """
    soon(lambda: not talking(gateway), "all connections are closed", 90)
    gateway.masq("sessions", "flush", "--all")
    return [*map(str, gateway.sessions()), *map(str, gateway.mappings().items())]


def talking(gateway: Gateway) -> bool:
    """Whether a box or a server has a TCP connection that is not over."""
    listed = ("ss", "-Htn", "state", "connected", "exclude", "time-wait")
    return any(gateway.lab.exec(role, [*listed]).stdout.strip() for role in ("a-box", "b-box", "c-box", "internet"))


def seen(gateway: Gateway) -> str:
    """The address that a new session of c-box has; none while there is none."""
    try:
        return gateway.seen_as("c-box").partition(":")[0]
    except TimeoutError:
        return ""


def overruns(gateway: Gateway) -> int:
    """Datagrams that reached internet, whose socket had no room: on a busy machine iperf3's server is too slow."""
    text = gateway.lab.exec("internet", ["cat", "/proc/net/snmp"]).stdout
    names, values = (line.split()[1:] for line in text.splitlines() if line.startswith("Udp:"))
    return int(dict(zip(names, values, strict=True))["RcvbufErrors"])


def backlog() -> int:
    """Packets for which the queue between a veth and its receiver had no room, on the whole machine."""
    return sum(int(line.split()[1], 16) for line in Path("/proc/net/softnet_stat").read_text().splitlines())


def leaks(gateway: Gateway) -> int:
    """Packets with a private source that internet has seen."""
    words = gateway.lab.exec("internet", ["nft", "list", "table", "ip", "soak"]).stdout.split()
    return int(words[words.index("packets") + 1])


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


def tables_kb(gateway: Gateway) -> int:
    """Memory that the kernel holds for the datapath's maps."""
    total = 0
    for table in gateway.tables.maps.values():
        lines = Path(f"/proc/self/fdinfo/{table.fd}").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("memlock"))
    return total // 1024


if __name__ == "__main__":
    main()
