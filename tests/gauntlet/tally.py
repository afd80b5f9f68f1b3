"""The tally: what was played and struck, as lines of JSON that add up over many runs.

`python -m tests.gauntlet.tally FILE...` prints the table of all of them.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

BROKEN = "BROKEN"


@dataclass(frozen=True, slots=True)
class Record:
    """One schedule that was played; `told` are the reasons of cutovers and endings refused."""

    seed: int
    how: str
    seconds: float
    struck: dict[str, int]
    plan: str
    error: str = ""
    told: dict[str, int] = field(default_factory=dict)


def append(log: Path, record: Record) -> None:
    """Add a line to a file."""
    with log.open("a") as lines:
        lines.write(json.dumps(asdict(record)) + "\n")


def read(*logs: Path) -> list[Record]:
    """Return the records of files."""
    return [Record(**json.loads(line)) for log in logs for line in log.read_text().splitlines()]


def table(records: list[Record]) -> str:
    """Return how many ended how, what struck how often, and the seeds that repeat a breach."""
    ended = Counter(one.how for one in records)
    struck, told = Counter[str](), Counter[str]()
    for one in records:
        struck.update(one.struck)
        told.update(one.told)
    lines = [f"{len(records)} schedules, {sum(one.seconds for one in records) / 60:.0f} min"]
    lines += [f"  {count:6} {how}" for how, count in ended.most_common()]
    lines.append(f"{sum(struck.values())} faults")
    lines += [f"  {count:6} {kind}" for kind, count in sorted(struck.items())]
    lines.append(f"{sum(told.values())} refusals")
    lines += [f"  {count:6} {reason}" for reason, count in sorted(told.items())]
    broken = [one for one in records if one.how == BROKEN]
    lines += [f"broken: --count 1 --seed {one.seed}: {one.error[:200]}" for one in broken]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(read(*map(Path, sys.argv[1:]))))
