"""The log of an agent at work: from the configuration to a file and a collector, through its agents' lives.

::

    a-box ── lan0 masq-gate wan0 ── internet (echo on .10)
                  nat.json, collector on 127.0.0.1:4739
"""

import json
import os
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import netflow
import pytest
from netkit import Gateway, answers, soon

from xdpmasq.lab.topology import HOSTS, PUBLIC

pytestmark = pytest.mark.xdist_group("log")
CONFIG = '[log]\nfile = "nat.json"\nipfix = "127.0.0.1:4739"\n'


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events(path: Path) -> list[str]:
    return [each["event"] for each in lines(path)]


@pytest.mark.parametrize("mode", ["tc"], indirect=True)
def test_its_life(bare: Gateway, tmp_path: Path) -> None:
    config, path, old = tmp_path / "masq.toml", tmp_path / "nat.json", tmp_path / "nat.json.1"
    config.write_text(CONFIG)
    path.mkdir()
    assert f"cannot log to {path}: Is a directory" in bare.attach("--config", str(config), check=False)
    assert not bare.is_attached
    path.rmdir()

    with ExitStack() as stack:
        with bare.inside():
            bound = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            bound.bind(("127.0.0.1", 4739))
        bound.settimeout(10)
        collector = Collector(bound)
        bare.attach("--config", str(config))
        assert events(path) == ["started"]
        client = stack.enter_context(bare.udp("a-box"))
        assert answers(client)
        soon(lambda: events(path) == ["started", "opened"], "the mapping is logged")
        opened = lines(path)[1]
        assert opened["internal"] == {"address": HOSTS["a-box"], "port": client.getsockname()[1]}
        assert "remote" not in opened
        assert collector.next() == (8, opened["external"]["port"])
        assert 'log_records_total{target="ipfix"} 1' in bare.gate("curl", "-sS", "http://127.0.0.1:9477/metrics")

        path.rename(old)
        agent = bare.agent_pid
        assert agent
        os.kill(agent, signal.SIGUSR1)
        bare.masq("sessions", "flush", "--all")
        soon(lambda: events(path) == ["closed"], "the new file has the end")
        assert lines(path)[0]["why"] == "flushed"
        assert collector.next() == (9, opened["external"]["port"])

        assert answers(client)
        soon(lambda: events(path) == ["closed", "opened"], "the mapping is there again")
        bare.kill_agent()
        bare.attach("--config", str(config))
        soon(lambda: events(path)[2:] == ["started", "opened"], "the next agent takes stock")
        assert lines(path)[3]["why"] == "running"
        assert abs(lines(path)[3]["time"] - lines(path)[1]["time"]) < 0.1
        bare.detach()
        assert events(path)[4:] == ["stopped"]


class Collector:
    """By an implementation that is not ours."""

    def __init__(self, bound: socket.socket) -> None:
        self._socket, self._templates = bound, {"netflow": {}, "ipfix": {}}
        self._flows: list[Any] = []

    def next(self) -> tuple[int, int]:
        """The NAT event and the external port of the next data record."""
        found = self.flow()
        return found.natEvent, found.postNAPTSourceTransportPort

    def flow(self) -> Any:
        """The next data record."""
        while not self._flows:
            self._flows += netflow.parse_packet(self._socket.recv(2000), self._templates).flows
        return self._flows.pop(0)


@pytest.mark.req("6888-14")
@pytest.mark.parametrize("mode", ["tc"], indirect=True)
def test_blocks(bare: Gateway, tmp_path: Path) -> None:
    """One record for many mappings, and one when the host has given its ports back; the next agent goes on."""
    config, path = tmp_path / "masq.toml", tmp_path / "blocks.json"
    ports, log = (
        "[ports]\nblock_size = 512\n",
        '[log]\nwhat = "blocks"\nfile = "blocks.json"\nipfix = "127.0.0.1:4739"\n',
    )
    config.write_text("[timeouts]\nport_rest_s = 0\n" + ports + log)
    with ExitStack() as stack:
        with bare.inside():
            bound = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            bound.bind(("127.0.0.1", 4739))
        bound.settimeout(10)
        collector = Collector(bound)
        bare.attach("--config", str(config))
        clients = [stack.enter_context(bare.udp("a-box")) for _ in range(20)]
        assert all(answers(client) for client in clients)
        other = stack.enter_context(bare.udp("b-box"))
        assert answers(other)
        soon(lambda: events(path) == ["started", "opened", "opened"], "each host has a block")
        opened = {each["internal"]["address"]: each for each in lines(path)[1:]}
        assert set(opened) == {HOSTS["a-box"], HOSTS["b-box"]}
        mine = opened[HOSTS["a-box"]]["external"]
        assert mine["last"] - mine["first"] == 511
        told = {flow.portRangeStart: flow for flow in (collector.flow(), collector.flow())}
        assert {flow.natEvent for flow in told.values()} == {16}
        assert told[mine["first"]].portRangeEnd == mine["last"]
        rows = json.loads(bare.masq("sessions", "--json").stdout)
        externals = {each["external"]["port"] for each in rows if each["internal"]["address"] == HOSTS["a-box"]}
        assert len(externals) == 20
        assert all(mine["first"] <= port <= mine["last"] for port in externals)
        assert " blocks of 512 taken" in bare.masq("status").stdout
        assert 'xdpmasq_port_blocks{address="' + PUBLIC + '",use="used"} 2' in bare.gate(
            *("curl", "-sS", "http://127.0.0.1:9477/metrics")
        )

        bare.kill_agent()
        bare.attach("--config", str(config))
        soon(lambda: events(path)[3:] == ["started", "opened", "opened"], "the next agent takes stock")
        assert {each["external"]["first"] for each in lines(path)[4:]} == set(told)
        collector.flow(), collector.flow()
        config.write_text(config.read_text().replace("512", "1024"))
        assert "block_size" in bare.masq("reload", check=False).stderr

        bare.masq("sessions", "flush", "--all")
        soon(lambda: events(path)[6:] == ["closed", "closed"], "both are given back", timeout_s=20)
        assert {collector.flow().natEvent, collector.flow().natEvent} == {17}
