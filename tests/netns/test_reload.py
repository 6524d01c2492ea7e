"""A changed configuration takes effect while everything goes on.

::

    a-box .2, b-box .3 ─ lan0 masq-gate wan0 203.0.113.1 ─ internet
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from netkit import Gateway, soon

from xdpmasq import forwarding
from xdpmasq.lab.servers import EchoServer
from xdpmasq.lab.topology import INTERNET, PUBLIC
from xdpmasq.tables import FEW

BASE = """\
[interfaces]
wan = "wan0"
lan = ["lan0"]
mode = "tc"
"""


class Reloaded:
    """A gateway and its file."""

    def __init__(self, gateway: Gateway, file: Path) -> None:
        self.gateway, self.file = gateway, file

    def write(self, text: str) -> None:
        self.file.write_text(BASE + text)

    def reload(self, text: str) -> str:
        """What the command says; on stderr when it fails."""
        self.write(text)
        done = self.gateway.masq("reload", check=False)
        assert (done.returncode == 0) is bool(done.stdout)
        return done.stdout or done.stderr


@pytest.fixture(scope="module")
def of_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reloaded]:
    with Gateway.in_new_lab("tc", attach=False) as gateway:
        made = Reloaded(gateway, tmp_path_factory.mktemp("reload") / "config.toml")
        made.write("")
        gateway.masq("attach", "--config", str(made.file))
        EchoServer(gateway.lab)
        yield made


IN_FORCE = "the configuration is in force\n"


def test_settings_change_and_sessions_go_on(of_file: Reloaded) -> None:
    gateway = of_file.gateway
    with gateway.connection() as connection, gateway.udp("a-box") as client:
        client.connect((INTERNET, 7))
        client.send(b"before")
        public = client.recv(100)
        assert of_file.reload("[timeouts]\nudp_s = 1000\n[filtering]\nudp = 'endpoint-independent'\n") == IN_FORCE
        settings = gateway.tables.settings
        assert settings["udp"] == 1000 * settings["hz"]
        assert settings["filtering"].tolist() == [0, 2, 0, 0]
        client.send(b"before")
        assert client.recv(100) == public
        connection.talk(20)
    assert of_file.reload("") == IN_FORCE
    assert gateway.tables.settings["udp"] == 300 * settings["hz"]


def test_rules_of_the_file_come_and_go(of_file: Reloaded) -> None:
    """Those of the command line stay."""
    gateway = of_file.gateway
    gateway.masq("forward", "add", "tcp", "7777", "192.168.0.2:77")
    forward = '[[forward]]\nprotocol = "tcp"\nports = 8080\nto = "192.168.0.2:80"\n'
    assert of_file.reload(forward) == IN_FORCE
    assert listed(gateway) == {8080, 7777}
    assert of_file.reload(forward.replace("8080", "8081")) == IN_FORCE
    assert listed(gateway) == {8081, 7777}
    assert of_file.reload("") == IN_FORCE
    assert listed(gateway) == {7777}
    gateway.masq("forward", "del", "tcp", "7777")


def listed(gateway: Gateway) -> set[int]:
    """First ports of the forwards."""
    return {each.rule.first for each in forwarding.read(gateway.tables)}


def test_other_ports(of_file: Reloaded) -> None:
    """New mappings are among the new ones, and old ports are nobody's once their mappings have ended."""
    gateway = of_file.gateway
    with gateway.udp("a-box") as early:
        before = seen(early)
        assert of_file.reload("[ports]\nfirst = 20000\nlast = 21999\n") == IN_FORCE
        assert seen(early) == before
        ports = set()
        for _ in range(20):
            with gateway.udp("a-box") as client:
                ports.add(seen(client))
        assert all(20000 <= port <= 21999 for port in ports)
    assert of_file.reload("") == IN_FORCE
    ports = set()
    for _ in range(40):
        with gateway.udp("a-box") as client:
            ports.add(seen(client))
    assert any(not 20000 <= port <= 21999 for port in ports), "the whole pool is there again"


