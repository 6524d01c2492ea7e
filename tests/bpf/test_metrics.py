"""What Prometheus is shown of real tables, after real packets."""

import contextlib
import shutil
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from harness import ACK, GATEWAY, HOST, OTHER_HOST, OTHER_SERVER, PSH, SERVER, Gateway, echo, tcp, udp
from prometheus_client.parser import text_string_to_metric_families
from scapy.layers.inet import IP, UDP
from scapy.packet import Raw

from xdpmasq import bpf, config, metrics
from xdpmasq.alg import switches
from xdpmasq.algs import Use
from xdpmasq.families import FAMILIES, PREFIX
from xdpmasq.net import netdev
from xdpmasq.pulse import Pulse

Values = dict[tuple[str, ...], float]
OUTCOMES = {"edited": 3, "unparsed": 11, "refused": 12, "failed": 13, "late": 14, "unasked": 15}


class Shown:
    """One scrape after another."""

    def __init__(self, gateway: Gateway, top_hosts: int = 0) -> None:
        bench = gateway.bench
        interfaces = [
            {"name": link.name, "index": link.index, "role": role, "hook": "xdp"}
            for link, role in ((bench.lan, "lan"), (bench.wan, "wan"))
        ]
        manifest = {
            **{"interfaces": interfaces, "external": GATEWAY, "wan": "wan0", "lans": ["lan0"]},
            **{"attached_at": 1.0, "restarts": 2, "algs": {"ftp": {"messages": 7, **OUTCOMES}}},
        }
        counts = dict.fromkeys(("held", "released", "expired", "refused", "told", "untold"), 0)
        port = SimpleNamespace(ifindex=bench.punt.index, name="masq-punt0", held=3, counts={**counts, "held": 7})
        target = SimpleNamespace(name="file", written=3, lost=0, backlog=0)
        self.subject = metrics.Subject(
            gateway.tables,
            bench.programs,
            manifest,
            Pulse(started_at=5.0),
            SimpleNamespace(port=port),  # type: ignore[arg-type]
            SimpleNamespace(targets=[target], missed=0, repeated=0),  # type: ignore[arg-type]
        )
        self._answer = metrics.answer(self.subject, top_hosts)

    def text(self, accepted: str = "") -> str:
        return self._answer(accepted)[0].decode()

    def values(self) -> Values:
        """(name without prefix, label values in the order of their names) → value."""
        return {
            (each.name.removeprefix(PREFIX), *(value for _, value in sorted(each.labels.items()))): each.value
            for family in text_string_to_metric_families(self.text())
            for each in family.samples
        }

    @contextlib.contextmanager
    def growing(self) -> Iterator[Values]:
        """Fills the dictionary with what grew inside the block, and by how much."""
        grown: Values = {}
        before = self.values()
        yield grown
        grown |= {
            key: value - before.get(key, 0) for key, value in self.values().items() if value != before.get(key, 0)
        }


@pytest.fixture
def shown(gateway: Gateway) -> Shown:
    return Shown(gateway)


def test_a_session(gateway: Gateway, shown: Shown) -> None:
    with shown.growing() as grown:
        port = gateway.outbound(udp(HOST, 5000, SERVER, 53, payload=bytes(72))).port
        gateway.inbound(udp(SERVER, 53, GATEWAY, port, payload=bytes(172)))
    for direction, length in (("outbound", 100), ("inbound", 200)):
        assert grown[("translated_packets_total", direction, "wan0", "plain", "slow")] == 1
        assert grown[("translated_bytes_total", direction, "wan0", "plain", "slow")] == length
    assert grown[("session_opened_total",)] == grown[("mapping_opened_total",)] == 1
    assert grown[("sessions", "udp", "replied")] == 1
    assert grown[("carried_bytes", "outbound", "udp")] == 100
    assert grown[("carried_bytes", "inbound", "udp")] == 200
    assert grown[("carried_packets", "inbound", "udp")] == 1
    assert grown[("external_ports", GATEWAY, "udp", "used")] == 1
    assert grown[("map_entries", "hosts")] == 1
    assert not any(name[0].startswith("dropped") for name in grown)


def test_the_fast_path(gateway: Gateway, shown: Shown) -> None:
    gateway.accelerate()
    gateway.outbound(udp(HOST, 5000, SERVER, 53))
    with shown.growing() as grown:
        gateway.fast_outbound(udp(HOST, 5000, SERVER, 53, payload=bytes(72)))
        gateway.fast_outbound(udp(HOST, 5001, SERVER, 53))
    assert grown[("translated_packets_total", "outbound", "wan0", "plain", "fast")] == 1
    assert grown[("translated_bytes_total", "outbound", "wan0", "plain", "fast")] == 100
    assert grown[("passed_up_packets_total", "no_flow")] == 1


