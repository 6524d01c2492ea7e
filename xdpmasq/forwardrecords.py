"""A rule as the kernel's tables have it: ``struct forward`` and ``struct forward_key`` of bpf/types.h, and back."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import numpy as np

from xdpmasq import abi, forwards
from xdpmasq.abi import CLASSES
from xdpmasq.forwards import Lease, Rule, Target
from xdpmasq.redirects import Redirect
from xdpmasq.tables import Tables
from xdpmasq.triggers import Trigger

FLAG_DEFAULT, FLAG_TO_GATEWAY, FLAG_TRIGGERED, FLAG_FROM_INSIDE = 1, 2, 4, 8  # FORWARD_*
FLAG_EXPIRES, FLAG_LEASED = 16, 32
ON_LAN, TRIGGER = 255, 253  # FORWARD_ON_LAN, FORWARD_TRIGGER
PORT_AT, REMOTE_AT = 16, 32  # FORWARD_PORT_AT, FORWARD_REMOTE_AT


def address_of(addr: Any) -> IPv4Address:
    return IPv4Address(np.asarray(addr["word"])[:1].tobytes())


def rule_of(record: Any, lease: Any, spared: tuple[IPv4Network, ...], hz: int) -> Rule:
    """The inverse of :func:`record_of`."""
    targets, before = [], 0
    for each in record["target"][: record["targets"]]:
        targets.append(Target(address_of(each["addr"]), int(each["port"]), int(each["until"]) - before))
        before = int(each["until"])
    bits, flags = int(record["source_bits"]), int(record["flags"])
    ports = CLASSES[record["class"]], int(record["first"]), int(record["last"])
    source = IPv4Network((address_of(record["source"]), bits)) if bits else None
    if flags & FLAG_TRIGGERED:
        called = int(record["trigger_first"]), int(record["trigger_last"])
        lasts_s = int(record["lasts"]) // hz
        return Trigger.of(ports, CLASSES[record["trigger_class"]], called, lasts_s)
    if flags & FLAG_TO_GATEWAY:
        on = "lan" if flags & FLAG_FROM_INSIDE else "wan"
        return Redirect(*ports, tuple(targets), source, on=on, spared=spared)
    leased = Lease(lease["nonce"].tobytes(), int(lease["external"])) if flags & FLAG_LEASED else None
    return Rule(*ports, tuple(targets), source, leased)


def record_of(tables: Tables, rule: Rule, expires: int | None = None) -> Any:
    record = np.zeros((), tables.maps["forward_rules"].value)
    until = 0
    targets = (Target(IPv4Address(0), rule.first),) if isinstance(rule, Trigger) else rule.targets
    for number, target in enumerate(targets):
        until += target.weight
        record["target"][number] = (abi.addr(target.address), target.port, until)
    record["first"], record["last"], record["class"] = rule.first, rule.last, class_of(rule)
    record["targets"], record["expires"] = len(targets), expires or 0
    record["flags"] = _flags(rule) | FLAG_EXPIRES * (expires is not None) | FLAG_LEASED * (rule.lease is not None)
    if isinstance(rule, Trigger):
        record["trigger_class"] = CLASSES.index(rule.caller_protocol)
        record["trigger_first"], record["trigger_last"] = rule.caller_first, rule.caller_last
        record["lasts"] = rule.lasts_s * int(tables.settings["hz"])
    if rule.source:
        record["source"], record["source_bits"] = abi.addr(rule.source.network_address), rule.source.prefixlen
    return record


def _flags(rule: Rule) -> int:
    match rule:
        case Trigger():
            return FLAG_TRIGGERED
        case Redirect():
            return FLAG_TO_GATEWAY | (FLAG_FROM_INSIDE if rule.from_inside else 0)
    return FLAG_DEFAULT if rule.is_default else 0


def class_of(rule: Rule) -> int:
    return CLASSES.index(rule.protocol)


def keys_of(rule: Rule, externals: int) -> Iterator[tuple[Any, ...]]:
    """``struct forward_key`` of each entry. The remote comes last, so a rule for some needs one for each port."""
    if isinstance(rule, Trigger):
        called = CLASSES.index(rule.caller_protocol)
        for port, bits in forwards.port_prefixes(rule.caller_first, rule.caller_last):
            yield PORT_AT + bits, TRIGGER + class_of(rule), called, socket.htons(port), abi.addr(None)
    for external in (ON_LAN,) if rule.from_inside else externals_of(rule, externals):
        if rule.source:
            remote, bits = abi.addr(rule.source.network_address), REMOTE_AT + rule.source.prefixlen
            for port in range(rule.first, rule.last + 1):
                yield bits, external, class_of(rule), socket.htons(port), remote
        else:
            for port, bits in forwards.port_prefixes(rule.first, rule.last):
                yield PORT_AT + bits, external, class_of(rule), socket.htons(port), abi.addr(None)


def externals_of(rule: Rule, externals: int) -> Iterable[int]:
    """The indices of the external addresses that it is on."""
    return [rule.lease.external] if rule.lease else range(externals)