def seen(client: object) -> int:
    client.sendto(b"who", (INTERNET, 7))  # type: ignore[attr-defined]
    return int(client.recv(100).split(b":")[1].split()[0])  # type: ignore[attr-defined]


def asked_for(gateway: Gateway) -> int:
    """How often the agent has been asked to read its file again."""
    return int(gateway.tables.manifest.get("reload", {}).get("count", 0))


@pytest.mark.req("attacks-config")
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[timeouts]\nudp_s = -1\n", "timeouts.udp_s"),
        ("[nonsense]\n", "unknown table [nonsense]"),
        ('[external]\naddresses = ["203.0.113.1", "203.0.113.7"]\n', "no room for these external addresses"),
    ],
)
def test_a_wrong_file_changes_nothing(of_file: Reloaded, text: str, why: str) -> None:
    """By the command, and by a signal."""
    gateway = of_file.gateway
    agent = gateway.status()["agent"]["pid"]
    assert why in of_file.reload(text)
    before = asked_for(gateway)
    os.kill(agent, signal.SIGHUP)
    soon(lambda: asked_for(gateway) > before, "the agent has read it")
    assert gateway.tables.manifest["reload"]["error"]
    assert (gateway.status()["agent"]["pid"], gateway.opens()) == (agent, True)
    assert gateway.tables.settings["udp"] == 300 * gateway.tables.settings["hz"]
    assert of_file.reload("") == IN_FORCE


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param('[log]\nfile = "/nowhere/at/all/log"\n', "/nowhere/at/all", id="log"),
        pytest.param('[metrics]\nlisten = "127.0.0.1:9478"\n', "127.0.0.1:9478: the port is taken", id="port"),
        pytest.param('[metrics]\nweb_config = "web.yml"\n', "none.pem", id="tls"),
    ],
)
def test_what_fails_when_it_begins_leaves_everything_as_it_was(of_file: Reloaded, text: str, why: str) -> None:
    """The file is right, what it names cannot be used: the old configuration is in force, its metrics are served."""
    gateway = of_file.gateway
    agent = gateway.status()["agent"]["pid"]
    of_file.file.with_name("web.yml").write_text("tls_server_config: {cert_file: none.pem, key_file: none.pem}\n")
    forward = '[[forward]]\nprotocol = "tcp"\nports = 8080\nto = "192.168.0.2:80"\n'
    with gateway.listen("masq-gate", 9478, "127.0.0.1"):
        for _ in range(2):
            assert why in of_file.reload(text + forward)
            assert (gateway.status()["agent"]["pid"], listed(gateway), gateway.opens()) == (agent, set(), True)
    shown = gateway.lab.exec("masq-gate", ["curl", "-sS", "http://127.0.0.1:9477/metrics"]).stdout
    assert "xdpmasq_working 1.0" in shown
    assert of_file.reload("") == IN_FORCE


def test_forwards_of_a_refused_file_are_taken_out_again(of_file: Reloaded) -> None:
    """They were in place already when an interface refused XDP."""
    gateway = of_file.gateway
    gateway.gate("ip", "link", "add", "lan9", "type", "bridge")
    gateway.gate("ip", "link", "set", "lan9", "up")
    forward = '[[forward]]\nprotocol = "tcp"\nports = 8080\nto = "192.168.0.2:80"\n'
    try:
        of_file.file.write_text(BASE.replace('"lan0"', '"lan0", "lan9"').replace('"tc"', '"xdp"') + forward)
        refused = gateway.masq("reload", check=False)
        assert "lan9" in refused.stderr
        assert (listed(gateway), gateway.opens()) == (set(), True)
    finally:
        gateway.gate("ip", "link", "del", "lan9")
        assert of_file.reload("") == IN_FORCE


