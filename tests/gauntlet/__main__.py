"""`python -m tests.gauntlet`: plays schedules one after the other; each failure names its seed."""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import click

from tests import host
from tests.gauntlet.field import play
from tests.gauntlet.schedule import schedule
from tests.native.tracking import bpffs


@click.command()
@click.option("--seed", default=1, help="The first seed.", show_default=True)
@click.option("--count", default=20, help="How many schedules.", show_default=True)
@click.option("--keep-going", is_flag=True, help="Play on after a failure.")
@click.option("--minutes", type=float, help="Begin no schedule later than this.")
def main(seed: int, count: int, *, keep_going: bool, minutes: float | None) -> None:
    """Throw everything at whole migrations, and compare every byte."""
    ended: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    broken: list[int] = []
    began = time.monotonic()
    with bpffs() as pins:
        for number in range(seed, seed + count):
            if minutes is not None and time.monotonic() - began > minutes * 60:
                break
            plan = schedule(number)
            started = time.monotonic()
            with tempfile.TemporaryDirectory(prefix="warmsync-test-", dir=host.SCRATCH) as place:
                try:
                    how = play(plan, Path(place), pins / str(number))
                except Exception as error:
                    how = "BROKEN"
                    broken.append(number)
                    traceback.print_exception(error)
                    for log in sorted(Path(place).glob("*.log")):
                        print(f"--- {log.name}\n{log.read_text()[-6000:]}", file=sys.stderr)
            ended[how] += 1
            faults.update(fault.kind for fault in plan.faults)
            faults[f"cutover: {plan.cutover_fault}"] += 1
            print(f"{how:10} {time.monotonic() - started:5.1f} s  {plan}", flush=True)
            if broken and not keep_going:
                break
    print(f"\n{sum(ended.values())} schedules: {dict(ended)}")
    print("faults: " + ", ".join(f"{name} {count}" for name, count in sorted(faults.items())))
    if broken:
        raise click.ClickException(f"broken; repeat with --count 1 --seed, one of {broken}")


if __name__ == "__main__":
    main()
