"""Who may answer through a mapping (RFC 4787 section 5), for TCP and UDP each on its own.

``b-box ─ lan0 masq-gate wan0 ─ internet .10 .11, transit ─ far``: b-box talks to .10 first.
"""

import errno
import socket
from collections.abc import Iterator

import pytest
from netkit import ECHO, Gateway, who

from xdpmasq.lab.topology import HOSTS, INTERNET, INTERNET_TOO

STRANGERS = {"another port": INTERNET, "another address": INTERNET_TOO}
ADMITTED: list[set[str]] = [set(), {"another port"}, set(STRANGERS)]  # by enum filtering

both_ways = pytest.mark.parametrize(("tcp", "udp"), [(0, 0), (0, 1), (2, 0), (1, 2), (2, 1)])


@pytest.fixture
def server(gateway: Gateway) -> Iterator[socket.socket]:
    """Listens in b-box, on a port from which it also talks."""
    with shared_port(gateway) as made:
        made.listen()
        yield made


def shared_port(gateway: Gateway, port: int = 0) -> socket.socket:
    made = gateway.lab.socket("b-box", socket.SOCK_STREAM)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        made.setsockopt(socket.SOL_SOCKET, option, 1)
    made.settimeout(2)
    made.bind((HOSTS["b-box"], port))
    return made


@pytest.mark.req("4787-8")
@pytest.mark.req("5382-3")
@both_ways
def test_tcp(gateway: Gateway, server: socket.socket, tcp: int, udp: int) -> None:
    with (
        gateway.settings(filtering=[tcp, udp, 0, 0]),
        gateway.listen("internet", address=INTERNET) as rendezvous,
        shared_port(gateway, server.getsockname()[1]) as scout,
    ):
        scout.connect(rendezvous.getsockname())
        known, public = rendezvous.accept()
        admitted = set()
        for kind, address in STRANGERS.items():
            with gateway.lab.socket("internet", socket.SOCK_STREAM) as stranger:
                stranger.settimeout(0.3)
                stranger.bind((address, 0))
                if stranger.connect_ex(public) not in (errno.EAGAIN, errno.EINPROGRESS):
                    near, peer = server.accept()
                    near.close()
                    assert peer == stranger.getsockname()
                    admitted.add(kind)
        known.close()
    assert admitted == ADMITTED[tcp]


@pytest.mark.req("4787-8")
@pytest.mark.req("5382-3")
@both_ways
def test_udp(gateway: Gateway, tcp: int, udp: int) -> None:
    with gateway.settings(filtering=[tcp, udp, 0, 0]), gateway.udp("b-box", timeout_s=0.3) as client:
        address, port = who(client, ECHO).split(":")
        admitted = set()
        for kind, source in STRANGERS.items():
            with gateway.udp("internet", address=source) as stranger:
                stranger.sendto(kind.encode(), (address, int(port)))
                try:
                    assert client.recvfrom(100) == (kind.encode(), stranger.getsockname())
                    admitted.add(kind)
                except TimeoutError:
                    pass
    assert admitted == ADMITTED[udp]
