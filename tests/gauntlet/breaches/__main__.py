"""`python -m tests.gauntlet.breaches`: breaks the rules one by one until it is noticed."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path

import click

from tests import host
from tests.gauntlet.breaches.rules import BREACHES
from tests.gauntlet.field import BreachError
from tests.gauntlet.play import play
from tests.gauntlet.schedule import Schedule, schedule
from tests.native.tracking import bpffs

SIGNS = {
    "COPIES_DIFFER": "copies differ id=",
    "NOT_QUIESCED": "reason=NOT_QUIESCED",
    "suspect": "volume suspect path=",
    "trace": "trace=",
}
"""What agents log once they have noticed by themselves; `trace` is a breach that is badly made."""


@dataclass(frozen=True, slots=True)
class Notice:
    """`judge` is what the judge said, if it did, `product` what the agents said of themselves.

    `suitable` schedules were played; they are those among the first `seeds`.
    """

    rule: str
    how: str
    verify: str
    suitable: int
    seeds: int
    judge: str
    product: dict[str, int]

    @property
    def is_noticed(self) -> bool:
        """Whether anybody has."""
        return bool(self.judge or self.product.get("COPIES_DIFFER"))


@click.command()
@click.option("--rule", "names", multiple=True, type=click.Choice(list(BREACHES)))
@click.option("--seed", default=1, help="The first seed.", show_default=True)
@click.option("--within", default=30, help="How many schedules at most.", show_default=True)
@click.option(
    "--verify",
    type=click.Choice(["none", "full"]),
    default="none",
    help="What the agents compare: nothing, so that all is left to the judge, or every byte.",
    show_default=True,
)
@click.option("--log", type=Path, help="Append a line of JSON for each rule to this file.")
def main(names: tuple[str, ...], seed: int, within: int, verify: str, log: Path | None) -> None:
    """Break rules (all, if none is named), each until it is noticed."""
    unnoticed = []
    for name in names or BREACHES:
        started = time.monotonic()
        seen = notice(name, seed, within, verify)
        line = json.dumps(asdict(seen))
        print(f"{time.monotonic() - started:5.0f} s  {line}", flush=True)
        if log is not None:
            with log.open("a") as lines:
                lines.write(f"{line}\n")
        if not seen.is_noticed:
            unnoticed.append(name)
    if unnoticed:
        raise click.ClickException(f"not noticed: {', '.join(unnoticed)}; a better gauntlet!")


def notice(name: str, seed: int, within: int, verify: str = "none") -> Notice:
    """Play suitable schedules, `within` at most, with a broken rule until it is noticed."""
    breach, product, what = BREACHES[name], Counter[str](), ""
    played = number = 0
    with bpffs() as pins:
        for plan in islice(_suitable(name, seed), within):
            played, number = played + 1, plan.seed
            what = _play(plan, pins / str(number), name, verify, product)
            if what or product["COPIES_DIFFER"]:
                break
    return Notice(name, breach.how, verify, played, number - seed + 1, what, dict(+product))


def _suitable(name: str, seed: int) -> Iterator[Schedule]:
    return filter(BREACHES[name].suits, map(schedule, count(seed)))


def _play(plan: Schedule, pins: Path, name: str, verify: str, product: Counter[str]) -> str:
    """Return what the judge says, and count what the agents do."""
    with tempfile.TemporaryDirectory(prefix="warmsync-test-", dir=host.SCRATCH) as place:
        try:
            play(plan, Path(place), pins, Counter(), breach=name, verify=verify)
        except BreachError as error:
            return f"seed {plan.seed}: {str(error)[:200]}"
        finally:
            said = "".join(log.read_text() for log in Path(place).glob("*.log"))
            product.update({sign: said.count(words) for sign, words in SIGNS.items()})
    return ""


if __name__ == "__main__":
    main()
