"""The C of ``bpf/`` as one text.

bcc allows map methods only in the main source text, never in an included header; so the files are
strung together in reading order, with ``#line`` markers that keep compiler messages naming the real file.
"""

import re
from collections.abc import Sequence
from pathlib import Path

DATAPATH = (
    *("counters.h", "bits.h", "types.h", "maps.h", "verdict.h", "parse.h", "csum.h", "index.h", "flow.h", "events.h"),
    *("trace.h", "host.h", "control.h", "claim.h", "block.h", "mapping.h", "rewrite.h", "fragment.h", "nexthop.h"),
    *("punt.h", "alg.h", "wan.h", "mss.h", "inbound.h", "portless.h", "quote.h"),
    *("basic.h", "icmp.h", "guard.h", "trigger.h", "redirect.h", "slowpath.c", "lanpath.c", "punted.c"),
    *("hooks.c", "fastpath.c", "reaper.c"),
)
RESTORE = (*DATAPATH[: DATAPATH.index("mapping.h") + 1], "restore.c")  # what `sessions load` runs


def folder() -> Path:
    """Where the C files are: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    installed = here / "_bpf"
    return installed if installed.is_dir() else here.parent / "bpf"


def flatten(files: Sequence[str] = DATAPATH) -> str:
    """All of ``files`` as one text, each behind a ``#line`` marker."""
    return "".join(f'#line 1 "bpf/{name}"\n{(folder() / name).read_text()}\n' for name in files)


def counters() -> dict[str, str]:
    """Name → help text of every counter, in the order of the C enum."""
    text = (folder() / "counters.h").read_text()
    listed = text.partition("#define COUNTERS(X)")[2]
    return dict(re.findall(r'X\((\w+),\s*"([^"]*)"\)', listed))
