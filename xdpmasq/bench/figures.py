"""Medians, spreads and quotients over rounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence


def median(values: Iterable[float | None]) -> float | None:
    """Of those that were measured; None for none."""
    measured = [value for value in values if value is not None]
    return statistics.median(measured) if measured else None


def spread(values: Sequence[float]) -> float | None:
    """Half the distance from the least to the greatest, as a part of the median."""
    middle = median(values)
    return (max(values) - min(values)) / 2 / middle if middle else None


def quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def difference(value: float | None, base: float | None) -> float | None:
    return value - base if value is not None and base is not None else None


def speeds(costs: Mapping[str, float | None], against: str) -> dict[str, float | None]:
    """By name: how many times as fast as ``against`` each is, by costs."""
    return {name: quotient(costs.get(against), cost) for name, cost in costs.items()}
