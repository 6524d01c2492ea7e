"""A machine that lets the gateway down: no bpffs, no memory, a clock that is set, a namespace that is deleted.

::

    a-box .2, b-box .3 ─ lan0 masq-gate wan0 203.0.113.1 ─ internet
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from netkit import GATE, PATIENCE_S, Gateway, new_prefix, soon, who
from pcpclient import ask

from xdpmasq import presence
from xdpmasq.lab.servers import EchoServer
from xdpmasq.lab.snapshot import differences, snapshot

pytestmark = pytest.mark.xdist_group("adversity")

FILE = '[interfaces]\nwan = "wan0"\nlan = ["lan0"]\nmode = "tc"\n'


@pytest.fixture(scope="module")
def _shared() -> Iterator[Gateway]:
    with Gateway.in_new_lab("tc", attach=False) as gateway:
        EchoServer(gateway.lab)
        yield gateway


@pytest.fixture
def gateway(_shared: Gateway) -> Iterator[Gateway]:
    """Not attached, before and after; and whatever was done, masq-gate is as before."""
    before = snapshot(_shared.lab)
    yield _shared
    if _shared.is_attached:
        _shared.detach()
    assert differences(before, snapshot(_shared.lab)) == []


@pytest.fixture(scope="module")
def beside() -> Iterator[Gateway]:
    """Attached, for what only looks."""
    with Gateway.in_new_lab("tc") as gateway:
        yield gateway


# --- bpffs -----------------------------------------------------------------------------------------

_UNMOUNT = """
umount --all --types bpf
if grep ' bpf ' /proc/self/mounts; then exit 99; fi
exec "$@"
"""


def test_without_bpffs(gateway: Gateway) -> None:
    """Nothing is pinned: neither the agent nor any other command wants one."""

    def masq(*words: str) -> str:
        argv = ["unshare", "--mount", "sh", "-c", _UNMOUNT, "sh", gateway.python, "-m", "xdpmasq", *words]
        return gateway.lab.exec(GATE, argv, timeout_s=PATIENCE_S).stdout

    assert "masquerading lan0" in masq("attach", "--wan", "wan0", "--lan", "lan0", "--mode", "tc")
    assert gateway.opens()
    assert json.loads(masq("status", "--json"))["working"]
    masq("detach")
    assert not gateway.is_attached


# --- memory ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_of(most: int) -> Iterator[str]:
    """The shell command by which a process takes part in a memory cgroup of at most so many bytes."""
    old, new = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    root, limit = (old, "memory.limit_in_bytes") if old.exists() else (new, "memory.max")
    group = root / f"xdpmasq-{new_prefix()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(most))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no memory cgroup of our own: {error}")
    try:
        yield f"echo $$ > {group}/cgroup.procs"
    finally:
        soon(lambda: not (group / "cgroup.procs").read_text(), "its processes have ended")
        group.rmdir()


def test_out_of_memory_while_attaching(gateway: Gateway, tmp_path: Path) -> None:
    """The tables do not fit: said, with what to do, and nothing is left (see the fixture)."""
    file = tmp_path / "config.toml"
    file.write_text(f"{FILE}[sessions]\nfurther = 4194304\n")
    with memory_of(300 << 20) as join:
        argv = gateway.lab.argv(GATE, [gateway.python, "-m", "xdpmasq", "attach", "--config", file])
        shell = ["sh", "-c", f'{join} && exec "$@"', "sh"]
        done = subprocess.run([*shell, *argv], check=False, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert "the kernel refused table sessions, 4,390,912 entries of" in done.stderr
    assert "Cannot allocate memory" in done.stderr
    assert "lower further in [sessions]" in done.stderr
    assert not gateway.is_attached
    assert gateway.locks == []


# --- the clock -------------------------------------------------------------------------------------

_STEPPED = """
import time
from pathlib import Path
real, step = time.time, Path({step!r})
time.time = lambda: real() + float(step.read_text())
from xdpmasq import daemon
from xdpmasq.config import Config, Metrics, Pcp
daemon.run(Config(("wan0",), ("lan0",), mode="tc", pcp=Pcp(enabled=True), metrics=Metrics(enabled=True)))
"""


def last_tick(gateway: Gateway) -> float:
    """By the agent's own clock."""
    text = gateway.gate("curl", "-s", "http://127.0.0.1:9477/metrics")
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("xdpmasq_agent_last_tick"))


