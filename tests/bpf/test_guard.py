"""At the LAN's ingress: what no WAN will look at, because it goes to another LAN, or because the WAN is gone."""

from ipaddress import IPv4Network

import pytest
from harness import HOST, OTHER_HOST, OTHER_SERVER, SERVER, SYN, Gateway, tcp, udp

NO_INTERFACE = 60_000


@pytest.fixture(params=[None, "192.168.0.0/24", "192.168.9.0/24"], ids=["", "at home", "routed"], autouse=True)
def network(request: pytest.FixtureRequest, gateway: Gateway) -> None:
    """The LAN's own: whether a source is looked up or known by it, the outcome is the same."""
    home = IPv4Network(request.param) if request.param else None
    gateway.tables.set_interface(gateway.bench.lan, "lan", xdp_from=True, xdp_to=True, network=home)


SPOOFED = {"foreign": "9.9.9.9", "private": "172.20.0.9", "the gateway's": "203.0.113.1"}


@pytest.mark.req("attacks-spoof")
@pytest.mark.parametrize("source", SPOOFED.values(), ids=list(SPOOFED))
def test_a_foreign_source_to_another_host(gateway: Gateway, source: str) -> None:
    assert gateway.lan_in(tcp(source, 1, OTHER_HOST, 2, SYN)).ended == "drop_source_foreign"


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        pytest.param(HOST, OTHER_HOST, id="an internal host"),
        pytest.param("0.0.0.0", OTHER_HOST, id="nobody yet"),
        pytest.param("9.9.9.9", OTHER_SERVER, id="the WAN will see to it"),
    ],
)
def test_nothing_to_mind(gateway: Gateway, source: str, destination: str) -> None:
    result = gateway.lan_in(udp(source, 68, destination, 67))
    assert (result.verdict, result.ended, result.counted) == ("pass", "", {})


@pytest.mark.req("attacks-leak")
@pytest.mark.parametrize("wan", [0, NO_INTERFACE], ids=["the agent knows of none", "deleted"])
@pytest.mark.parametrize(("known", "ended"), [(False, "drop_unguarded"), (True, "")], ids=["unknown", "a VPN"])
def test_the_wan_is_gone(gateway: Gateway, wan: int, known: bool, ended: str) -> None:
    """The interface to which the route leads now is the WAN, made anew, or another that the agent knew."""
    gateway.tables.set_settings(exit=[wan])
    if known:
        gateway.tables.set_interface(gateway.bench.wan, "other", xdp_from=False, xdp_to=False)
    else:
        gateway.tables.unset_interface(gateway.wan)
    assert gateway.lan_in(udp(HOST, 5000, SERVER, 53)).ended == ended
    assert gateway.lan_in(udp(HOST, 5000, OTHER_HOST, 53)).ended == "", "from host to host all is as before"