def test_a_hairpin_passes_no_wan(gateway: Gateway, shown: Shown) -> None:
    gateway.forward("udp", 8080, (OTHER_HOST, 80))
    with shown.growing() as grown:
        assert gateway.hairpin(udp(HOST, 5000, GATEWAY, 8080, payload=bytes(72))).ended == "slow_hairpin"
    assert grown[("translated_packets_total", "other", "", "hairpin", "slow")] == 1
    assert grown[("translated_bytes_total", "other", "", "hairpin", "slow")] == 100
    assert len([name for name in grown if name[0].startswith("translated")]) == 2


def test_further_sessions(gateway: Gateway, shown: Shown) -> None:
    gateway.outbound(udp(HOST, 5000, SERVER, 53))
    with shown.growing() as grown:
        gateway.outbound(udp(HOST, 5000, OTHER_SERVER, 53))
    assert grown[("further_sessions",)] == grown[("sessions", "udp", "unreplied")] == 1
    assert ("external_ports", GATEWAY, "udp", "used") not in grown


def test_drops_by_reason(gateway: Gateway, shown: Shown) -> None:
    port = gateway.outbound(tcp(HOST, 5000, SERVER, 80, 0x02)).port
    with shown.growing() as grown:
        gateway.inbound(tcp(OTHER_SERVER, 80, GATEWAY, port))
    assert grown[("dropped_packets_total", "filtered")] == 1


def test_a_pool(gateway: Gateway, shown: Shown) -> None:
    gateway.pool(udp=((2000, 100), (61000, 10)))
    assert shown.values()[("external_ports_pool", GATEWAY, "udp")] == 110


def test_a_forward(gateway: Gateway, shown: Shown) -> None:
    gateway.forward("tcp", 8080, (HOST, 80), source="198.51.100.0/24")
    before = shown.values()
    assert before[("forward_sessions_total", "forward", "8080", "tcp", "wan", "198.51.100.0/24")] == 0
    assert before[("external_ports", GATEWAY, "tcp", "forwarded")] == 1
    gateway.inbound(tcp(OTHER_SERVER, 1000, GATEWAY, 8080, 0x02))
    assert shown.values()[("forward_sessions_total", "forward", "8080", "tcp", "wan", "198.51.100.0/24")] == 1


def test_the_punt_port(gateway: Gateway, shown: Shown) -> None:
    """What goes there, what comes back, and what it would have read."""
    gateway.attend()
    later = [IP(src=HOST, dst=SERVER, id=id_, frag=100) / UDP() / Raw(bytes(72)) for id_ in range(3)]
    with shown.growing() as grown:
        frames = [gateway.outbound(each).frame for each in later]
        for frame in frames[:2]:
            assert gateway.punt_in(frame).ended == "punt_return"
    assert grown[("punted_packets_total", "fragment")] == 3
    assert grown[("punted_packets_total", "return")] == 2


def test_an_alg_without_its_agent(gateway: Gateway, shown: Shown) -> None:
    switches.put(gateway.tables, Use.parse("ftp"))
    try:
        with shown.growing() as grown:
            gateway.connect(HOST, 5000, SERVER, 21)
            for nth in range(3):
                gateway.outbound(tcp(HOST, 5000, SERVER, 21, ACK | PSH, seq=101 + nth, ack=501, payload=b"x"))
    finally:
        switches.take(gateway.tables, "ftp")
    assert grown[("alg_bypassed_total",)] == 2 + 3  # both SYNs, and the texts


def test_how_full_maps_are_and_how_often_programs_run(gateway: Gateway, shown: Shown) -> None:
    with bpf.counting_runs():
        gateway.outbound(udp(HOST, 5000, SERVER, 53))
        with shown.growing() as grown:
            for nth in range(3):
                gateway.outbound(udp(f"192.168.0.{20 + nth}", 5000, SERVER, 53))
            assert shown.values()[("map_max_entries", "hosts")] == 16384
    assert grown[("map_entries", "hosts")] == 3
    assert grown[("program_runs_total", "masq_wan_out")] == 3
    assert 0 < grown[("program_run_time_seconds_total", "masq_wan_out")] < 1


