"""What a check says."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "block"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: a stable id; several findings may carry the same one.
        level: ``block`` means that the NAT cannot start or cannot work.
        do: what to do about it; empty when there is nothing to do.
    """

    check: str
    level: Level
    message: str
    do: str = ""
