"""The running kernel."""

import os
import re


def release() -> tuple[int, int]:
    """Its major and minor number."""
    numbers = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
