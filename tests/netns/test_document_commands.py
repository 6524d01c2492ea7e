"""The documents' commands, typed one after another as they stand, where there are the interfaces that they name.

::

    host on a veth ─ eth1 192.168.0.1 [a namespace] 203.0.113.1 eth0 ─ a veth
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import zygote
from documents import DOCUMENTS, blocks, in_running_text, listings, words_of
from netkit import PATIENCE_S, new_prefix

from xdpmasq import datapath, forwarding
from xdpmasq.lab import netns

pytestmark = pytest.mark.xdist_group("documents")

NOT_RUN = {
    r"lab .*": "test_lab.py: here it would have the same names as another lab on this machine",
    r"bench\b.*": "test_bench.py: minutes",
    r"top|sessions watch|trace .*": "test_live.py: until interrupted",
}
OF_THE_KERNEL = r"ip rule add .*|ip address show|ethtool -K .*|nft list ruleset"  # those in running text
SETUP = """\
link add eth0 type veth peer name outside
link add eth1 type veth peer name inside
link add eth2 type veth peer name inside2
address add 203.0.113.1/24 dev eth0
address add 192.168.0.1/24 dev eth1
link set lo up
link set outside up
link set inside up
link set eth0 up
link set eth1 up
route add default via 203.0.113.254
"""


class Place:
    def __init__(self, namespace: str, folder: Path) -> None:
        self.namespace, self.folder = namespace, folder
        self.file = folder / "etc" / "xdpmasq" / "config.toml"

    def begin(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text('[interfaces]\nwan = "eth0"\nlan = ["eth1"]\n')
        (self.folder / "var" / "lib").mkdir(parents=True, exist_ok=True)
        if self.is_attached:
            self.run("detach")

    @property
    def is_attached(self) -> bool:
        with netns.entered(self.namespace):
            return bool(datapath.find_all())

    def run(self, *words: str) -> None:
        """In this test's own /etc and /var/lib."""
        moved = [re.sub(r"^/(etc|var/lib)/", rf"{self.folder}/\1/", word) for word in words]
        done = zygote.run(self.namespace, moved, PATIENCE_S)
        assert done.returncode == 0, f"xdpmasq {' '.join(words)}: {done.stdout}{done.stderr}"

    def type(self, line: str) -> None:
        """A line of a document, with what has to be before it."""
        words = words_of(line)
        if words[0] == "attach" and self.is_attached:
            self.run("detach")
        if words[0] not in ("attach", "check", "doctor") and not self.is_attached:
            self.run("attach", "--config", "/etc/xdpmasq/config.toml")
        self.run(*words)

    def forget_rules(self) -> None:
        """Each listing begins without the rules of another."""
        if self.is_attached:
            with netns.entered(self.namespace):
                tables = datapath.find()
                forwarding.take(tables, tables.reaper, *forwarding.read(tables))


@pytest.fixture(scope="module")
def _place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    namespace = new_prefix()
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:
        netns.ip_batch(SETUP.splitlines(), namespace)
        place = Place(namespace, tmp_path_factory.mktemp("root"))
        yield place
        if place.is_attached:
            place.run("detach")
    finally:
        netns.end_processes([namespace])
        netns.delete([namespace])


@pytest.fixture
def place(_place: Place) -> Place:
    _place.begin()
    return _place


def is_run(line: str) -> bool:
    return not any(re.fullmatch(each, " ".join(words_of(line))) for each in NOT_RUN)


LISTINGS = [
    pytest.param(found, id=path.name)
    for path in DOCUMENTS
    if (found := [lines for listing in listings(path) if (lines := [line for line in listing if is_run(line)])])
]


@pytest.mark.parametrize("found", LISTINGS)
def test_a_document(place: Place, found: list[list[str]]) -> None:
    for listing in found:
        place.forget_rules()
        for line in listing:
            place.type(line)


def test_they_are_found() -> None:
    assert {param.id for param in LISTINGS} >= {"README.md", "operating.md", "troubleshooting.md"}
    lines = [" ".join(words_of(line)) for path in DOCUMENTS for listing in listings(path) for line in listing]
    assert sum(map(is_run, lines)) > 30
    assert [each for each in NOT_RUN if not any(re.fullmatch(each, line) for line in lines)] == []


RULESETS = [
    pytest.param(block, id=f"{path.name} {number}")
    for path in DOCUMENTS
    for number, block in enumerate(blocks(path.read_text(), "nft"))
]


@pytest.mark.parametrize("ruleset", RULESETS)
def test_nft_takes_a_ruleset(place: Place, ruleset: str) -> None:
    argv = ["ip", "netns", "exec", place.namespace, "nft", "--check", "--file", "-"]
    done = subprocess.run(argv, input=ruleset, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


COMMANDS = sorted(
    {
        line
        for path in DOCUMENTS
        for program in ("ip", "ethtool", "nft")
        for line in in_running_text(path, program)
        if re.fullmatch(OF_THE_KERNEL, line)
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_kernel(place: Place, line: str) -> None:
    argv = ["ip", "netns", "exec", place.namespace, *line.split()]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
