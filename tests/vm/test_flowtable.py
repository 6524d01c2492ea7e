"""The bench's contestant that this machine's own kernel may not have."""

import json
import subprocess

import vmkit


def test_the_benchs_flowtable() -> None:
    """The packets come out translated, or the round would not be valid."""
    words = ["--json", "--rounds", "1", "--packets", "2000", "--flows", "100", "--size", "64"]
    command = [vmkit.XDPMASQ, "bench", *words, "--contestant", "flowtable"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    (line,) = result["sections"][0]["lines"]
    assert line["name"] == "flowtable"
    assert result["valid"]
