"""What can go wrong in the lab, and patient waiting for what takes a moment."""

import time
from collections.abc import Callable

from xdpmasq.errors import MasqError


class LabError(MasqError):
    """The lab could not be built, or a program in it did not do what it was started for."""


def wait_until(question: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    """Ask `question` every 10 ms until it answers yes.

    Args:
        what: names the thing waited for in the error: "nginx listens".

    Raises:
        LabError: the answer was still no after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not question():
        if time.monotonic() > deadline:
            raise LabError(f"waited in vain until {what}", f"nothing for {timeout_s:g} s")
        time.sleep(0.01)
