"""What systemd is told, read at the other end of its socket."""

import socket
from pathlib import Path

import pytest

from xdpmasq import background, health, notify


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, abstract: bool) -> None:
    name = f"@xdpmasq-{tmp_path.name}-{id(tmp_path)}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0"))
        monkeypatch.setenv(notify.VARIABLE, name)
        notify.send(notify.READY, notify.status("two\nlines"))
        assert manager.recv(1000) == b"READY=1\nSTATUS=two lines"


@pytest.mark.parametrize("name", [None, "", "relative", "/nobody/listens", "@nobody"])
def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    monkeypatch.delenv(notify.VARIABLE, raising=False)
    if name is not None:
        monkeypatch.setenv(notify.VARIABLE, name)
    notify.send(notify.ALIVE)


def test_an_agent_in_the_background_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    monkeypatch.setenv(notify.VARIABLE, "/run/somebody")
    monkeypatch.setattr("subprocess.Popen", lambda *_, env, **__: given.update(env))
    background._launch()
    assert "PYTHONPATH" in given
    assert notify.VARIABLE not in given


MANIFEST = {"wan": "eth0", "wans": ["eth0", "ppp0"], "lans": ["eth1", "lan*"], "externals": ["203.0.113.1", None]}
ROLES = [{"role": "wan", "hook": "tc"}, {"role": "lan", "hook": "tc"}]


@pytest.mark.parametrize(
    ("interfaces", "line"),
    [
        (ROLES, "masquerading eth1, lan* out of eth0 as 203.0.113.1, ppp0 as nothing yet"),
        (ROLES[1:], "not masquerading: the WAN eth0 and ppp0 is not there"),
    ],
    ids=["works", "does not"],
)
def test_in_short(interfaces: list[dict[str, str]], line: str) -> None:
    assert health.in_short({**MANIFEST, "interfaces": interfaces}) == line
