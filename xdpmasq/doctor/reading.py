"""What this machine says of itself in files and by commands."""

import subprocess
from pathlib import Path


def text_of(path: str) -> str:
    """What is in a file; empty when it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def output_of(*command: str) -> str | None:
    """What a command prints; None when it fails, or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
