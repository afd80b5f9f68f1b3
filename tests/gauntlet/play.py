"""The order of play: boot, migrate, strike, power off, cut over, judge, end, judge again."""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.e2e.agents import ENDED, Shown
from tests.gauntlet.faults import strike
from tests.gauntlet.field import GONE, SECONDS, BreachError, Field, field
from tests.gauntlet.judge import judge, judge_claims, judge_ending, judge_logs
from tests.gauntlet.schedule import Fault, Schedule

_ATTEMPTS = 4
"""How often a cutover is asked for, and an ending, before it counts as refused for ever."""


def play(
    plan: Schedule,
    directory: Path,
    pins: Path,
    struck: Counter[str],
    told: Counter[str] | None = None,
    *,
    breach: str = "",
    verify: str = "",
) -> str:
    """Play a schedule; returns how it ended. BreachError.

    Counts what `struck`, and the reasons that were `told` where a cutover or an ending was refused.
    `breach` names what the agents do wrong on purpose; see `tests.gauntlet.breaches`. `verify` is
    what they compare at the cutover, if not what the schedule says.
    """
    told = Counter() if told is None else told
    with field(plan, directory, pins, breach) as ground:
        ground.boot()
        name = _migrate(ground, verify or plan.verify)
        for fault in plan.faults:
            strike(ground, fault, name, struck)
        ground.proxy.heal()
        ground.ask(ground.source, "update", name, "--bandwidth-limit", "0")
        shown = ground.wait(name, "CONVERGED", "CUT_OVER", *ENDED)
        if shown["state"] == "CONVERGED":
            judge_claims(ground)
            shown = _cut_over_early(ground, name) if plan.is_hasty else shown
        ground.power_off()
        for attempt in range(_ATTEMPTS):
            if shown["state"] in (*ENDED, "CUT_OVER", GONE) or ground.is_undecided(shown):
                break
            # A second time where the first did not come to an end.
            struck_by = plan.cutover if attempt <= plan.seed % 2 else None
            shown = _cut_over(ground, name, struck_by, struck, told)
        how = judge(ground, name, shown)
        if how == "cut over":
            how = _end(ground, name, struck, told)
        if not breach:
            judge_logs(ground)
        return how


def _migrate(ground: Field, verify: str) -> str:
    plan = ground.plan
    words = ["--tracker", plan.tracker, "--carrier", plan.carrier, "--max-downtime", "20s"]
    words += ["--bandwidth-limit", "16M", "--id", f"g{plan.seed}"]
    words += ["--verify", verify]
    words += ["--reuse-target"] if plan.reuse_target else []
    words += ["--resize"] if plan.smaller else []
    pairs = [f"{one.source}:{one.target}" for one in ground.volumes]
    volumes = [word for pair in pairs for word in ("--volume", pair)]
    return str(ground.source.ask("migrate", "--peer", ground.peer, *volumes, *words)["id"])


def _cut_over_early(ground: Field, name: str) -> Shown:
    """Ask for the cutover of a guest that runs: no byte that it still writes may get lost.

    The fault of that name is refused for another reason while round 0 lasts.
    """
    ground.source.run("cutover", name, "--force")
    return ground.wait(name, "CONVERGED", "CUT_OVER", *ENDED)


def _cut_over(
    ground: Field, name: str, fault: Fault | None, struck: Counter[str], told: Counter[str]
) -> Shown:
    """Ask for the cutover, and perhaps strike a moment later."""
    _ask_and_strike(ground, ("cutover", name, "--force"), fault, struck, told)
    return ground.wait(name, "CUT_OVER", "CONVERGED", *ENDED)


def _end(ground: Field, name: str, struck: Counter[str], told: Counter[str]) -> str:
    """Roll back or finish, with a fault in it, until it is done; returns what it came to."""
    words = (ground.plan.ending, name)
    _ask_and_strike(ground, words, ground.plan.ending_fault, struck, told)
    answer = None
    for _ in range(_ATTEMPTS):
        if ground.shown(name)["state"] in (*ENDED, GONE):
            break
        answer = ground.ask(ground.source, *words)
        time.sleep(0.2)
    shown = ground.shown(name)
    if shown["state"] not in (*ENDED, GONE) and ground.there(name) != GONE:
        raise BreachError(f"{words} refused: {answer}")
    judge_ending(ground, name)
    if shown["state"] not in ENDED:
        return "forgotten"
    return "rolled back" if ground.plan.ending == "rollback" else "finished"


def _ask_and_strike(
    ground: Field,
    words: tuple[str, ...],
    fault: Fault | None,
    struck: Counter[str],
    told: Counter[str],
) -> None:
    """Ask for something in a process of its own, and let a fault come in between."""
    what, name = words[:2]
    asking = ground.prepare(*words)
    assert asking.stdin is not None
    asking.stdin.write("go\n")
    asking.stdin.flush()
    if fault is not None:
        here = Counter[str]()
        strike(ground, fault, name, here)
        struck.update({f"{what}: {kind}": 1 for kind in here if kind != "none"})
    with suppress(subprocess.TimeoutExpired):
        answer, _ = asking.communicate(timeout=SECONDS)
        if error := json.loads(answer.splitlines()[-1]).get("error") if answer else None:
            told[f"{what}: {error['reason']}"] += 1
    asking.kill()
    asking.communicate()
    ground.proxy.heal()
