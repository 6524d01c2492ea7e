"""`forward add --save` and its like: rules and the configuration file change together, or not at all.

::

    a-box .2, b-box .3 ─ lan0 masq-gate wan0 203.0.113.1 ─ internet
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from netkit import Gateway

from xdpmasq import configfile, forwarding
from xdpmasq.alg import switches
from xdpmasq.lab.servers import EchoServer
from xdpmasq.lab.topology import PUBLIC

pytestmark = pytest.mark.xdist_group("saving")

BASE = """\
# The router in the cellar: do not switch it off.
[interfaces]
wan = "wan0"
lan = ["lan0"]
mode = "tc"

# Peter's
[[forward]]
protocol = "tcp"
ports = 7000
to = "192.168.0.2:7"   # echo
# end of Peter's
"""
PETERS = "tcp 7000 → 192.168.0.2:7"


class Filed:
    """A gateway and its file, which says BASE before each test."""

    def __init__(self, gateway: Gateway, file: Path) -> None:
        self.gateway, self.file = gateway, file

    def begin(self) -> None:
        self.file.write_text(BASE)
        self.gateway.detach()
        self.gateway.masq("attach", "--config", str(self.file))

    def rules(self) -> set[str]:
        return {str(each.rule) for each in forwarding.read(self.gateway.tables)}

    def filed(self) -> set[str]:
        return {str(rule) for rule in configfile.load(self.file).rules}

    def restart(self) -> None:
        """As the machine would: nothing but the file is left."""
        self.gateway.detach()
        self.gateway.masq("attach", "--config", str(self.file))

    def refuse(self, *words: str) -> str:
        """The words of a refusal, which leaves file, folder and tables as they were."""
        before = self.file.read_bytes(), sorted(self.file.parent.iterdir()), self.rules()
        done = self.gateway.masq(*words, check=False)
        assert done.returncode != 0
        assert done.stdout == ""
        assert (self.file.read_bytes(), sorted(self.file.parent.iterdir()), self.rules()) == before
        return done.stderr


@pytest.fixture(scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filed]:
    with Gateway.in_new_lab("tc", attach=False) as gateway:
        made = Filed(gateway, tmp_path_factory.mktemp("saving") / "config.toml")
        made.file.write_text(BASE)
        gateway.masq("attach", "--config", str(made.file))
        EchoServer(gateway.lab)
        yield made


@pytest.fixture
def filed(_shared: Filed) -> Filed:
    _shared.begin()
    return _shared


def test_saved_rules_are_there_after_a_restart_and_deleted_ones_are_not(filed: Filed) -> None:
    gateway = filed.gateway
    said = gateway.masq("forward", "add", "udp", "5000-5002", "192.168.0.3", "--save").stdout
    assert said == f"forwarded: udp 5000-5002 → 192.168.0.3:5000-5002; saved in {filed.file}\n"
    gateway.masq("redirect", "add", "tcp", "80", "3128", "--on", "lan", "--save")
    gateway.masq("trigger", "add", "udp", "6112", "--opens", "tcp", "6112", "--save")
    gateway.masq("forward", "add", "tcp", "9999", "192.168.0.3")
    assert filed.file.read_text().startswith(BASE)
    filed.restart()
    saved = filed.rules()
    assert saved == filed.filed()
    assert len(saved) == 4
    assert not any("9999" in rule for rule in saved), "it was not saved"

    said = gateway.masq("forward", "del", "tcp", "7000", "--save").stdout
    assert said == f"no longer forwarded: {PETERS}; saved in {filed.file}\n"
    gateway.masq("redirect", "del", "tcp", "80", "--on", "lan", "--save")
    gateway.masq("trigger", "del", "udp", "6112", "--opens", "tcp", "6112", "--save")
    gateway.masq("forward", "del", "udp", "5000-5002", "--save")
    # "# echo" stood on a line that is gone
    comments = [line for line in BASE.splitlines() if line.startswith("#")]
    assert [line for line in filed.file.read_text().splitlines() if line.startswith("#")] == comments
    filed.restart()
    assert filed.rules() == set()


def test_a_saved_alg_is_on_after_a_restart(filed: Filed) -> None:
    def on() -> list[str]:
        return [use.name for use in switches.read(filed.gateway.tables)]

    gateway = filed.gateway
    said = gateway.masq("alg", "enable", "sip", "--internal", "192.168.0.2/32", "--save").stdout
    assert said == f"sip reads tcp 5060, udp 5060 of 192.168.0.2/32; saved in {filed.file}\n"
    told = json.loads(gateway.masq("alg", "disable", "ftp", "--save", "--json").stdout)
    assert told == {"disabled": True, "saved": True, "file": str(filed.file)}
    gateway.masq("alg", "enable", "irc")
    assert filed.file.read_text().startswith(BASE)
    filed.restart()
    assert on() == ["sip"]
    assert gateway.masq("alg", "disable", "irc", "--save").stdout == f"irc was not on; {filed.file} says so already\n"
    gateway.masq("alg", "disable", "sip", "--save")
    gateway.masq("alg", "enable", "ftp", "--save")
    assert filed.file.read_text() == BASE
    filed.file.write_text(BASE + "[nonsense]\n")
    before = on()
    assert "line 13" in filed.refuse("alg", "enable", "irc", "--save")
    assert "line 13" in filed.refuse("alg", "disable", "ftp", "--save")
    assert on() == before


def test_a_killed_agent_and_a_reload_keep_a_saved_rule(filed: Filed) -> None:
    filed.gateway.masq("forward", "add", "tcp", "8080", "192.168.0.3:80", "--save")
    for change in ("reload", "restart"):
        if change == "reload":
            filed.gateway.masq("reload")
        else:
            filed.gateway.kill_agent()
            filed.gateway.masq("attach", "--config", str(filed.file))
        assert filed.rules() == {PETERS, "tcp 8080 → 192.168.0.3:80"}


def test_without_save_a_reload_brings_back_what_the_file_says_and_keeps_what_it_does_not(filed: Filed) -> None:
    filed.gateway.masq("forward", "del", "tcp", "7000")
    filed.gateway.masq("forward", "add", "tcp", "8080", "192.168.0.3:80")
    assert filed.file.read_text() == BASE
    filed.gateway.masq("reload")
    assert filed.rules() == {PETERS, "tcp 8080 → 192.168.0.3:80"}


def test_what_is_in_place_can_be_saved_afterwards(filed: Filed) -> None:
    words = "forward", "add", "tcp", "8080", "192.168.0.3:80"
    filed.gateway.masq(*words)
    assert "is there already" in filed.refuse(*words)
    assert json.loads(filed.gateway.masq(*words, "--save", "--json").stdout)["saved"] is True
    assert filed.filed() == filed.rules() == {PETERS, "tcp 8080 → 192.168.0.3:80"}
    again = filed.gateway.masq(*words, "--save").stdout
    assert again.endswith(f"; {filed.file} has it already\n")
    filed.gateway.masq("forward", "del", "tcp", "8080", "--save")
    filed.gateway.masq(*words)
    told = json.loads(filed.gateway.masq("forward", "del", "tcp", "8080", "--save", "--json").stdout)
    assert (told["saved"], told["file"]) == (False, str(filed.file))
    assert filed.filed() == filed.rules() == {PETERS}


def test_a_rule_that_only_the_file_has_can_be_deleted_there(filed: Filed) -> None:
    filed.gateway.masq("forward", "del", "tcp", "7000")
    words = "forward", "del", "tcp", "7000"
    assert "there is no forward" in filed.refuse(*words)
    said = filed.gateway.masq(*words, "--save").stdout
    assert said == f"no longer forwarded: {PETERS}; saved in {filed.file}\n"
    assert filed.filed() == filed.rules() == set()
    assert "there is no forward" in filed.refuse(*words, "--save")


def test_many_at_once_lose_nothing(filed: Filed) -> None:
    """Four commands add, two delete what is there; each waits for the others."""
    filed.gateway.masq("forward", "add", "tcp", "7001", "192.168.0.3:7", "--save")
    commands = [("add", "tcp", str(8000 + nth), "192.168.0.3:80") for nth in range(4)]
    commands += [("del", "tcp", "7000"), ("del", "tcp", "7001")]
    with ThreadPoolExecutor(len(commands)) as pool:
        list(pool.map(lambda words: filed.gateway.masq("forward", *words, "--save"), commands))
    assert filed.rules() == filed.filed() == {f"tcp {8000 + nth} → 192.168.0.3:80" for nth in range(4)}
    assert list(filed.file.parent.iterdir()) == [filed.file]


@pytest.mark.parametrize(
    ("text", "words", "why"),
    [
        pytest.param(
            BASE + '[[forward]]\nprotocol = "tcp"\nports = 8080\nto = "192.168.0.9"\n',
            ("forward", "add", "tcp", "8080", "192.168.0.3"),
            "192.168.0.9:8080 is there already",
            id="the file has another rule there",
        ),
        pytest.param(BASE + "[nonsense]\n", ("forward", "add", "tcp", "8080", "192.168.0.3"), "line 13", id="wrong"),
        pytest.param(BASE + "[nonsense]\n", ("forward", "del", "tcp", "7000"), "line 13", id="wrong, deleting"),
        pytest.param(BASE, ("forward", "add", "tcp", "8080", PUBLIC), "own address", id="the rule is refused"),
        pytest.param(BASE, ("forward", "del", "tcp", "8080"), "there is no forward", id="no such rule"),
    ],
)
def test_a_failure_leaves_file_and_rules(filed: Filed, text: str, words: tuple[str, ...], why: str) -> None:
    filed.file.write_text(text)
    assert why in filed.refuse(*words, "--save")


def test_a_file_that_cannot_be_written(filed: Filed) -> None:
    """Root can write anywhere but on a file system that is read-only."""
    folder = filed.file.parent
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        for words in (("add", "tcp", "8080", "192.168.0.3"), ("del", "tcp", "7000")):
            assert "cannot save in" in filed.refuse("forward", *words, "--save")
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(filed: Filed, tmp_path: Path) -> None:
    words = "forward", "add", "tcp", "8080", "192.168.0.3:80", "--save", "--config", str(tmp_path / "config.toml")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "xdpmasq", tmp_path], check=True)
    try:
        (tmp_path / "config.toml").write_text(BASE)
        before = filed.rules()
        assert "No space left on device" in filed.refuse(*words)
        assert filed.rules() == before
        assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("config.toml", BASE)]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_attached_with_options_only(filed: Filed, tmp_path: Path) -> None:
    """Which file is meant has to be said."""
    gateway, words = filed.gateway, ("forward", "add", "tcp", "8080", "192.168.0.3:80")
    gateway.detach()
    gateway.attach()
    assert "there is no configuration file to save in" in filed.refuse(*words, "--save")
    assert "without --save" in filed.refuse(*words, "--config", "/etc/hosts")
    other = tmp_path / "other.toml"
    assert "cannot read" in filed.refuse(*words, "--save", "--config", str(other))
    other.write_text("# mine")
    gateway.masq(*words, "--save", "--config", str(other))
    assert other.read_text() == '# mine\n\n[[forward]]\nprotocol = "tcp"\nports = "8080"\nto = "192.168.0.3:80"\n'
