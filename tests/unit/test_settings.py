"""What the programs are told, from the configuration and the machine."""

from dataclasses import replace
from ipaddress import IPv4Network
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xdpmasq import settings
from xdpmasq.abi import FURTHER_BASE, PORTS
from xdpmasq.config import Config, Limits, Ports
from xdpmasq.errors import HostError
from xdpmasq.net import routing, sysctl

HOME = Config(("wan0",), ("lan0",))
GIB = 2**30


@pytest.fixture(autouse=True)
def ephemeral(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysctl, "read", lambda name: "32768\t60999")


@pytest.mark.parametrize(
    ("ram", "wanted"),
    [
        pytest.param(GIB // 4, 65536, id="at least"),
        pytest.param(GIB, 131072, id="1 GiB"),
        pytest.param(2 * GIB, 262144, id="2 GiB"),
        pytest.param(8 * GIB, 1048576, id="8 GiB"),
        pytest.param(512 * GIB, 1048576, id="at most"),
    ],
)
def test_room_for_further_sessions_goes_by_memory(ram: int, wanted: int) -> None:
    assert settings.further_for(ram) == wanted
    assert wanted == settings.FURTHER_LEAST or wanted * 200 <= ram // 32
    assert settings.further_sessions(replace(HOME, further_sessions=4096)) == 4096


def test_pools_leave_the_ephemeral_ports_out() -> None:
    assert settings.pools(Ports())[:2] == [([1024, 61000], [31744, 4536])] * 2
    assert settings.pools(Ports(40000, 61099))[0] == ([61000, 40000], [100, 0])
    with pytest.raises(HostError, match="no external ports between 40000 and 50000"):
        settings.pools(Ports(40000, 50000))


@pytest.mark.parametrize("low", [False, True])
def test_slots_outside_the_pools(low: bool) -> None:
    found = settings.outside(Ports(2000, 2099, low_ports=low), FURTHER_BASE + 1024)
    inside = [*(range(512, 1024) if low else ()), *range(2000, 2100)]
    for class_ in range(2):
        assert np.flatnonzero(~found[class_ * PORTS : (class_ + 1) * PORTS]).tolist() == inside
    assert not found[2 * PORTS :].any()


def test_limits_by_default_and_given() -> None:
    fields = settings.fields(HOME, 100, 262144)
    assert (fields["host_sessions"], fields["host_mappings"]) == (65536, (31744 + 4536) * 3 // 4)
    assert (fields["host_rate"], fields["host_burst"]) == (50_000, 100_000)
    given = settings.fields(replace(HOME, limits=Limits(7, 8, 9, 10)), 100, 262144)
    assert [given[f"host_{each}"] for each in ("sessions", "mappings", "rate", "burst")] == [7, 8, 9, 10]


def link(mtu: int) -> Any:
    return SimpleNamespace(index=2, mtu=mtu)


def route(oif: int, mtu: int) -> routing.Route:
    return routing.Route(IPv4Network("0.0.0.0/0"), oif, None, 254, mtu)


@pytest.mark.parametrize(
    ("mss", "routes", "wanted"),
    [
        pytest.param("off", [route(2, 1300)], 0, id="off"),
        pytest.param("auto", [], 1452, id="by the link"),
        pytest.param("auto", [route(2, 0), route(2, 1400), route(2, 1480), route(3, 600)], 1360, id="by a route"),
        pytest.param(1300, [], 1300, id="given"),
        pytest.param(1460, [], 1452, id="given, but too much"),
        pytest.param(1300, [route(2, 1200)], 1160, id="given, but too much for a route"),
    ],
)
def test_segments_fit_the_wan(mss: Any, routes: list[routing.Route], wanted: int) -> None:
    assert settings.mss(replace(HOME, mss=mss), link(1492), routes) == wanted
