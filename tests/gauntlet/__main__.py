"""`python -m tests.gauntlet`: plays schedules one after the other; each failure names its seed."""

from __future__ import annotations

import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import click

from tests import host
from tests.gauntlet.play import play
from tests.gauntlet.schedule import schedule
from tests.gauntlet.tally import BROKEN, Record, append, table
from tests.native.tracking import bpffs


@click.command()
@click.option("--seed", default=1, help="The first seed.", show_default=True)
@click.option("--count", default=20, help="How many schedules.", show_default=True)
@click.option("--keep-going", is_flag=True, help="Play on after a failure.")
@click.option("--minutes", type=float, help="Begin no schedule later than this.")
@click.option("--verify", default="", help="What is compared at cutovers; else by seed.")
@click.option("--log", type=Path, help="Append a line of JSON for each schedule to this file.")
def main(
    seed: int,
    count: int,
    *,
    keep_going: bool,
    minutes: float | None,
    verify: str,
    log: Path | None,
) -> None:
    """Throw everything at whole migrations, and compare every byte."""
    # Also where the shell had it ignored (of what it runs in the background): all is undone.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    records: list[Record] = []
    began = time.monotonic()
    with bpffs() as pins:
        for number in range(seed, seed + count):
            if minutes is not None and time.monotonic() - began > minutes * 60:
                break
            record = run(number, pins / str(number), verify)
            records.append(record)
            if log is not None:
                append(log, record)
            print(f"{record.how:12} {record.seconds:5.1f} s  {record.plan}", flush=True)
            if record.how == BROKEN and not keep_going:
                break
    print(f"\n{table(records)}")
    if broken := [one.seed for one in records if one.how == BROKEN]:
        raise click.ClickException(f"broken; repeat with --count 1 --seed, one of {broken}")


def run(seed: int, pins: Path, verify: str) -> Record:
    """Play the schedule of a seed; what went wrong is printed with the agents' logs."""
    plan, started = schedule(seed), time.monotonic()
    struck, told = Counter[str](), Counter[str]()
    error = ""
    with tempfile.TemporaryDirectory(prefix="warmsync-test-", dir=host.SCRATCH) as place:
        try:
            how = play(plan, Path(place), pins, struck, told, verify=verify)
        except Exception as broken:
            how, error = BROKEN, f"{type(broken).__name__}: {broken}"
            traceback.print_exception(broken)
            for log in sorted(Path(place).glob("*.log")):
                print(f"--- {log.name}\n{log.read_text()[-6000:]}", file=sys.stderr)
    seconds = time.monotonic() - started
    return Record(seed, how, seconds, dict(struck), str(plan), error, dict(told))


if __name__ == "__main__":
    main()
