#!/usr/bin/env python3
"""From a run of the benchmark to docs/performance.md, README's table, docs/measured.json and docs/scaling.md.

    xdpmasq bench --scenario all --raise-conntrack --json > RUN.json
    tools/performance.py RUN.json

Between the marks <!-- bench --> and <!-- end --> of the first two, everything is replaced; the prose around is kept.
"""

import json
import subprocess
import sys
from pathlib import Path

from xdpmasq.bench import markdown, report
from xdpmasq.bench.report import Report

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench -->", "<!-- end -->"
OURS, README_TABLE = "xdpmasq-xdp", "forward/1000/64"


def renewed(document: str, text: str) -> str:
    """The document with the text between its marks."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"there is no {BEGIN} … {END} in the document")
    return f"{before}{BEGIN}\n{text.strip()}\n{END}{after}"


def measured(run: Report) -> dict[str, object]:
    """What tools/scaling.py reckons with."""
    scale, room = run.section("scale"), next(each for each in run.sections if each.key.startswith("memory/"))
    control = next(each for each in run.sections if each.key.startswith("control/"))
    assert scale
    flows = [column.title for column in scale.columns]
    return {
        "packet_ns": {each.replace(",", ""): round(scale.value(OURS, each) or 0) for each in flows},
        "base_ns": round(scale.value("drop", "1,000") or 0),
        "flow_ns": round(run.value("setup/1", OURS, "ns") or 0),
        "session_bytes": round(room.value(OURS, "B/place") or 0),
        "expiry_s": round(control.value(OURS, "expiry s") or 0, 2),
    }


def main(path: str) -> None:
    run = report.from_dict(json.loads(Path(path).read_text()))
    table = run.section(README_TABLE)
    assert table
    for name, text in (("docs/performance.md", markdown.document(run)), ("README.md", table.as_markdown())):
        document = ROOT / name
        document.write_text(renewed(document.read_text(), text))
    if not run.valid:
        raise SystemExit("the run has invalid lines, marked as such; docs/measured.json and docs/scaling.md stay")
    (ROOT / "docs" / "measured.json").write_text(json.dumps(measured(run), indent=2) + "\n")
    subprocess.run([sys.executable, ROOT / "tools" / "scaling.py", "--write"], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
