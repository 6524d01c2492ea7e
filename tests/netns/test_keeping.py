"""Sessions that outlive the gateway in a file: `sessions save`, all state gone, `sessions load`.

::

    a-box .2, b-box .3 ─ lan0 masq-gate wan0 203.0.113.1 ─ internet
"""

from __future__ import annotations

import contextlib
import json
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from netkit import Gateway, seen

from xdpmasq import keeping
from xdpmasq.errors import ConfigError
from xdpmasq.lab.servers import EchoServer
from xdpmasq.lab.topology import INTERNET, PUBLIC

pytestmark = pytest.mark.xdist_group("keeping")


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Gateway.in_new_lab("tc") as made:
        EchoServer(made.lab)
        yield made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sessions"


def load(gateway: Gateway, file: Path) -> tuple[int, dict[str, int]]:
    told = json.loads(gateway.masq("sessions", "load", str(file), "--json").stdout)
    return told["loaded"], told["left_out"]


def reboot(gateway: Gateway) -> None:
    """Nothing is left but files."""
    gateway.detach()
    gateway.attach()
    assert gateway.sessions() == []


def timeless(session: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in session.items() if name not in ("idle_s", "remaining_s")}


def test_connections_and_ports_come_back(gateway: Gateway, file: Path) -> None:
    """A TCP connection goes on, a UDP mapping keeps its external port for new remotes, states and counts stay."""
    with gateway.connection() as connection, gateway.udp("a-box") as client:
        connection.talk(3)
        public = seen(client)
        before = gateway.sessions()
        assert gateway.masq("sessions", "save", str(file)).stdout == f"2 sessions saved in {file}\n"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        reboot(gateway)
        assert load(gateway, file) == (2, {})
        after = gateway.sessions()
        assert [timeless(each) for each in after] == [timeless(each) for each in before]
        assert [each["state"] for each in after] == ["ESTABLISHED", "REPLIED"]
        for one, other in zip(before, after, strict=True):
            assert one["idle_s"] <= other["idle_s"] <= one["idle_s"] + 60
            assert one["remaining_s"] - 60 <= other["remaining_s"] <= one["remaining_s"]
        connection.talk(3)
        assert seen(client) == public
        client.sendto(b"who", (INTERNET, 53535))
        assert {each["external"]["port"] for each in gateway.sessions("--proto", "udp")} == {
            int(public.split(":")[1])
        }
        assert gateway.counters()["mapping_opened"] == 2
    gateway.masq("sessions", "flush", "--all")
    assert load(gateway, file)[0] == 2, "their ports rest, and are their hosts' still"
    gateway.masq("sessions", "flush", "--all")
    host = next(iter(gateway.tables.maps["hosts"].items()))[1][0]
    assert (host["sessions"], host["mappings"].tolist()) == (0, [0, 0, 0, 0]), "they were counted, and counted off"


def test_a_connection_through_a_forward(gateway: Gateway, file: Path) -> None:
    with gateway.forward("tcp", "8080", "192.168.0.2:80"), contextlib.ExitStack() as stack:
        listener = stack.enter_context(gateway.listen("a-box", 80))
        far = stack.enter_context(gateway.tcp("internet", (PUBLIC, 8080)))
        near = stack.enter_context(listener.accept()[0])
        gateway.masq("sessions", "save", str(file))
        reboot(gateway)
        gateway.masq("forward", "add", "tcp", "8080", "192.168.0.2:80")
        assert load(gateway, file) == (1, {})
        for one, other in ((far, near), (near, far)):
            one.sendall(b"still there")
            assert other.recv(100) == b"still there"


def test_nothing_that_is_there_is_touched(gateway: Gateway, file: Path) -> None:
    with gateway.connection() as connection, gateway.udp("a-box") as client:
        public = seen(client)
        gateway.masq("sessions", "save", str(file))
        before = gateway.sessions()
        assert load(gateway, file) == (0, {"session there already": len(before)})
        assert [timeless(each) for each in gateway.sessions()] == [timeless(each) for each in before]
        connection.talk(3)
        assert seen(client) == public
    gateway.masq("sessions", "flush", "--all")


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda _, session: change(session)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (edited(lambda one: one["internal"].update(address="192.168.0.3")), "external port taken"),
        (edited(lambda one: one["external"].update(port=2000)), "internal endpoint has another mapping"),
        (edited(lambda one: one.update(shared=True)), "external port taken"),
        (
            edited(lambda one: (one["internal"].update(port=4), one["external"].update(port=40000))),
            "external port outside the pool",
        ),
        (edited(lambda one: one["internal"].update(address="10.9.9.9")), "internal host behind no LAN"),
        (lambda header, _: header.update(saved_at=header["saved_at"] - 301), "idle time over"),
    ],
)
def test_left_out(
    gateway: Gateway, file: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], why: str
) -> None:
    """Of one mapping that is there, a file says something else; another session of the file is good."""
    with gateway.udp("a-box") as client, gateway.udp("b-box") as other:
        public = seen(client)
        gateway.masq("sessions", "save", str(file))
        header, session = map(json.loads, file.read_text().splitlines())
        good = json.loads(json.dumps(session))
        good["internal"], good["external"]["port"] = {"address": "192.168.0.9", "port": 9}, 3333
        good["remaining_s"] = 10_000  # it outlives what is changed in the header
        change(header, session)
        header["count"] = 2
        file.write_text("\n".join(map(json.dumps, (header, session, good))))
        assert load(gateway, file) == (1, {why: 1})
        assert seen(client) == public
        assert seen(other) != public
    gateway.masq("sessions", "flush", "--all")


