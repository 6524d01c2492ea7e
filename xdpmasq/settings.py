"""What the programs are told: ``struct settings`` and the pool of ports, from the configuration and this machine."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from xdpmasq import abi
from xdpmasq.config import FILTERINGS, OTHERS, Config, Ports
from xdpmasq.errors import HostError
from xdpmasq.net import netdev, routing, sysctl

FURTHER_LEAST, FURTHER_MOST = 65536, 1048576
_RAM_SHARE, _SESSION_BYTES = 32, 200  # a session's record and its entries in the hashes
_LOW_PORTS = (512, 512)  # first and count: below, everything is somebody's well-known service
_HEADERS = 40  # IP and TCP without options (RFC 6691)

Pool = tuple[list[int], list[int]]  # ``struct pool``: the first ports of two ranges, and how many
_NO_POOL: Pool = ([0, 0], [0, 0])


def further_sessions(config: Config) -> int:
    """Room for sessions beyond the first of each mapping."""
    return config.further_sessions or further_for(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def further_for(ram_bytes: int) -> int:
    """A power of two that takes at most a 32nd of the memory, within reason."""
    fitting = ram_bytes // _RAM_SHARE // _SESSION_BYTES
    return min(max(1 << max(fitting.bit_length() - 1, 0), FURTHER_LEAST), FURTHER_MOST)


def own_ports() -> tuple[int, int]:
    """First and last of the gateway's own ephemeral ports."""
    first, last = map(int, (sysctl.read("net.ipv4.ip_local_port_range") or "32768 60999").split())
    return first, last


def pools(ports: Ports) -> list[Pool]:
    """The pool of each class, without the gateway's own ephemeral ports; the fuller range first.

    Raises:
        HostError: nothing is left.
    """
    start, end = own_ports()
    parts = [(ports.first, min(ports.last, start - 1)), (max(ports.first, end + 1), ports.last)]
    ranges = sorted(((a, max(0, b - a + 1)) for a, b in parts), key=lambda pair: -pair[1])
    if not ranges[0][1]:
        raise HostError(
            f"no external ports between {ports.first} and {ports.last}",
            f"the gateway's own connections may use {start} to {end} (net.ipv4.ip_local_port_range)",
            "narrow that range, or widen [ports]",
        )
    tcp_udp = ([a for a, _ in ranges], [count for _, count in ranges])
    if ports.block_size and not any(_blocks(a, count, ports.block_size) for a, count in zip(*tcp_udp, strict=True)):
        raise HostError(
            f"no block of {ports.block_size} external ports between {ports.first} and {ports.last}",
            f"the gateway's own connections may use {start} to {end} (net.ipv4.ip_local_port_range)",
            "narrow that range, widen [ports], or make blocks smaller",
        )
    return [tcp_udp, tcp_udp, ([0, 0], [abi.PORTS, 0])]


def _blocks(first: int, count: int, size: int) -> int:
    """How many whole blocks there are in a range of ports."""
    return max(0, (first + count) // size - -(-first // size))


def low_pools(ports: Ports) -> list[Pool]:
    """The pool of each class for internal ports below 1024; empty where those are treated as all others."""
    first, count = _LOW_PORTS
    low: Pool = ([first, 0], [count, 0]) if ports.low_ports else _NO_POOL
    return [low, low, _NO_POOL]


def ports_for_one(pool: int) -> int:
    """Of a pool of that many ports: others find one, even while hundreds are in use or at rest."""
    return max(1, pool * 3 // 4)


def outside(ports: Ports, slots: int, externals: int = 1) -> npt.NDArray[np.bool_]:
    """For each slot whether it is in no pool."""
    one = np.ones(abi.EXTERNAL_SLOTS, bool)
    for every in (pools(ports), low_pools(ports)):
        for class_, (firsts, counts) in enumerate(every):
            for first, count in zip(firsts, counts, strict=True):
                start = class_ * abi.PORTS + first
                one[start : start + count] = False
    return np.concatenate([np.tile(one, externals), np.zeros(slots - externals * len(one), bool)])


def fields(config: Config, hz: int, further: int) -> dict[str, Any]:
    """Those fields of ``struct settings`` that follow from the configuration.

    Args:
        hz: jiffies a second.
        further: room for further sessions that the tables really have.
    """
    timeouts, ports, limits = config.timeouts, config.ports, config.limits
    pool = pools(ports)
    return {
        "tcp_established": timeouts.tcp_established_s * hz,
        "tcp_transitory": timeouts.tcp_transitory_s * hz,
        "udp": timeouts.udp_s * hz,
        "icmp": timeouts.icmp_s * hz,
        "fragment": timeouts.fragment_s * hz,
        "rearm": config.rearm_s * hz,
        "inbound_refresh": config.inbound_refresh,
        "hz": hz,
        "pool": [*pool, _NO_POOL, *low_pools(ports), _NO_POOL],
        "preserve": ports.preserve,
        "parity": ports.parity,
        "overload": ports.overload,
        "filtering": [FILTERINGS.index(config.filtering.tcp), FILTERINGS.index(config.filtering.udp), 0, 0],
        "block_bits": (ports.block_size or 1).bit_length() - 1,
        "host_blocks": config.host_blocks,
        "drop_other": config.other == OTHERS[1],
        "host_sessions": limits.sessions_per_host or max(1, further // 4),
        "host_mappings": limits.ports_per_host or ports_for_one(sum(pool[0][1])),
        "host_rate": limits.new_per_second,
        "host_burst": limits.burst,
    }


def mss(config: Config, link: netdev.Link, routes: Iterable[routing.Route]) -> int:
    """To what new TCP connections over this WAN are clamped, in bytes; 0: not at all."""
    if config.mss == "off":
        return 0
    mtus = [link.mtu, *(route.mtu for route in routes if route.oif == link.index and route.mtu)]
    fitting = max(min(mtus) - _HEADERS, 0)
    return fitting if isinstance(config.mss, str) else min(config.mss, fitting)
