#!/usr/bin/env python3
"""Writes docs/metrics.md: every metric, from the one list of them, and the counters' own help texts.

With --check nothing is written: exit status 1 when the file is stale.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from xdpmasq import source
from xdpmasq.families import BY_REASON, FAMILIES, PREFIX, TRANSLATED

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
BEGIN = "<!-- from here on written by tools/metrics.py -->"


def table() -> Iterator[str]:
    yield "| metric | type | labels | series at most | |"
    yield "|---|---|---|---|---|"
    for family in FAMILIES.values():
        labels = ", ".join(f"`{label}`" for label in family.labels)
        yield f"| `{PREFIX}{family.name}` | {family.kind} | {labels} | {family.most} | {family.help} |"


def reasons() -> Iterator[str]:
    """What the labels of counters mean, by the list in bpf/counters.h."""
    kinds = {**{word: family for word, family in BY_REASON.items()}, "fast": TRANSLATED, "slow": TRANSLATED}
    yield "| metric | counter | |"
    yield "|---|---|---|"
    for name, text in source.counters().items():
        word, _, rest = name.partition("_")
        if word in kinds:
            yield f"| `{PREFIX}{kinds[word].name}` | `{name if kinds[word] is TRANSLATED else rest}` | {text} |"


def page(text: str) -> str:
    """The page with its tables anew; what stands before them is left."""
    words = text.partition(BEGIN)[0]
    parts = (BEGIN, "", "## The metrics", "", *table(), "", "## The counters' reasons", "", *reasons(), "")
    return words + "\n".join(parts)


def main(check: bool) -> int:
    text = PAGE.read_text()
    fresh = page(text)
    if check:
        return int(text != fresh)
    PAGE.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
