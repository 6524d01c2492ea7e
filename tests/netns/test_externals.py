"""External addresses beyond the WAN's own one: pools, choices, one to one, and what is exempt.

::

    a-box .2, b-box .3, c-box .4 ─ lan0 masq-gate wan0 203.0.113.1, .5 to .9 ─ internet .10 .11 ─ far

internet has no route to 192.168.0.0/24, unless a test gives it one.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from netkit import Gateway, who

from xdpmasq.externals import Externals
from xdpmasq.lab.servers import EchoServer
from xdpmasq.lab.topology import FAR, HOSTS, INTERNET, PUBLIC

BOXES = ("a-box", "b-box", "c-box")
POOL = [f"203.0.113.{last}" for last in (1, 5, 6, 7)]


@pytest.fixture(
    scope="module",
    params=[pytest.param(mode, marks=pytest.mark.xdist_group(f"externals-{mode}")) for mode in ("tc", "xdp")],
)
def bare(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    """Not attached yet."""
    with Gateway.in_new_lab(request.param, attach=False) as gateway:
        for role, address in (("internet", None), ("far", FAR)):
            EchoServer(gateway.lab, role, *([address] if address else []))
        yield gateway


@contextlib.contextmanager
def serving(gateway: Gateway, *owned: str, **external: Any) -> Iterator[Gateway]:
    """Attached with these external addresses; the WAN has those ``owned``, for the time being."""
    for address in owned:
        gateway.gate("ip", "addr", "add", f"{address}/24", "dev", "wan0")
    try:
        gateway.attach_with(external=Externals.parse(**external))
        yield gateway
    finally:
        if gateway.is_attached:
            gateway.detach()
        for address in owned:
            gateway.gate("ip", "addr", "del", f"{address}/24", "dev", "wan0")


def seen_as(gateway: Gateway, role: str, server: str = INTERNET) -> str:
    """The public address that a box has for a server, asked by UDP."""
    with gateway.udp(role) as client:
        return who(client, (server, 7)).split(":")[0]


@pytest.mark.req("4787-2")
@pytest.mark.req("6888-2")
@pytest.mark.req("6888-3")
def test_pool_is_paired(bare: Gateway) -> None:
    with serving(bare, *POOL[1:], addresses=POOL):
        addresses = {role: {seen_as(bare, role) for _ in range(6)} for role in BOXES}
        many = set()
        for last in range(20, 60):
            address = [f"192.168.0.{last}/24", "dev", "eth0"]
            bare.lab.exec("a-box", ["ip", "addr", "add", *address])
            with bare.udp("a-box", address=f"192.168.0.{last}") as client:
                many.add(who(client).split(":")[0])
            bare.lab.exec("a-box", ["ip", "addr", "del", *address])
    assert all(len(found) == 1 for found in addresses.values()), addresses
    assert many == set(POOL)


def test_choice_for_a_prefix(bare: Gateway) -> None:
    external = {"addresses": POOL[:2], "choices": ["192.168.0.2/31 as 203.0.113.6", "192.168.0.4 as 203.0.113.7"]}
    with serving(bare, *POOL[1:], **external):
        assert [seen_as(bare, role) for role in BOXES] == ["203.0.113.6", "203.0.113.6", "203.0.113.7"]


def test_pool_of_addresses_that_the_wan_lacks(bare: Gateway) -> None:
    with pytest.raises(Exception, match="is no address of wan0"), serving(bare, addresses=POOL):
        pass
    with serving(bare, addresses=POOL[1:2], answer_arp=True):
        assert seen_as(bare, "a-box") == POOL[1]
        assert f"local {POOL[1]}" in bare.gate("ip", "route", "show", "table", "local")
    assert POOL[1] not in bare.gate("ip", "route", "show", "table", "local")


@pytest.mark.parametrize("answer_arp", [False, True], ids=["the WAN has it", "answered for"])
def test_one_to_one(bare: Gateway, answer_arp: bool) -> None:
    owned = () if answer_arp else ("203.0.113.9",)
    with serving(bare, *owned, one_to_one=["192.168.0.2 as 203.0.113.9"], answer_arp=answer_arp) as gateway:
        with gateway.udp("a-box", 5000) as client:
            assert who(client) == "203.0.113.9:5000"
        assert seen_as(gateway, "b-box") == PUBLIC
        gateway.lab.exec("a-box", ["ping", "-c1", "-W2", "-s", "3000", INTERNET])
        gateway.lab.exec("internet", ["ping", "-c1", "-W2", "-s", "3000", "203.0.113.9"])
        with gateway.listen("a-box", 8000) as server, gateway.tcp("internet", ("203.0.113.9", 8000)) as client:
            connection, peer = server.accept()
            assert peer[0] == INTERNET
            connection.sendall(b"from inside")
            assert client.recv(100) == b"from inside"
            connection.close()


def test_hairpin_to_one_to_one(bare: Gateway) -> None:
    with (
        serving(bare, "203.0.113.9", one_to_one=["192.168.0.2 as 203.0.113.9"]) as gateway,
        gateway.listen("a-box", 8000) as server,
        gateway.tcp("b-box", ("203.0.113.9", 8000)) as client,
    ):
        connection, peer = server.accept()
        assert peer[0] == PUBLIC
        client.sendall(b"around")
        assert connection.recv(100) == b"around"
        connection.close()


def test_traceroute_to_and_from_one_to_one(bare: Gateway) -> None:
    with serving(bare, "203.0.113.9", one_to_one=["192.168.0.2 as 203.0.113.9"]) as gateway:
        out = gateway.lab.exec("a-box", ["traceroute", "-n", "-q1", "-w1", FAR]).stdout
        assert "198.51.100.10" in out.splitlines()[-1]
        back = gateway.lab.exec("far", ["traceroute", "-n", "-q1", "-w1", "203.0.113.9"]).stdout
        assert "192.168." not in back
        assert "203.0.113.9" in back.splitlines()[-1]


@pytest.mark.req("6888-6")
def test_exempt(bare: Gateway) -> None:
    network = ["192.168.0.0/24", "via", PUBLIC]
    with serving(bare, exempt=[f"{INTERNET} udp 7-8"]) as gateway:
        gateway.lab.exec("internet", ["ip", "route", "add", *network])
        try:
            with gateway.udp("a-box", 5000) as client:
                assert who(client) == f"{HOSTS['a-box']}:5000"
                assert who(client, (FAR, 7)).startswith(PUBLIC)
        finally:
            gateway.lab.exec("internet", ["ip", "route", "del", *network])