def test_what_the_agent_notes(shown: Shown) -> None:
    for _ in range(3):
        with shown.subject.pulse.expiring():
            pass
    shown.subject.pulse.disarms = 4
    found = shown.values()
    assert found[("expiry_duration_seconds_count",)] == 3
    assert found[("expiry_duration_seconds_sum",)] == shown.subject.pulse.expiry_s
    assert (found[("next_hop_disarms_total",)], found[("agent_restarts_total",)]) == (4, 2)
    assert (found[("fragments_held",)], found[("held_fragments_total", "held")]) == (3, 7)


def test_hosts_are_named_only_when_asked_and_only_the_first(gateway: Gateway, shown: Shown) -> None:
    asked = Shown(gateway, top_hosts=1)
    asked.values()
    for _ in range(3):
        gateway.outbound(udp(HOST, 5000, SERVER, 53, payload=bytes(72)))
    gateway.outbound(udp(OTHER_HOST, 5000, SERVER, 53, payload=bytes(72)))
    found = asked.values()
    assert found[("host_bytes_total", "outbound", HOST)] == 300
    assert found[("host_sessions", HOST)] == found[("host_external_ports", HOST, "udp")] == 1
    assert found[("host_refused_sessions_total", HOST)] == 0
    assert OTHER_HOST not in asked.text()
    assert HOST not in shown.text()


def test_an_alg_that_is_on_is_there_before_its_first_message(gateway: Gateway, shown: Shown) -> None:
    switches.put(gateway.tables, Use.parse("sip"))
    try:
        found = shown.values()
    finally:
        switches.take(gateway.tables, "sip")
    assert (found[("alg_messages_total", "sip")], found[("alg_messages_total", "ftp")]) == (0, 7)
    for outcome, count in OUTCOMES.items():
        assert [found[("alg_outcomes_total", alg, outcome)] for alg in ("sip", "ftp")] == [0, count]
    assert ("alg_messages_total", "sip") not in shown.values()


def test_a_collection_that_takes_long_holds_up_nobody(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that has metrics served is the agent's: it goes on while they are collected."""
    begun, go_on, collectors = threading.Event(), threading.Event(), []

    def long() -> dict[int, netdev.Traffic]:
        collectors.append(threading.current_thread())
        begun.set()
        assert go_on.wait(20)
        return {}

    monkeypatch.setattr(netdev, "traffic", long)
    with socket.create_server(("127.0.0.1", 0)) as free:
        endpoint = "{}:{}".format(*free.getsockname())
    with metrics.listening(config.Metrics(listen=endpoint)) as show:
        show(shown.subject)
        found: list[bytes] = []
        asking = threading.Thread(target=lambda: found.append(_read(f"http://{endpoint}/metrics")))
        asking.start()
        assert begun.wait(20)
        assert (found, threading.current_thread() in collectors) == ([], False)
        go_on.set()
        asking.join(20)
    assert b"\nxdpmasq_working 1.0\n" in found[0]


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return bytes(answer.read())


def test_a_part_that_fails_is_left_out(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise OSError("gone")

    monkeypatch.setattr(netdev, "traffic", fails)
    for times in (1, 2):
        found = shown.values()
        assert found[("collect_errors_total",)] == times
        assert ("sessions", "udp", "replied") in found
        assert not any(name[0].startswith("interface_receive") for name in found)


def test_every_metric_is_there_and_within_its_bounds(gateway: Gateway) -> None:
    """Also: promtool finds nothing to say."""
    shown = Shown(gateway, top_hosts=10)
    gateway.forward("udp", 9000, (HOST, 80))
    with bpf.counting_runs():
        gateway.outbound(echo(HOST, SERVER, 7))
    text = shown.text()
    series: dict[str, int] = {}
    for family in text_string_to_metric_families(text):
        name = {"counter": f"{family.name}_total", "info": f"{family.name}_info"}.get(family.type, family.name)
        series[name.removeprefix(PREFIX)] = len(family.samples)
    own = {name: count for name, count in series.items() if not name.startswith("process_")}
    assert own.keys() == FAMILIES.keys() - {"port_blocks"}  # ports are not given out in blocks here
    bounded = {name: int(family.most) for name, family in FAMILIES.items() if family.most.isdigit()}
    over = {name for name, most in bounded.items() if own.get(name, 0) > most}
    assert over == {"expiry_duration_seconds"}  # a count and a sum
    if shutil.which("promtool"):
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_openmetrics(shown: Shown) -> None:
    assert shown.text("application/openmetrics-text; version=1.0.0").endswith("# EOF\n")