def test_not_with_port_blocks(gateway: Gateway, file: Path) -> None:
    """The log has a record for each block; of ports outside their host's it would tell of the wrong one."""
    gateway.masq("sessions", "save", str(file))
    gateway.tables.set_settings(block_bits=9)
    try:
        refused = gateway.masq("sessions", "load", str(file), check=False)
    finally:
        gateway.tables.set_settings(block_bits=0)
    assert refused.returncode == 2
    assert "ports.block_size" in refused.stderr


def test_another_external_address(gateway: Gateway, file: Path) -> None:
    with gateway.udp("a-box") as client:
        seen(client)
        gateway.masq("sessions", "save", str(file))
    gateway.masq("sessions", "flush", "--all")
    file.write_text(file.read_text().replace(f'"{PUBLIC}"', '"203.0.113.77"'))
    refused = gateway.masq("sessions", "load", str(file), check=False)
    assert refused.returncode == 2
    assert "203.0.113.77; here it is 203.0.113.1" in refused.stderr
    assert gateway.sessions() == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: "", "no file of sessions"),
        (lambda text: "hello\n", "no file of sessions"),
        (lambda text: text.replace('"xdpmasq_sessions": 1', '"xdpmasq_sessions": 2'), "format 2"),
        (lambda text: "".join(text.splitlines(keepends=True)[:-1]), "2 sessions, its first line says 3"),
        (lambda text: text[:-20], "line 4: this is no session"),
        (lambda text: text.replace('"udp"', '"sctp"', 1), "line 2: this is no session: there is no protocol sctp"),
        (lambda text: text.replace('"age_s"', '"age"', 1), "line 2: this is no session: 'age_s' is missing"),
        (lambda text: text.replace('"tcp_seen": {"out": 0', '"tcp_seen": {"out": 256', 1), "256 is no number"),
        (lambda text: text.replace('"out": {"packets": 1', '"out": {"packets": -1', 1), "-1 is no number"),
        (lambda text: text.replace('"out": {"packets": 1', '"out": {"packets": 1.5', 1), "no whole number"),
        (lambda text: text.replace('"address": "192.168.0.2"', '"address": "::1"', 1), "::1"),
        (lambda text: text.replace('"shared": false', '"shared": 0', 1), "neither true nor false"),
    ],
)
def test_a_damaged_file_is_refused_whole(
    gateway: Gateway, file: Path, saved: str, change: Callable[[str], str], why: str
) -> None:
    file.write_text(change(saved))
    assert file.read_text() != saved
    with pytest.raises(ConfigError) as error, gateway.inside():
        keeping.load(gateway.tables, file)
    assert why in str(error.value)
    assert gateway.sessions() == []


@pytest.fixture(scope="module")
def saved(gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `save` wrote of three UDP sessions."""
    file = tmp_path_factory.mktemp("saved") / "sessions"
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            seen(stack.enter_context(gateway.udp("a-box")))
        gateway.masq("sessions", "save", str(file))
    gateway.masq("sessions", "flush", "--all")
    return file.read_text()


def test_a_file_that_cannot_be_written(gateway: Gateway) -> None:
    refused = gateway.masq("sessions", "save", "/nowhere/at/all", check=False)
    assert (refused.returncode, "cannot write /nowhere/at/all: No such file" in refused.stderr) == (1, True)


def test_a_full_disk(gateway: Gateway, tmp_path: Path) -> None:
    """A file system of one page, which a former file has taken: that stays, and nothing stands beside it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "xdpmasq", tmp_path], check=True)
    try:
        file = tmp_path / "sessions"
        file.write_text("what was there")
        with gateway.udp("a-box") as client:
            seen(client)
            refused = gateway.masq("sessions", "save", str(file), check=False)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert f"cannot write {file}: No space left on device" in refused.stderr
        assert "what was there is there still" in refused.stderr
        assert [each.name for each in tmp_path.iterdir()] == ["sessions"]
        assert file.read_text() == "what was there"
    finally:
        subprocess.run(["umount", tmp_path], check=True)
