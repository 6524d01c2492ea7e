"""What an ALG's packets cost, and how many FTP logins go through: `.venv/bin/python tools/algspeed.py`.

::

    a-box, b-box, c-box ─ lan0 masq-gate wan0 ─ internet: SIP, FTP, vsftpd

How long a message takes from one host to the other: a SIP request, which the agent edits in two places, and its
answer, which it edits back; an FTP command that only passes, and PORT with another port each time, for which it opens
a pinhole. The same unread, for what the rest takes. Then logins at an even pace, each with PORT and the list of a
folder, from three hosts; and a program's time for a packet of a flow that no ALG reads, with none enabled and all.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from ipaddress import IPv4Network
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[1] / "tests" / each) for each in ("netns", "bpf"))

from harness import HOST, SERVER, Bench, namespace_of, udp, wan_frame
from harness import Gateway as Programs
from netkit import Gateway
from test_algs import FtpServer

from xdpmasq import algs
from xdpmasq.alg import registry, switches
from xdpmasq.lab import netns
from xdpmasq.lab.topology import HOSTS, INTERNET

REQUEST = (
    "OPTIONS sip:x@{to} SIP/2.0\r\nVia: SIP/2.0/UDP {me}:5060;branch=z9hG4bK1\r\nFrom: <sip:a@x>;tag=1\r\n"
    "To: <sip:b@x>\r\nCall-ID: 1\r\nCSeq: 1 OPTIONS\r\nContact: <sip:a@{me}:5060>\r\nContent-Length: 0\r\n\r\n"
)

SIP_PORT, FTP_PORT = 5070, 2121


def percentiles(times: list[float]) -> str:
    cuts = statistics.quantiles(times, n=1000)
    return "  ".join(f"{name} {cuts[at] * 1000:.2f} ms" for name, at in (("p50", 499), ("p99", 989), ("p99.9", 998)))


Passages = dict[str, list[float]]  # seconds, by what it was


def sip(gateway: Gateway, count: int, pause_s: float) -> Passages:
    request = REQUEST.format(to=INTERNET, me=HOSTS["a-box"]).encode()
    took: Passages = {"SIP request": [], "SIP answer": []}
    with gateway.udp("a-box", 5060) as client, gateway.udp("internet", SIP_PORT) as server:
        for _ in range(count):
            sent = time.perf_counter()
            client.sendto(request, (INTERNET, SIP_PORT))
            text, whence = server.recvfrom(2000)
            answered = time.perf_counter()
            server.sendto(b"SIP/2.0 200 OK" + text[text.index(b"\r\n") :], whence)
            client.recv(2000)
            took["SIP request"].append(answered - sent)
            took["SIP answer"].append(time.perf_counter() - answered)
            time.sleep(pause_s)
    return took


def ftp(gateway: Gateway, count: int, pause_s: float) -> Passages:
    took: Passages = {"FTP NOOP": [], "FTP PORT": [], "FTP answer": []}
    here = HOSTS["a-box"].replace(".", ",")
    with gateway.listen("internet", FTP_PORT) as listener, gateway.tcp("a-box", (INTERNET, FTP_PORT)) as client:
        server = listener.accept()[0]
        with server, server.makefile("rb") as commands, client.makefile("rb") as answers:
            for nth in range(count):
                high, low = divmod(10_000 + nth, 256)
                for kind, command in (("FTP NOOP", "NOOP"), ("FTP PORT", f"PORT {here},{high},{low}")):
                    sent = time.perf_counter()
                    client.sendall(command.encode() + b"\r\n")
                    commands.readline()
                    answered = time.perf_counter()
                    server.sendall(b"200 yes\r\n")
                    answers.readline()
                    took[kind].append(answered - sent)
                    took["FTP answer"].append(time.perf_counter() - answered)
                    time.sleep(pause_s)
    return took


def print_passages(gateway: Gateway, count: int, how: str) -> None:
    """One after the other, and a hundred a second, between which the machine sleeps."""
    for pace, pause_s in (("at once", 0.0), ("each 10 ms", 0.01)):
        for kind, times in (sip(gateway, count, pause_s) | ftp(gateway, count, pause_s)).items():
            print(f"{kind:11} {pace:10} {how:8}", percentiles(times))


class Login:
    """From connecting to the list that the server has sent to the port that it was told."""

    def __init__(self, gateway: Gateway, role: str) -> None:
        self._gateway, self._role, self._listener = gateway, role, gateway.listen(role)

    def run(self) -> None:
        with self._gateway.tcp(self._role, (INTERNET, 21)) as control, control.makefile("rb") as answers:
            self._expect(answers.readline(), b"220")
            high, low = divmod(self._listener.getsockname()[1], 256)
            here = f"{HOSTS[self._role].replace('.', ',')},{high},{low}"
            for command, code in (("USER anonymous", b"2"), (f"PORT {here}", b"200"), ("NLST", b"150")):
                control.sendall(command.encode() + b"\r\n")
                self._expect(answers.readline(), code)
            with self._listener.accept()[0] as data, data.makefile("rb") as listed:
                self._expect(listed.read(), b"given")
            self._expect(answers.readline(), b"226")
            control.sendall(b"QUIT\r\n")
            self._expect(answers.readline(), b"221")

    def _expect(self, answer: bytes, begin: bytes) -> None:
        if not answer.startswith(begin):
            raise OSError(f"{answer!r}, not {begin!r}")


def logins(gateway: Gateway, count: int, seconds: float) -> tuple[list[float], list[str]]:
    """How long each took, and what was wrong with those that failed."""
    took: list[float] = []
    failed: list[str] = []
    began, roles = time.monotonic(), ("a-box", "b-box", "c-box")

    def of(nth: int) -> None:
        login = Login(gateway, roles[nth])
        for number in range(nth, count, len(roles)):
            time.sleep(max(0.0, began + number * seconds / count - time.monotonic()))
            start = time.perf_counter()
            try:
                login.run()
                took.append(time.perf_counter() - start)
            except OSError as error:
                failed.append(f"{number}: {error}")

    threads = [threading.Thread(target=of, args=(nth,)) for nth in range(len(roles))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return took, failed


def unread_flow(count: int) -> dict[str, float]:
    """Median ns that the WAN's egress takes for a datagram of an open session, by what is enabled; in turns."""
    times: dict[str, list[float]] = {"no ALG": [], "all ALGs": []}
    with namespace_of() as name, netns.entered(name):
        gateway = Programs(Bench())
        packet, program = udp(HOST, 5000, SERVER, 443), gateway.bench.programs["masq_wan_out"]
        frame = wan_frame(packet)
        for turn in range(count):
            for each in registry.by_name().values() if turn % 2 else ():
                ports = tuple((protocol, port) for protocol, ports in each.ports.items() for port in ports)
                switches.put(gateway.tables, algs.Use(each.name, ports, (IPv4Network("0.0.0.0/0"),)))
            for _ in range(200):
                run = program.test_run(frame)
                times["all ALGs" if turn % 2 else "no ALG"].append(run.duration_ns)
            for each in registry.names() if turn % 2 else ():
                switches.take(gateway.tables, each)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trips", type=int, default=3000)
    parser.add_argument("--logins", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60, help="for all logins")
    wanted = parser.parse_args()
    with Gateway.in_new_lab("tc") as gateway:
        FtpServer(gateway.lab)
        print_passages(gateway, wanted.trips, "unread")
        gateway.masq("alg", "enable", "sip", "--port", f"udp {SIP_PORT}")
        gateway.masq("alg", "enable", "ftp", "--port", "tcp 21", "--port", f"tcp {FTP_PORT}")
        gateway.masq("sessions", "flush", "--all")
        with gateway.counting() as counted:
            print_passages(gateway, wanted.trips, "by agent")
        print("              packets by the agent:", counted["punt_alg"], "past it:", counted["alg_bypassed"])
        with gateway.counting() as counted:
            began = time.monotonic()
            took, failed = logins(gateway, wanted.logins, wanted.seconds)
        print(f"{len(took)} logins in {time.monotonic() - began:.0f} s, {len(failed)} failed;", percentiles(took))
        print("              packets by the agent:", counted["punt_alg"], "past it:", counted["alg_bypassed"])
        print(*failed[:5], sep="\n")
    for name, ns in unread_flow(20).items():
        print(f"{name}: {ns:.0f} ns a packet of a flow that no ALG reads")


if __name__ == "__main__":
    main()
