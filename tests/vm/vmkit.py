"""What the tests in the virtual machine share: commands in namespaces, patience, and servers that tell who asks."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from xdpmasq import datapath, tcx
from xdpmasq.errors import MasqError
from xdpmasq.lab import netns
from xdpmasq.net import clsact, netdev

XDPMASQ = str(Path(sys.executable).with_name("xdpmasq"))
PATIENCE_S = 600


def run(namespace: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    whole = ["ip", "netns", "exec", namespace, *command]
    done = subprocess.run(whole, capture_output=True, text=True, timeout=300, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def xdpmasq(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("gate", XDPMASQ, *words, check=check)


def soon(told: Callable[[], bool], what: str, suppress: type[Exception] = TimeoutError) -> None:
    """An answer may be lost while an interface is away."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(suppress):
            if told():
                return
        assert time.monotonic() < deadline, what
        time.sleep(1)  # to ask is work, too, which keeps an emulated machine from its own


def serve(namespace: str, address: str, port: int) -> None:
    """By UDP everyone is told who they are, and what they said; by TCP all comes back, at the end."""
    with netns.entered(namespace):
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        streams = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    datagrams.bind((address, port))
    streams.bind((address, port))
    streams.listen()

    def answer() -> None:
        while True:
            said, who = datagrams.recvfrom(4096)
            datagrams.sendto(who[0].encode() + b" " + said, who)

    def give_back() -> None:
        while True:
            stream, who = streams.accept()
            with stream:
                text = f"{who[0]} {segment(stream)}\n".encode()
                while said := stream.recv(65536):
                    text += said
                stream.sendall(text)

    for each in (answer, give_back):
        threading.Thread(target=each, daemon=True).start()


def segment(stream: socket.socket) -> int:
    """Bytes of data that this end puts into a segment, with the timestamps' 12 bytes beside them."""
    return stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)


def client(namespace: str, address: str) -> socket.socket:
    with netns.entered(namespace):
        found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    found.bind((address, 0))
    found.settimeout(5)
    return found


def stream_to(namespace: str, server: tuple[str, int]) -> socket.socket:
    with netns.entered(namespace):
        found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.settimeout(120)
    found.connect(server)
    return found


def talk(stream: socket.socket, text: bytes) -> tuple[str, int, bytes]:
    """By which address the server sees this end, its segments, and what it gave back. Closes the stream."""
    with stream:
        stream.sendall(text)
        stream.shutdown(socket.SHUT_WR)
        told = b""
        while said := stream.recv(65536):
            told += said
    head, _, back = told.partition(b"\n")
    seen, size = head.decode().split()
    return seen, int(size), back


def datapath_of() -> datapath.Attached:
    with netns.entered("gate"):
        return datapath.find()


def programs_on(*devices: str) -> list[str]:
    """The hooks of these that have a program of anybody's."""
    found = []
    with netns.entered("gate"):
        for link in map(netdev.link, devices):
            tc = {each.direction for each in clsact.filters(link.index)}
            tc |= {hook for hook in ("ingress", "egress") if tcx.programs(link.index, hook)}
            found += [f"{hook} of {link.name}" for hook in sorted(tc)] + [f"xdp of {link.name}"] * bool(link.xdp_mode)
    return found


def start(*words: str) -> "subprocess.Popen[bytes]":
    """The agent, in the foreground, as `attach` would give up waiting."""
    agent = subprocess.Popen(["ip", "netns", "exec", "gate", XDPMASQ, "run", *words])
    soon(lambda: datapath_of().agent_pid == agent.pid, "it is attached", suppress=MasqError)
    return agent
