"""What the documents say: command lines, and blocks of configuration."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "config.example.toml"]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
NOT_OURS = ("|", ";", "&&", ">", "2>&1")  # where another program's part begins


def blocks(text: str, *languages: str) -> list[str]:
    return [body for _, language, body in FENCED.findall(text) if language in languages]


def listings(path: Path) -> Iterator[list[str]]:
    """The xdpmasq command lines of each block, without the program's name."""
    text = path.read_text()
    for block in [text] if path.suffix == ".toml" else blocks(text, "sh", ""):
        found = (
            re.match(r"[\s#]*(?:\$\s+)?(?:sudo )?(?:\.venv/bin/)?xdpmasq((?: .*)?)$", line)
            for line in block.splitlines()
        )
        yield [each[1].strip() for each in found if each]


def in_running_text(path: Path, program: str) -> Iterator[str]:
    """Commands in the running text, which may be cut short: none with an ellipsis."""
    for inline in re.findall(rf"`((?:\.venv/bin/)?{program} [^`…]*)`", FENCED.sub("", path.read_text())):
        yield " ".join(inline.split())


def words_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    ends = [at for at, word in enumerate(words) if word in NOT_OURS]
    return words[: ends[0]] if ends else words
