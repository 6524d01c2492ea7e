"""Fixtures: one bench for a worker, one empty gateway for a test."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves test modules without their neighbours

from harness import NETWORK, Bench, Gateway

from xdpmasq import attachment, hooks
from xdpmasq.hooks import Hook
from xdpmasq.lab import netns
from xdpmasq.net import clsact


@pytest.fixture(scope="session")
def namespace() -> Iterator[str]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    name = f"tb-{os.getpid()}"
    netns.ip_batch([f"netns add {name}"])
    try:
        netns.set_sysctls(name, {"net/ipv6/conf/all/disable_ipv6": 1, "net/ipv6/conf/default/disable_ipv6": 1})
        netns.set_sysctls(name, {"net/ipv4/ip_forward": 1})
        netns.ip_batch(NETWORK, name)
        yield name
    finally:
        netns.delete([name])


@pytest.fixture(scope="session")
def bench(namespace: str) -> Bench:
    with netns.entered(namespace):
        return Bench()


@pytest.fixture
def gateway(namespace: str, bench: Bench) -> Iterator[Gateway]:
    with netns.entered(namespace):
        yield Gateway(bench)


@pytest.fixture
def real_wan(gateway: Gateway) -> Iterator[str]:
    """wan0 with the programs attached for real, for what test runs cannot do."""
    bench = gateway.bench
    if not attachment.uses_tcx():
        clsact.add(bench.wan.index)
    for hook in hooks.of_role("wan", xdp=False, ethernet=True):
        attachment.put(bench.wan, hook, bench.programs)
    yield bench.wan.name
    attachment.clear(bench.wan, keep=(Hook("xdp", "masq_xdp"),))
    clsact.remove(bench.wan.index)
