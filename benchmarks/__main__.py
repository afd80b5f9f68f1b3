"""`python -m benchmarks`: runs them one after the other and reports."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, Protocol, cast

import click
from rich.console import Console

from benchmarks import (
    delta,
    downtime,
    full_copy,
    link,
    live,
    machine,
    memory,
    parameters,
    scan_speed,
    sparse,
    take,
    tls_copy,
    tracking,
)
from benchmarks.measure import Figure, ImpossibleError, Options
from benchmarks.report import Outcome, Report, print_outcome, to_json, write_markdown


class Benchmark(Protocol):
    """What a benchmark's module offers."""

    NAME: str
    TITLE: str

    def measure(self, options: Options) -> Iterator[Figure]:
        """Yield figures. ImpossibleError if this host lacks something, RuntimeError if it fails."""


MODULES = (
    tracking,
    take,
    scan_speed,
    full_copy,
    tls_copy,
    delta,
    live,
    downtime,
    link,
    memory,
    sparse,
    parameters,
)
BENCHMARKS = {module.NAME: cast(Benchmark, module) for module in MODULES}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)))
@click.option("--rounds", type=click.IntRange(1), help="Repetitions; default: each its own.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write JSON there.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write Markdown there.")
@click.option("--picture", type=click.Path(path_type=Path), help="Write a picture (SVG) there.")
@click.option("--quick", is_flag=True, help="Tiny sizes: tries the machinery, measures nothing.")
def main(
    names: tuple[str, ...],
    *,
    rounds: int | None,
    json_file: Path | None,
    markdown: Path | None,
    picture: Path | None,
    quick: bool,
) -> None:
    """Measure what the product must do. Without names: everything.

    Fails if a goal is missed, unless --quick.
    """
    signal.signal(signal.SIGTERM, end_cleanly)
    console, options = Console(), Options(rounds, quick)
    outcomes = []
    started, described = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), machine.describe()
    for name in dict.fromkeys(names) or BENCHMARKS:
        outcomes.append(run(BENCHMARKS[name], options))
        print_outcome(console, outcomes[-1])
    report = Report(described, _command(), started, tuple(outcomes))
    if json_file is not None:
        json_file.write_text(json.dumps(to_json(report), indent=2) + "\n")
    if markdown is not None:
        write_markdown(markdown, report)
    if picture is not None:
        from benchmarks.picture import draw  # matplotlib is large: only for who wants it

        draw(picture, report)
    if report.unmet and not quick:
        raise click.ClickException(f"goals missed: {'; '.join(report.unmet)}")


def run(benchmark: Benchmark, options: Options) -> Outcome:
    """Run one benchmark; what this host cannot do is an outcome, not an error."""
    try:
        figures = tuple(benchmark.measure(options))
    except ImpossibleError as obstacle:
        return Outcome(benchmark.NAME, benchmark.TITLE, skipped=str(obstacle))
    return Outcome(benchmark.NAME, benchmark.TITLE, figures)


def _command() -> str:
    return " ".join(["python -m benchmarks", *sys.argv[1:]])


def end_cleanly(_signal: int, _frame: object) -> NoReturn:
    """Leave through the context managers: nothing stays behind."""
    raise SystemExit("ended by SIGTERM")


if __name__ == "__main__":
    main()
