"""The picture of a run: bars of what the contenders reached, as one SVG.

Owns the form; reads the same figures as the tables, and draws only what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Patch

from benchmarks.contender import OURS
from benchmarks.measure import Figure, Spread
from benchmarks.report import Outcome, Report, number

_INK, _QUIET = "#2b2d33", "#8a8f99"
_OURS_COLOUR, _YARDSTICK_COLOUR = "#d1495b", "#b9bdc6"
# As it is in a pale colour, with no delay in a full one.
_COLOURS = {
    "qemu-img": "#8fb8de",
    "qemu-img+nodelay": "#2e6da4",
    "nbdcopy-1": "#a8d5ba",
    "nbdcopy-1+nodelay": "#3a8f5c",
    "nbdcopy-4": "#c9e4b4",
    "nbdcopy-4+nodelay": "#6f9e3f",
    "rsync": "#e0b354",
    "rsync-delta": "#f0d9a4",
    "background": "#8fb8de",
    "background+nodelay": "#2e6da4",
    "write-blocking": "#a8d5ba",
    "write-blocking+nodelay": "#3a8f5c",
}
_COLUMNS, _WIDTH_INCHES, _ROW_INCHES = 2, 12.0, 3.4


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: its title, and what draws it."""

    title: str
    draw: Callable[[Axes], None]


def draw(path: Path, report: Report) -> None:
    """Write the picture. Nothing to draw is an empty picture that says so."""
    rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "warmsync", "font.size": 9})
    panels = [panel for outcome in report.outcomes for panel in panels_of(outcome)]
    rows = max(-(-len(panels) // _COLUMNS), 1)
    canvas = Canvas(figsize=(_WIDTH_INCHES, rows * _ROW_INCHES + 0.6), layout="constrained")
    words = f"{report.time}, {report.machine.get('processor', '')}"
    canvas.suptitle(f"warmsync and others, medians with least and most. {words}", color=_INK)
    for index, panel in enumerate(panels):
        axes = canvas.add_subplot(rows, _COLUMNS, index + 1)
        axes.set_title(panel.title, loc="left", fontweight="bold", color=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, length=0)
        panel.draw(axes)
    if not panels:
        canvas.text(0.5, 0.4, "nothing to draw: no copy, tls, delta or live", ha="center")
    canvas.savefig(path, format="svg", metadata={"Date": None})


def panels_of(outcome: Outcome) -> list[Panel]:
    """Return the charts of one benchmark; none if it has none or was skipped."""
    if outcome.skipped:
        return []
    if outcome.name in ("copy", "tls"):
        where = "in the clear" if outcome.name == "copy" else "with TLS"
        return [
            _bars(f"Full copy {where}: GB/s", outcome, "speed"),
            _bars(f"Full copy {where}: CPU s/GiB, both ends", outcome, "cpu, both ends"),
        ]
    if outcome.name == "delta":
        return [_bars("1% of 4 KiB blocks changed: ms, logarithmic", outcome, "time", log=True)]
    return _live(outcome) if outcome.name == "live" else []


def by_contender(figures: Iterable[Figure], prefix: str, what: str) -> dict[str, Spread]:
    """Return, by contender, the figures called "{prefix}{contender}: {what}"."""
    found = {}
    for figure in figures:
        if figure.name.startswith(prefix) and figure.name.endswith(f": {what}"):
            name = figure.name[len(prefix) : -len(f": {what}")]
            if ": " not in name:
                found[name] = figure.spread
    return found


def _bars(title: str, outcome: Outcome, what: str, *, log: bool = False) -> Panel:
    spreads = by_contender(outcome.figures, "", what)
    return Panel(title, partial(_draw_bars, spreads=spreads, log=log))


def _live(outcome: Outcome) -> list[Panel]:
    rates = [
        figure.name.partition(":")[0]
        for figure in outcome.figures
        if figure.name.endswith(f": {OURS}: downtime")
    ]
    names = list(by_contender(outcome.figures, f"{rates[0]}: ", "downtime")) if rates else []
    panels = []
    for title, what, log in (
        ("time until the target has caught up: s", "time to ready", False),
        ("bytes sent / device", "bytes sent / device", False),
        ("downtime: ms, logarithmic", "downtime", True),
        ("guest's IOPS kept", "guest's IOPS kept", False),
        ("guest's p99 latency during: ms, logarithmic", "guest's p99 during", True),
    ):
        groups = {rate: by_contender(outcome.figures, f"{rate}: ", what) for rate in rates}
        drawing = partial(_draw_groups, names=names, groups=groups, log=log)
        if any(groups.values()):
            panels.append(Panel(f"Live, {title}", drawing))
    return panels


def _draw_bars(axes: Axes, spreads: dict[str, Spread], *, log: bool) -> None:
    names = list(spreads)
    for row, name in enumerate(names):
        spread = spreads[name]
        axes.barh(row, spread.median, color=_colour(name), height=0.7)
        axes.hlines(row, spread.least, spread.most, color=_INK, linewidth=1)
        axes.annotate(
            number(spread.median),
            (max(spread.most, spread.median), row),
            (4, 0),
            textcoords="offset points",
            va="center",
            color=_INK,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale("log" if log else "linear")
    axes.margins(x=0.15)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])
    axes.minorticks_off()
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_fontweight("bold" if name == OURS else "normal")


def _draw_groups(
    axes: Axes, names: Sequence[str], groups: dict[str, dict[str, Spread]], *, log: bool
) -> None:
    """Draw a group of bars for each rate; who has no figure there never got so far."""
    width = 0.85 / max(len(names), 1)
    for index, name in enumerate(names):
        places = [at for at, group in enumerate(groups.values()) if name in group]
        shift = (index - (len(names) - 1) / 2) * width
        spreads = [group[name] for group in groups.values() if name in group]
        _draw_series(axes, name, [at + shift for at in places], spreads, width)
        for at in sorted(set(range(len(groups))) - set(places)):
            axes.text(at + shift, 0, " never", rotation=90, ha="center", fontsize=6, color=_INK)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_yscale("log" if log else "linear")
    axes.margins(y=0.15)
    axes.tick_params(axis="y", colors=_QUIET)
    axes.minorticks_off()
    axes.legend(
        handles=[Patch(color=_colour(name), label=name) for name in names],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.08),
        fontsize=6.5,
        ncols=5,
        columnspacing=1,
        frameon=False,
        labelcolor=_INK,
    )


def _draw_series(
    axes: Axes, name: str, places: Sequence[float], spreads: Sequence[Spread], width: float
) -> None:
    medians = [spread.median for spread in spreads]
    axes.bar(places, medians, width * 0.92, color=_colour(name))
    for place, spread in zip(places, spreads, strict=True):
        axes.vlines(place, spread.least, spread.most, color=_INK, linewidth=1)
        axes.annotate(
            _short(spread.median),
            (place, max(spread.most, spread.median)),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=6,
            color=_INK,
        )


def _short(value: float) -> str:
    return number(value) if value >= 10 else f"{value:.2g}"


def _colour(name: str) -> str:
    return _OURS_COLOUR if name == OURS else _COLOURS.get(name, _YARDSTICK_COLOUR)
