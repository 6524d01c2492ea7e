"""What Prometheus is shown: read from the kernel's tables and the agent's notes when it asks, and copied nowhere.

The only importer of prometheus_client. Every part of a collection stands for itself: one that fails is left out, said
in the log, and counted.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from xdpmasq import __version__, blocks, census, forwarding, health, pinholes
from xdpmasq import config as configuration
from xdpmasq.abi import CLASSES, addr
from xdpmasq.alg import switches
from xdpmasq.datapath import wan_names
from xdpmasq.exporter import Answer, Exporter
from xdpmasq.families import BY_REASON, FAMILIES, PREFIX, TRANSLATED, TRANSLATED_BYTES, TURNS, Family
from xdpmasq.net import netdev
from xdpmasq.programs import Programs
from xdpmasq.pulse import Pulse
from xdpmasq.punting import Punting
from xdpmasq.recorder import Recorder
from xdpmasq.sessions import STATES, TCP
from xdpmasq.tables import Tables
from xdpmasq.webconfig import Web

log = logging.getLogger("xdpmasq")

SWITCH_S = 0.001  # the longest that the agent waits for its turn at the interpreter, each time
COUNTABLE = range(1024, 65537)  # entries; smaller ones hold settings, and the sessions tell how full larger ones are

Series = Mapping[tuple[str, ...], Any]  # label values → number; of a summary (count, sum)


@dataclass(frozen=True)
class Subject:
    """What is shown. Only looked at.

    Attributes:
        manifest: the agent's own, which it changes.
    """

    tables: Tables
    programs: Programs
    manifest: Mapping[str, Any]
    pulse: Pulse
    punting: Punting
    recorder: Recorder | None = None


class Sheet:
    """Values, as they are collected."""

    def __init__(self) -> None:
        self.values: defaultdict[str, dict[tuple[str, ...], Any]] = defaultdict(dict)

    def put(self, name: str, value: Any, *labels: object) -> None:
        assert len(labels) == len(FAMILIES[name].labels), name
        self.values[name][tuple(map(str, labels))] = value


class Metrics(Collector):
    """Collects when asked.

    Args:
        top_hosts: how many internal hosts have series of their own.
    """

    def __init__(self, subject: Subject, top_hosts: int = 0) -> None:
        self._subject, self._top = subject, top_hosts
        self._hosts = census.Hosts(len(subject.tables.sessions)) if top_hosts else None
        self._errors = 0
        self._parts: tuple[Callable[[Sheet], None], ...] = (
            *(self._agent, self._interfaces, self._counters, self._translations, self._sessions, self._blocks),
            *(self._forwards, self._maps, self._programs, self._punts, self._algs, self._log),
        )

    def collect(self) -> Iterable[Any]:
        """Called by prometheus_client."""
        started, sheet = time.monotonic(), Sheet()
        for part in self._parts:
            try:
                part(sheet)
            except Exception:  # an interface may go under our hands, and the rest is still worth showing
                self._errors += 1
                log.warning("metrics: %s failed", part.__name__, exc_info=True)
        sheet.put("collect_errors_total", self._errors)
        sheet.put("collect_duration_seconds", time.monotonic() - started)
        return [_filled(FAMILIES[name], sheet.values[name]) for name in FAMILIES if name in sheet.values]

    def _agent(self, sheet: Sheet) -> None:
        manifest, pulse = self._subject.manifest, self._subject.pulse
        sheet.put("build_info", 1, __version__)
        sheet.put("working", not health.why_not(manifest))
        sheet.put("attach_time_seconds", manifest["attached_at"])
        sheet.put("agent_start_time_seconds", pulse.started_at)
        sheet.put("agent_last_tick_time_seconds", pulse.ticked_at)
        sheet.put("agent_restarts_total", manifest["restarts"])
        sheet.put("expiry_duration_seconds", (pulse.expiries, pulse.expiry_s))
        sheet.put("next_hop_disarms_total", pulse.disarms)
        sheet.put("wan_changes_total", pulse.wan_changes)

    def _interfaces(self, sheet: Sheet) -> None:
        port, traffic = self._subject.punting.port, netdev.traffic()
        names = {each["index"]: each["name"] for each in self._subject.manifest["interfaces"]}
        for each in self._subject.manifest["interfaces"]:
            for hook in ("xdp", "tc", "none"):
                sheet.put("interface_hook", each["hook"] == hook, each["name"], each["role"], hook)
        for index, name in {**names, **({port.ifindex: port.name} if port else {})}.items():
            if index in traffic:
                self._traffic(sheet, name, traffic[index])

    def _traffic(self, sheet: Sheet, name: str, counted: netdev.Traffic) -> None:
        sheet.put("interface_receive_packets_total", counted.rx_packets, name)
        sheet.put("interface_receive_bytes_total", counted.rx_bytes, name)
        sheet.put("interface_receive_dropped_total", counted.rx_dropped, name)
        sheet.put("interface_transmit_packets_total", counted.tx_packets, name)
        sheet.put("interface_transmit_bytes_total", counted.tx_bytes, name)
        sheet.put("interface_transmit_dropped_total", counted.tx_dropped, name)
        sheet.put("interface_carrier_changes_total", counted.carrier_changes, name)

    def _counters(self, sheet: Sheet) -> None:
        for name, count in self._subject.tables.counters().items():
            kind, _, rest = name.partition("_")
            if kind in BY_REASON:
                sheet.put(BY_REASON[kind].name, count, rest)
            elif name in TURNS:
                sheet.put(TURNS[name].name, count)

    def _translations(self, sheet: Sheet) -> None:
        wans = wan_names(self._subject.manifest)
        for (wan, name), (packets, octets) in self._subject.tables.translations().items():
            path, _, rest = name.partition("_")
            direction, kind = _direction_and_kind(rest)
            if direction != "other" or wan == 0:
                labels = (wans[wan] if direction != "other" else "", path, direction, kind)
                sheet.put(TRANSLATED.name, packets, *labels)
                sheet.put(TRANSLATED_BYTES.name, octets, *labels)

    def _sessions(self, sheet: Sheet) -> None:
        tables = self._subject.tables
        counted = census.take(tables, self._hosts)
        for number, protocol in enumerate(CLASSES):
            for state, name in enumerate(STATES):
                if (number == TCP) is (name not in ("UNREPLIED", "REPLIED")):
                    sheet.put("sessions", int(counted.states[number, state]), protocol, name.lower())
            for way, direction in (("out", "outbound"), ("in", "inbound")):
                sheet.put("carried_packets", int(counted.carried[f"{way}_packets"][number]), protocol, direction)
                sheet.put("carried_bytes", int(counted.carried[f"{way}_bytes"][number]), protocol, direction)
        sheet.put("further_sessions", counted.further)
        sheet.put("further_sessions_room", tables.further)
        self._ports(sheet, counted)
        if self._hosts:
            self._largest(sheet, self._hosts)

    def _ports(self, sheet: Sheet, counted: census.Census) -> None:
        settings = self._subject.tables.settings
        for external, word in enumerate(settings["external"]["word"][:, 0].tolist()):
            if not word:
                continue
            for number, protocol in enumerate(CLASSES):
                room = int(settings["pool"][number]["count"].sum())
                sheet.put("external_ports_pool", room, _text(word), protocol)
                for use, count in zip(census.USES, counted.ports[external, number].tolist(), strict=True):
                    sheet.put("external_ports", count, _text(word), protocol, use)

    def _blocks(self, sheet: Sheet) -> None:
        tables = self._subject.tables
        if not blocks.size(tables):
            return
        words = tables.settings["external"]["word"][:, 0].tolist()
        for word, counts in zip(words, blocks.use(tables).tolist(), strict=False):
            for use, count in zip(("used", "free"), counts, strict=True):
                if word:
                    sheet.put("port_blocks", count, _text(word), use)

    def _largest(self, sheet: Sheet, hosts: census.Hosts) -> None:
        limits = self._subject.tables.maps["hosts"]
        for place in hosts.first(self._top):
            host, (count, out, in_) = _text(int(hosts.addresses[place])), hosts.sums[place].tolist()
            sheet.put("host_sessions", count, host)
            sheet.put("host_bytes_total", out, host, "outbound")
            sheet.put("host_bytes_total", in_, host, "inbound")
            if (limit := limits.get(addr(IPv4Address(host)))) is not None:
                sheet.put("host_refused_sessions_total", int(limit["refused"]), host)
                for number, protocol in enumerate(CLASSES):
                    sheet.put("host_external_ports", int(limit["mappings"][number]), host, protocol)

    def _forwards(self, sheet: Sheet) -> None:
        placed = forwarding.read(self._subject.tables)
        for each in placed:
            rule = each.rule
            if not rule.lease:  # those come and go, under names of the hosts' choosing
                side = "lan" if rule.from_inside else "wan"
                labels = (rule.kind, side, rule.protocol, rule.ports, rule.source or "")
                sheet.put("forward_sessions_total", each.opened, *labels)
        sheet.put("leased_forwards", sum(bool(each.rule.lease) for each in placed))

    def _maps(self, sheet: Sheet) -> None:
        for name, map_ in self._subject.tables.maps.items():
            if map_.is_hash and map_.max_entries in COUNTABLE:
                sheet.put("map_entries", map_.count(), name)
                sheet.put("map_max_entries", map_.max_entries, name)

    def _programs(self, sheet: Sheet) -> None:
        for name, program in self._subject.programs.loaded.items():
            runs, spent_ns = program.runs()
            if runs:  # else the kernel does not count
                sheet.put("program_runs_total", runs, name)
                sheet.put("program_run_time_seconds_total", spent_ns / 1e9, name)

    def _algs(self, sheet: Sheet) -> None:
        counted = self._subject.manifest.get("algs", {})
        for name in sorted({use.name for use in switches.read(self._subject.tables)} | counted.keys()):
            counts = counted.get(name, {})
            sheet.put("alg_messages_total", counts.get("messages", 0), name)
            for outcome in ("edited", "unparsed", "refused", "failed", "late", "unasked"):
                sheet.put("alg_outcomes_total", counts.get(outcome, 0), name, outcome)
        for protocol, count in pinholes.counted(self._subject.tables).items():
            sheet.put("pinholes", count, protocol)

    def _punts(self, sheet: Sheet) -> None:
        port = self._subject.punting.port
        sheet.put("punt_port_up", bool(port))
        sheet.put("fragments_held", port.held if port else 0)
        for outcome, count in (port.counts if port else {}).items():
            family = "refusals_total" if outcome in ("told", "untold") else "held_fragments_total"
            sheet.put(family, count, outcome)

    def _log(self, sheet: Sheet) -> None:
        recorder = self._subject.recorder
        if not recorder:
            return
        for each in recorder.targets:
            sheet.put("log_records_total", each.written, each.name)
            sheet.put("log_lost_records_total", each.lost, each.name)
            sheet.put("log_waiting_records", each.backlog, each.name)
        sheet.put("log_missed_events_total", recorder.missed)
        sheet.put("log_repeated_refusals_total", recorder.repeated)


def _filled(family: Family, series: Series) -> Any:
    """For prometheus_client."""
    name = PREFIX + family.name
    if family.kind == "info":
        info = InfoMetricFamily(name.removesuffix("_info"), family.help)
        for labels in series:
            info.add_metric([], dict(zip(family.labels, labels, strict=True)))
        return info
    makers = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "summary": SummaryMetricFamily}
    made = makers[family.kind](name, family.help, labels=family.labels)
    for labels, value in series.items():
        made.add_metric(labels, *(value if family.kind == "summary" else (value,)))
    return made


def _direction_and_kind(rest: str) -> tuple[str, str]:
    """Of a translated packet, by what follows ``fast_`` or ``slow_`` in its counter's name."""
    kind, _, direction = rest.rpartition("_")
    return (direction, kind or "plain") if direction in ("outbound", "inbound") else ("other", rest)


def _text(word: int) -> str:
    """An address as the tables have it."""
    return str(IPv4Address(word.to_bytes(4, "little")))


# --- serving ---------------------------------------------------------------------------------------


def answer(subject: Subject, top_hosts: int = 0) -> Answer:
    """What makes the text that is shown, of the kind that is accepted."""
    registry = CollectorRegistry()
    registry.register(Metrics(subject, top_hosts))
    ProcessCollector(registry=registry)

    def made(accept: str) -> tuple[bytes, str]:
        encoder, kind = choose_encoder(accept)
        return encoder(registry), kind

    return made


@contextlib.contextmanager
def listening(config: configuration.Metrics) -> Iterator[Callable[[Subject], None]]:
    """Holds the endpoint; what it yields is called once there is something to show.

    Raises:
        MasqError: the endpoint or the file with TLS and passwords cannot be used.
    """
    assert config.endpoint
    web = Web.read(Path(config.web_config)) if config.web_config else Web()
    exporter = Exporter(config.endpoint, web)
    sys.setswitchinterval(SWITCH_S)
    try:
        yield lambda subject: exporter.serve(answer(subject, config.top_hosts))
    finally:
        exporter.close()
