"""How results are shown: a table on the terminal, JSON and Markdown.

Owns the form; the figures come from the benchmarks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Figure, Goal, Spread

HEADINGS = ("Figure", "Median", "Least .. most", "Goal", "Met", "Runs")
RATIO = "ratio"
BEGIN = "<!-- results: written by `python -m benchmarks --markdown` -->"
END = "<!-- end of results -->"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a benchmark found; `skipped` says why it could not run here, else it is empty."""

    name: str
    title: str
    figures: tuple[Figure, ...] = ()
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """One run: the machine, the command line, and the outcome of each benchmark."""

    machine: dict[str, str]
    command: str
    time: str
    outcomes: tuple[Outcome, ...]

    @property
    def unmet(self) -> list[str]:
        """Names of the figures that miss their goal."""
        return [
            f"{outcome.name}: {figure.name}"
            for outcome in self.outcomes
            for figure in outcome.figures
            if figure.is_met is False
        ]


def print_outcome(console: Console, outcome: Outcome) -> None:
    """Print one benchmark's figures."""
    table = Table(title=f"{outcome.name}: {outcome.title}", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "Figure" else "right")
    for figure in outcome.figures:
        table.add_row(*_cells(figure))
    if outcome.skipped:
        table.add_row(f"skipped: {outcome.skipped}")
    console.print(table)


def to_json(report: Report) -> dict[str, Any]:
    """Return a report for programs. Numbers are exact, in the unit that stands beside them."""
    return {
        "time": report.time,
        "command": report.command,
        "machine": report.machine,
        "benchmarks": [
            {
                "name": outcome.name,
                "title": outcome.title,
                "skipped": outcome.skipped,
                "figures": [_figure(figure) for figure in outcome.figures],
            }
            for outcome in report.outcomes
        ],
    }


def to_markdown(report: Report) -> str:
    """Return a report for people."""
    return "\n".join(_lines(report))


def write_markdown(path: Path, report: Report) -> None:
    """Put the report into a file: between its marks if it has them, else as all of it."""
    block = f"{BEGIN}\n\n{to_markdown(report)}\n\n{END}"
    text = path.read_text() if path.exists() else ""
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    path.write_text(pattern.sub(lambda _: block, text) if pattern.search(text) else f"{block}\n")


def number(value: float) -> str:
    """Return a number with three significant digits: 0.985, 12.3, 1234."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _lines(report: Report) -> Iterator[str]:
    yield f"Measured {report.time} with `{report.command}`."
    yield ""
    yield from (f"- {name}: {value}" for name, value in report.machine.items())
    for outcome in report.outcomes:
        yield from ("", f"### {outcome.name}: {outcome.title}", "")
        if outcome.skipped:
            yield f"Skipped: {outcome.skipped}."
            continue
        yield f"| {' | '.join(HEADINGS)} |"
        yield f"|---{'|--:' * (len(HEADINGS) - 1)}|"
        yield from (f"| {' | '.join(_cells(figure))} |" for figure in outcome.figures)


def _cells(figure: Figure) -> list[str]:
    spread = figure.spread
    name = f"{figure.name} ({figure.note})" if figure.note else figure.name
    unit = "" if figure.unit == RATIO else f" {figure.unit}"
    met = {None: "", True: "yes", False: "NO"}[figure.is_met]
    return [
        name,
        number(spread.median) + unit,
        _range(spread),
        _goal(figure.goal),
        met,
        str(spread.count),
    ]


def _range(spread: Spread) -> str:
    return f"{number(spread.least)} .. {number(spread.most)}" if spread.count > 1 else ""


def _goal(goal: Goal | None) -> str:
    if goal is None:
        return ""
    return f"{'>=' if goal.at_least else '<='} {goal.bound:g}"


def _figure(figure: Figure) -> dict[str, Any]:
    spread, goal = figure.spread, figure.goal
    return {
        "name": figure.name,
        "unit": figure.unit,
        "median": spread.median,
        "min": spread.least,
        "max": spread.most,
        "runs": spread.count,
        "goal": None if goal is None else {"at_least" if goal.at_least else "at_most": goal.bound},
        "met": figure.is_met,
        "note": figure.note,
    }