def test_a_wan_without_address(of_file: Reloaded) -> None:
    """The new configuration is refused, and the agent waits for the address as before."""
    gateway = of_file.gateway
    gateway.readdress()
    try:
        assert "no IPv4 address" in of_file.reload("[timeouts]\nudp_s = 500\n")
    finally:
        gateway.readdress("203.0.113.1/24")
    soon(gateway.opens, "it works again")
    assert of_file.reload("") == IN_FORCE


def test_pinholes_outlive_it(of_file: Reloaded) -> None:
    """An answer that was announced before comes in after."""
    gateway = of_file.gateway
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(gateway.listen("internet", 21, INTERNET))
        near = stack.enter_context(gateway.tcp("a-box", (INTERNET, 21)))
        far = stack.enter_context(listener.accept()[0])
        waiting = stack.enter_context(gateway.listen("a-box", 40000))
        far.settimeout(5)
        near.sendall(b"PORT 192,168,0,2,156,64\r\n")
        numbers = far.recv(100).split(b" ")[1].strip().split(b",")
        port = int(numbers[4]) * 256 + int(numbers[5])
        assert of_file.reload("[timeouts]\nudp_s = 400\n") == IN_FORCE
        time.sleep(1.5)  # a round of the agent
        data = stack.enter_context(gateway.tcp("internet", (PUBLIC, port)))
        end = stack.enter_context(waiting.accept()[0])
        data.sendall(b"here")
        assert end.recv(100) == b"here"
        near.sendall(b"PORT 192,168,0,2,156,65\r\n")
        assert far.recv(100).startswith(b"PORT 203,0,113,1,")


def test_no_text_passes_unread_meanwhile(of_file: Reloaded) -> None:
    """One agent hands the punt port over to the next: what comes in between waits there."""
    gateway = of_file.gateway
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(gateway.listen("internet", 21, INTERNET))
        near = stack.enter_context(gateway.tcp("a-box", (INTERNET, 21)))
        far = stack.enter_context(listener.accept()[0]).makefile("rb")
        others = iter(range(400, 1000))
        reloading = stack.enter_context(ThreadPoolExecutor(1))
        for _ in range(3):
            done = reloading.submit(of_file.reload, f"[timeouts]\nudp_s = {next(others)}\n")
            while not done.done():
                near.sendall(b"PORT 192,168,0,2,156,66\r\n")
                assert far.readline().startswith(b"PORT 203,0,113,1,")
            assert done.result() == IN_FORCE
    assert gateway.tables.counters()["alg_bypassed"] == 0


def test_thirty_times_leak_nothing(of_file: Reloaded) -> None:
    """While there are more sessions than are read one by one, the agent has their table mapped, once."""
    gateway, files = of_file.gateway, []
    agent = Path(f"/proc/{gateway.agent_pid}")
    with gateway.udp("a-box") as client:
        for nth in range(FEW + 1):
            client.sendto(b"", (INTERNET, 1024 + nth))
    soon(lambda: table_mappings(agent) == 1, "the agent has found them many")
    for nth in range(30):
        of_file.reload(f"[timeouts]\nudp_s = {300 + nth}\n")
        files.append(len(list((agent / "fd").iterdir())))
        assert table_mappings(agent) <= 1
    assert min(files[20:]) <= max(files[:10])  # one more may be open for a moment
    soon(lambda: table_mappings(agent) == 1, "the last agent has found them many")


def table_mappings(process: Path) -> int:
    """How often a process has mapped a map of more than a megabyte."""
    found = [line.split()[0].split("-") for line in (process / "maps").read_text().splitlines() if "bpf-map" in line]
    return sum(int(end, 16) - int(start, 16) > 1 << 20 for start, end in found)


def test_without_a_file() -> None:
    with Gateway.in_new_lab("tc") as gateway:
        refused = gateway.masq("reload", check=False)
        assert (refused.returncode, "there is no configuration file" in refused.stderr) == (2, True)
        gateway.kill_agent()
        refused = gateway.masq("reload", check=False)
        assert (refused.returncode, "the agent is not running" in refused.stderr) == (1, True)
