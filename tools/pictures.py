"""Draws a Grafana dashboard with matplotlib, from what a Prometheus answers: for readers who have neither at hand.

It knows what our dashboards use of Grafana's model: rows, single numbers, and lines that may be stacked.
"""

import io
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from PIL import Image

from xdpmasq.lab.prometheus import Prometheus

COLUMNS = 24
INCHES = (0.6, 0.32)  # a cell of the grid
DPI = 80
COLOURS = 96
LEGEND_MOST = 8
BACKGROUNDS = {"green": "#56a64b", "red": "#e02f44", "orange": "#ff9830", "blue": "#3274d9"}
SUFFIXES = {"bps": "b/s", "pps": "p/s", "cps": "/s", "ops": "/s", "bytes": "B"}


def draw(board: Path, picture: Path, prometheus: Prometheus, values: Mapping[str, str], seconds: float) -> None:
    """The last ``seconds`` of a dashboard's panels, as a PNG.

    Args:
        values: what Grafana's variables stand for.
    """
    panels = json.loads(board.read_text())["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    mpl.rcParams.update({"font.size": 7, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False})
    figure = plt.figure(figsize=(COLUMNS * INCHES[0], height * INCHES[1]), dpi=DPI)
    for panel in panels:
        place = panel["gridPos"]
        inside = 0.0 if panel["type"] == "row" else 0.35
        axes = figure.add_axes(
            (
                (place["x"] + 2.8 * inside) / COLUMNS,
                1 - (place["y"] + place["h"] - 2 * inside) / height,
                (place["w"] - 3.6 * inside) / COLUMNS,
                (place["h"] - 5.4 * inside) / height,
            )
        )
        _PANELS[panel["type"]](axes, panel, prometheus, values, seconds)
    drawn = io.BytesIO()
    figure.savefig(drawn)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(picture, optimize=True)


def _row(axes: Axes, panel: Any, *_: object) -> None:
    axes.axis("off")
    axes.text(0.005, 0.4, panel["title"], fontsize=9, fontweight="bold", va="center")


def _stat(axes: Axes, panel: Any, prometheus: Prometheus, values: Mapping[str, str], _: float) -> None:
    found = prometheus.query(_put_in(panel["targets"][0]["expr"], values))
    number = float(found[0]["value"][1]) if found else math.nan
    defaults = panel["fieldConfig"]["defaults"]
    mapped = next((each["options"].get(f"{number:g}") for each in defaults.get("mappings", ())), None)
    steps = defaults.get("thresholds", {}).get("steps", ())
    colour = (
        mapped["color"] if mapped else [s["color"] for s in steps if s["value"] is None or number >= s["value"]][-1]
    )
    axes.set(facecolor=BACKGROUNDS[colour], xticks=[], yticks=[])
    axes.set_title(panel["title"], fontsize=7, loc="left")
    text = mapped["text"] if mapped else _written(number, defaults["unit"])
    axes.text(0.5, 0.5, text, color="white", fontsize=13, ha="center", va="center", transform=axes.transAxes)


def _lines(axes: Axes, panel: Any, prometheus: Prometheus, values: Mapping[str, str], seconds: float) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    series = sorted(_series(panel, prometheus, values, seconds), key=lambda each: -np.nanmax(each[2], initial=0))
    shown = [each for each in series if np.nanmax(each[2], initial=0) > 0] or series[:1]
    if "stacking" in defaults["custom"] and shown:
        times = np.unique(np.concatenate([at for _, at, _ in shown]))
        axes.stackplot(
            times, [np.interp(times, at, y) for _, at, y in shown], labels=[name for name, *_ in shown], alpha=0.7
        )
    else:
        for name, at, y in shown:
            axes.plot(at, y, label=name, linewidth=1)
    axes.set_title(panel["title"], fontsize=8, loc="left")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: _written(number, defaults["unit"])))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:.0f} s"))
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles[:LEGEND_MOST], names[:LEGEND_MOST], fontsize=5.5, loc="upper left", framealpha=0.7, ncols=2)


def _series(
    panel: Any, prometheus: Prometheus, values: Mapping[str, str], seconds: float
) -> Iterator[tuple[str, Any, Any]]:
    """(name, seconds before now, values) of each."""
    now = time.time()
    for target in panel["targets"]:
        words = {"query": _put_in(target["expr"], values), "start": now - seconds, "end": now, "step": 1}
        for each in prometheus.ask("query_range", **words)["result"]:
            points = np.array(each["values"], float)
            yield _named(target["legendFormat"], each["metric"]), points[:, 0] - now, points[:, 1]


def _put_in(expression: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        expression = expression.replace(name, value)
    return expression


def _named(form: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), form)


def _written(number: float, unit: str) -> str:
    """As people read it."""
    if math.isnan(number):
        return "–"
    if unit == "percentunit":
        return f"{100 * number:.3g} %"
    power = 0 if number == 0 else math.floor(math.log10(abs(number)) / 3)
    if unit == "s":
        power = min(power, 0)
        return f"{number / 1000**power:.3g} {('s', 'ms', 'µs', 'ns')[-power]}"
    power = min(max(power, 0), 4)
    return f"{number / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}{SUFFIXES.get(unit, '')}".strip()


_PANELS = {"row": _row, "stat": _stat, "timeseries": _lines}
