"""`python -m tests.gauntlet.breaches`: breaks the rules one by one until the judge notices."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

from tests import host
from tests.gauntlet.breaches.rules import BREACHES
from tests.gauntlet.field import BreachError
from tests.gauntlet.play import play
from tests.gauntlet.schedule import schedule
from tests.native.tracking import bpffs


@click.command()
@click.option("--rule", "names", multiple=True, type=click.Choice(list(BREACHES)))
@click.option("--seed", default=1, help="The first seed.", show_default=True)
@click.option("--within", default=30, help="How many schedules at most.", show_default=True)
@click.option("--log", type=Path, help="Append a line of JSON for each rule to this file.")
def main(names: tuple[str, ...], seed: int, within: int, log: Path | None) -> None:
    """Break rules (all, if none is named), each until it is noticed."""
    unnoticed = []
    for name in names or BREACHES:
        started = time.monotonic()
        played, what = notice(name, seed, within)
        line = {"rule": name, "how": BREACHES[name].how, "played": played, "noticed": what}
        print(f"{time.monotonic() - started:5.0f} s  {json.dumps(line)}", flush=True)
        if log is not None:
            with log.open("a") as lines:
                lines.write(json.dumps(line) + "\n")
        if not what:
            unnoticed.append(name)
    if unnoticed:
        raise click.ClickException(f"not noticed: {', '.join(unnoticed)}; a better gauntlet!")


def notice(name: str, seed: int, within: int) -> tuple[int, str]:
    """Play with a broken rule; returns how many schedules, and what the judge said, if it did."""
    with bpffs() as pins:
        for number in range(seed, seed + within):
            with tempfile.TemporaryDirectory(prefix="warmsync-test-", dir=host.SCRATCH) as place:
                try:
                    play(schedule(number), Path(place), pins / str(number), Counter(), name)
                except BreachError as error:
                    return number - seed + 1, f"seed {number}: {str(error)[:200]}"
    return within, ""


if __name__ == "__main__":
    main()
