"""What the tests with big programs share; and at the end it is said what each of them has seen."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "netns")]  # importlib mode adds nothing itself; tests import netkit

PACKAGES = ("atftp", "baresip-core", "darkplaces-server", "ffmpeg", "kamailio", "libgstrtspserver-1.0-0", "qstat")

_told = pytest.StashKey[list[str]]()


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Something that is to be said at the end."""
    return request.config.stash.setdefault(_told, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.section("what was checked")
    for line in config.stash.get(_told, []):
        terminalreporter.write_line(line)
    asked = ["dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Package} ${Version}\n", *PACKAGES]
    versions = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.splitlines()
    terminalreporter.write_line("with " + ", ".join(line[4:] for line in versions if line.startswith("ii")))
