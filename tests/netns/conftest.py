"""Fixtures of the end-to-end tests: gateways in labs of their own, and the watch over the public wire.

``gateway`` is shared by all tests that leave it as it was, once per mode; ``fresh`` belongs to one test alone.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode adds nothing itself; tests import netkit

from netkit import Gateway, Servers, Wire

from xdpmasq.lab import netns
from xdpmasq.lab.servers import DnsServer, EchoServer, IperfServer, SshServer, WebServer
from xdpmasq.lab.topology import FAR, INTERNET_TOO

MODES = ["tc", "xdp"]


@pytest.fixture(
    scope="session",
    params=[pytest.param(mode, marks=pytest.mark.xdist_group(f"gateway-{mode}")) for mode in MODES],
)
def shared(request: pytest.FixtureRequest) -> Iterator[tuple[Gateway, Servers]]:
    with Gateway.in_new_lab(request.param, lans=2, far_mtu=1400) as gateway:
        lab = gateway.lab
        for role in ("masq-gate", "transit", "far", "internet"):
            # Else the kernel keeps ICMP errors back, six at once and one a second to each address.
            netns.set_sysctls(lab.namespace(role), {"net/ipv4/icmp_ratelimit": 0})
        for role, address in (("internet", None), ("internet", INTERNET_TOO), ("far", FAR)):
            EchoServer(lab, role, *([address] if address else []))
        yield gateway, Servers(WebServer(lab), DnsServer(lab), SshServer(lab), IperfServer(lab))


@pytest.fixture
def gateway(shared: tuple[Gateway, Servers]) -> Iterator[Gateway]:
    """Attached, with d-box on a second LAN and a far link of 1400 bytes; watched for leaks."""
    wire = Wire(shared[0].lab)
    yield shared[0]
    wire.check()


@pytest.fixture
def servers(shared: tuple[Gateway, Servers]) -> Servers:
    return shared[1]


@pytest.fixture(params=MODES)  # a test for which one is enough: parametrize("mode", ["tc"], indirect=True)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bare(mode: str) -> Iterator[Gateway]:
    """A lab with an echo server where nothing is attached yet; watched for leaks."""
    with Gateway.in_new_lab(mode, attach=False) as gateway:
        EchoServer(gateway.lab)
        wire = Wire(gateway.lab)
        yield gateway
        wire.check()


@pytest.fixture
def fresh(bare: Gateway) -> Gateway:
    """Attached in a lab of its own."""
    bare.attach()
    return bare
