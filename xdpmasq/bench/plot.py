"""A report as a picture, by matplotlib, which only ``--plot`` needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xdpmasq.bench.report import Report, Section
from xdpmasq.errors import HostError, UsageError

_INCHES = (9.0, 4.0)  # of a panel


def check(path: Path) -> None:
    """Whether a picture could be written there, asked before the measuring.

    Raises:
        HostError: matplotlib is missing.
        UsageError: there is no such folder.
    """
    _pyplot()
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UsageError(f"cannot write a picture to {path}", "it must be a .png in a folder that exists")


def write(report: Report, path: Path) -> None:
    """A panel for each section that is drawn.

    Raises:
        HostError: it cannot be written.
    """
    pyplot = _pyplot()
    drawn = [section for section in report.sections if section.drawing]
    height = _INCHES[1] * max(len(drawn), 1)
    figure, axes = pyplot.subplots(max(len(drawn), 1), 1, figsize=(_INCHES[0], height), squeeze=False)
    for axis, section in zip(axes[:, 0], drawn, strict=False):
        _bars(axis, section) if section.drawing.kind == "bars" else _curve(axis, section)  # type: ignore[union-attr]
        axis.set_title(section.title, fontsize=10)
    figure.text(0.01, 0.002, report.host.words, fontsize=6)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise HostError("the picture cannot be written", f"{path}: {error.strerror}") from error
    finally:
        pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib  # noqa: PLC0415  optional, and slow to import

        matplotlib.use("Agg")
        from matplotlib import pyplot  # noqa: PLC0415
    except ImportError as error:
        do = "apt install python3-matplotlib, or pip install 'xdpmasq[bench]'"
        raise HostError("--plot needs matplotlib", str(error), do) from error
    return pyplot


def _colour(name: str) -> str | None:
    return "tab:green" if name.startswith("xdpmasq") else "tab:blue"


def _bars(axis: Any, section: Section) -> None:
    assert section.drawing
    names = [line.name for line in section.lines]
    titles = section.drawing.columns
    thickness = 0.8 / len(titles)
    for nth, title in enumerate(titles):
        places = [place + nth * thickness for place in range(len(names))]
        values = [section.value(name, title) or 0 for name in names]
        bars = axis.barh(
            places, values, thickness * 0.95, color=[_colour(name) for name in names], alpha=1 - nth * 0.4
        )
        form = next(column for column in section.columns if column.title == title)
        axis.bar_label(bars, [form.text(value) if value else "" for value in values], fontsize=7)
    axis.set_yticks([place + (len(titles) - 1) * thickness / 2 for place in range(len(names))], names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(f"{section.drawing.unit} ({', '.join(titles)})", fontsize=8)


def _curve(axis: Any, section: Section) -> None:
    assert section.drawing
    flows = [int(title.replace(",", "")) for title in section.drawing.columns]
    for line in section.lines:
        points = [(x, y) for x, y in zip(flows, line.values, strict=True) if y is not None]
        if points:
            width = 2.5 if line.name.startswith("xdpmasq") else 1
            axis.plot(*zip(*points, strict=True), marker="o", label=line.name, linewidth=width)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("flows", fontsize=8)
    axis.set_ylabel(section.drawing.unit, fontsize=8)
    axis.legend(fontsize=7)
