"""What the documents say exists: commands, settings, reasons of drops, files that they refer to."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from documents import DOCUMENTS, ROOT, blocks, in_running_text, listings, words_of
from typer.main import get_command

from xdpmasq import cli, source
from xdpmasq.configfile import load


def commands(path: Path) -> Iterator[tuple[str, bool]]:
    """Command lines, and whether each stands alone on its line: in running text one may be cut short."""
    for listing in listings(path):
        yield from ((line, True) for line in listing)
    for inline in in_running_text(path, "xdpmasq"):
        yield inline.partition("xdpmasq ")[2], False


FOUND = [
    pytest.param(line, whole, id=f"{path.name}: {line}")
    for path in DOCUMENTS
    for line, whole in dict.fromkeys(commands(path))
]


def parse(words: list[str], whole: bool) -> None:
    """As the command line would, without doing anything."""
    command: Any = get_command(cli.app)
    name, context = "xdpmasq", None
    while True:
        try:
            context = command.make_context(name, list(words), parent=context)
        except SystemExit:  # --help, --version
            return
        except Exception as error:
            if type(error).__name__ in ("Exit", "NoArgsIsHelpError"):
                return
            if not whole and type(error).__name__ == "MissingParameter":
                return
            raise
        # as click's versions have it
        before = getattr(context, "_protected_args", None) or getattr(context, "protected_args", [])
        rest = [*before, *context.args]
        if name in cli.LATE:
            command, words = get_command(cli.LATE[name]()), rest
            name = f"xdpmasq {name}"
        elif rest and hasattr(command, "resolve_command"):
            name, command, words = command.resolve_command(context, rest)
        elif name == "exec":
            inner = context.params["command"]
            inner = inner[inner[0] == "--" :]
            if inner[0] == "xdpmasq":
                parse(list(inner[1:]), whole)
            return
        else:
            return


@pytest.mark.parametrize(("line", "whole"), FOUND)
def test_commands_exist(line: str, whole: bool) -> None:
    parse(words_of(line), whole)


def test_commands_are_found() -> None:
    assert len(FOUND) > 60
    assert any("lab exec masq-gate -- xdpmasq" in str(each.values[0]) for each in FOUND)


@pytest.mark.parametrize(
    ("line", "whole"),
    [("frob", False), ("status --frob", False), ("forward frob", True), ("lab frob", True), ("check", True),
     ("lab exec a-box -- xdpmasq frob", True), ("attach --wan", True), ("bench --frob", True)],
)  # fmt: skip
def test_others_would_be_noticed(line: str, whole: bool) -> None:
    with pytest.raises(Exception, match=r"frob|Missing|requires an argument"):
        parse(words_of(line), whole)


def test_every_drop_has_its_line() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| `(drop_\w+)` \|", text, re.MULTILINE)
    assert sorted(rows) == sorted(name for name in source.counters() if name.startswith("drop_"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_configurations_in_documents_are_good(path: Path, tmp_path: Path) -> None:
    for block in blocks(path.read_text(), "toml"):
        if "[project]" in block or "entry-points" in block:  # another package's
            continue
        (tmp_path / "one.toml").write_text(block)
        load(tmp_path / "one.toml")


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (apt install prometheus)")
def test_prometheus_takes_the_scrape_configuration(tmp_path: Path) -> None:
    found = [block for path in DOCUMENTS for block in blocks(path.read_text(), "yaml")]
    assert found
    for block in found:
        (tmp_path / "prometheus.yml").write_text(block)
        subprocess.run(["promtool", "check", "config", tmp_path / "prometheus.yml"], check=True, capture_output=True)


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {line.split()[1] for path in DOCUMENTS for line in in_running_text(path, "make")}
    named |= {
        each
        for path in DOCUMENTS
        for block in blocks(path.read_text(), "sh")
        for each in re.findall(r"^make ([\w-]+)", block, re.MULTILINE)
    }
    assert {"demo", "test", "deb"} <= named
    assert named - targets == set()


# Lines of other programs in the documents' listings, and why no test of ours runs them as they stand. xdpmasq's own
# are run by tests/netns/test_document_commands.py.
OTHERS = {
    r"make (demo|test)\b.*": "by CI, and in a fresh Debian by tests/fresh",
    r"(make deb && )?apt install \./.*": "installs: tests/fresh/package does so in a Debian of its own",
    r"python3 -m venv --system-site-packages /opt/xdpmasq .*|ln -s /opt/xdpmasq/.*": "installs on the machine",
    r"apt install vagrant .*|make deb && vagrant/build-box|cd vagrant && .*": "virtual machines: takes an hour",
    r"editor .*": "somebody at a terminal",
    r"systemctl enable --now xdpmasq": "the machine's: tests/fresh/service.py has a systemd of its own",
    r"journalctl .*": "the machine's journal",
    r"ethtool -[lLx] .*|grep eth0 /proc/interrupts .*|echo 2 > /proc/irq/.*": "queues, which veth lacks",
    r"cat > nat.sh .*|#!/bin/sh|nft add .*|END": "with the benchmark of another gateway: minutes",
}


def test_other_lines_are_known() -> None:
    lines = {
        line.strip()
        for path in DOCUMENTS
        for block in blocks(path.read_text(), "sh")
        for line in block.splitlines()
        if line.strip() and not re.match(r"\s*(\.venv/bin/)?xdpmasq\b", line)
    }
    assert [line for line in lines if not any(re.fullmatch(known, line) for known in OTHERS)] == []
    assert [known for known in OTHERS if not any(re.fullmatch(known, line) for line in lines)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_referred_to_exist(path: Path) -> None:
    named = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert [each for each in named if not (path.parent / each).exists()] == []
