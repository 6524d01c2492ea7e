"""Fixtures: one bench for a worker, one empty gateway for a test."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves test modules without their neighbours

from harness import Bench, Gateway, namespace_of

from xdpmasq import attachment, hooks
from xdpmasq.hooks import Hook
from xdpmasq.lab import netns
from xdpmasq.net import clsact


@pytest.fixture(scope="session")
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")


@pytest.fixture(scope="session")
def namespace(as_root: None) -> Iterator[str]:
    with namespace_of() as name:
        yield name


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
