"""What the documents say exists: commands, settings, reasons of drops, files that they refer to."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from xdpmasq import cli, source
from xdpmasq.configfile import load

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "config.example.toml"]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
NOT_OURS = ("|", ";", "&&", ">", "2>&1")  # where another program's part begins


def blocks(text: str, *languages: str) -> list[str]:
    return [body for _, language, body in FENCED.findall(text) if language in languages]


def commands(path: Path) -> Iterator[tuple[str, bool]]:
    """Command lines, and whether each stands alone on its line: in running text one may be cut short."""
    text = path.read_text()
    for block in [text] if path.suffix == ".toml" else blocks(text, "sh", ""):
        for line in block.splitlines():
            if found := re.match(r"\s*(?:[$#]\s+)?(?:sudo )?(?:\.venv/bin/)?xdpmasq((?: .*)?)$", line):
                yield found[1].strip(), True
    for inline in re.findall(r"`(?:\.venv/bin/)?xdpmasq ([^`…][^`]*)`", FENCED.sub("", text)):
        yield " ".join(inline.split()), False


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


def words_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    ends = [at for at, word in enumerate(words) if word in NOT_OURS]
    return words[: ends[0]] if ends else words


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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_referred_to_exist(path: Path) -> None:
    named = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert [each for each in named if not (path.parent / each).exists()] == []