def test_the_clock_is_set_forth_and_back(gateway: Gateway, tmp_path: Path) -> None:
    """CLOCK_REALTIME is the whole machine's, so it is the agent's own view of it that is set. What the programs in
    the kernel reckon with, jiffies, nobody can set.
    """
    step = tmp_path / "step"

    def set_clock(seconds: float) -> None:
        (tmp_path / "new").write_text(str(seconds))
        (tmp_path / "new").replace(step)

    set_clock(5 * 3600)
    agent = gateway.lab.popen(GATE, [gateway.python, "-c", _STEPPED.format(step=str(step))])
    soon(lambda: gateway.is_attached and gateway.status()["working"], "it works", PATIENCE_S)
    assert 0 <= gateway.status()["uptime_s"] < PATIENCE_S
    with gateway.connection() as connection, gateway.udp("b-box") as client:
        endpoint = who(client)
        before = ask(gateway, "a-box", "tcp", 8080)
        assert before.result == 0
        for seconds in (-5 * 3600, 30 * 86400, 0):
            begun = last_tick(gateway)
            set_clock(seconds)
            soon(lambda begun=begun: abs(last_tick(gateway) - begun) > 3600, "the agent goes on, by another clock")
            connection.talk()
            assert who(client) == endpoint
            after = ask(gateway, "a-box", "tcp", 8080)
            assert (after.result, after.port) == (0, before.port)
            assert before.epoch <= after.epoch <= before.epoch + PATIENCE_S
            (lease,) = json.loads(gateway.masq("forward", "list", "--json").stdout)
            assert 600 - PATIENCE_S <= lease["left_s"] <= 600
            assert {each["protocol"] for each in gateway.sessions()} == {"tcp", "udp"}
    gateway.detach()
    assert agent.wait(PATIENCE_S) == 0


# --- others at work --------------------------------------------------------------------------------


def test_two_attach_at_once(gateway: Gateway) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: gateway.masq("attach", "--wan", "wan0", "--lan", "lan0", check=False), "ab"))
    won, lost = sorted(both, key=lambda done: done.returncode)
    assert (won.returncode, lost.returncode) == (0, 1)
    assert "masquerading lan0" in won.stdout
    assert "xdpmasq already runs on wan0: its agent is process " in lost.stderr
    assert lost.stdout == ""
    assert gateway.status()["agent"] == {"alive": True, "pid": gateway.agent_pid}
    assert gateway.opens()


@pytest.mark.parametrize("gone", ["its name only", "its name, at once", "its interfaces, too"])
def test_the_namespace_is_deleted(gone: str, tmp_path: Path) -> None:
    """The kernel keeps it as long as a process is in there: the agent, which therefore ends. Where the namespaces at
    the other ends of its wires are gone, so are the wires.
    """
    with Gateway.in_new_lab("tc", attach=False) as gateway, open(tmp_path / "stderr", "w+") as said:
        options = ["run", "--wan", "wan0", "--lan", "lan0", "--mode", "tc"]
        agent = gateway.lab.popen(GATE, [gateway.python, "-m", "xdpmasq", *options], stderr=said)
        soon(lambda: gateway.agent_pid is not None, "it runs", PATIENCE_S)
        if gone != "its name, at once":
            soon(lambda: gateway.is_attached and gateway.status()["working"], "it works", PATIENCE_S)
        if gone == "its interfaces, too":
            for link in ("wan0", "lan0"):
                gateway.gate("ip", "link", "delete", link)
        inode = os.stat(f"/run/netns/{gateway.lab.namespace(GATE)}").st_ino
        subprocess.run(["ip", "netns", "delete", gateway.lab.namespace(GATE)], check=True)
        assert agent.wait(PATIENCE_S) == 0
        said.seek(0)
        text = said.read()
        assert "the network namespace has been deleted" in text
        assert "Traceback" not in text
        assert list(presence.RUN.glob(f"xdpmasq-{inode}-*")) == []


# --- looking only ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        pytest.param(FILE, 0, id="good"),
        pytest.param(FILE.replace("lan0", "lan7"), 0, id="interfaces that are not there"),
        pytest.param(f"{FILE}[timeouts]\nudp_s = 1\n", 2, id="a wrong value"),
        pytest.param("[", 2, id="no TOML"),
    ],
)
def test_check_touches_nothing(beside: Gateway, tmp_path: Path, text: str, code: int) -> None:
    """It changes nothing of a running gateway, nor the file; and works without any capability to do so."""
    file = tmp_path / "config.toml"
    file.write_text(text)

    def state() -> tuple[object, ...]:
        settings = beside.tables.settings.copy()
        settings["heartbeat"] = 0  # the agent's, once a second
        there = os.stat(file)
        return settings.tobytes(), there.st_mtime_ns, there.st_ino, sorted(tmp_path.iterdir()), beside.locks

    before, box = state(), snapshot(beside.lab)
    for powerless in ([], ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]):
        argv = [*powerless, beside.python, "-m", "xdpmasq", "check", file]
        done = beside.lab.exec(GATE, argv, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert state() == before
    assert differences(box, snapshot(beside.lab)) == []
