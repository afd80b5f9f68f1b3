"""Random migrations with live guests: whatever happens, the copies are equal to the byte."""

from __future__ import annotations

import random
import subprocess
from contextlib import ExitStack
from typing import Any

import pytest

from tests import content
from tests.e2e import disks
from tests.e2e.agents import Agent, Pair, Shown
from tests.e2e.scenarios import HEADERS, Scenario, VolumePlan, scenario
from tests.guest import boot, destroy, finish, fio, power_off

SEEDS = range(24)
BUDGET = "20s"
"""Generous: whether the machine is quick today is not what these tests are about."""


@pytest.mark.parametrize("seed", SEEDS)
def test_the_copies_are_equal(pair: Pair, resources: ExitStack, seed: int) -> None:
    plan = scenario(seed)
    print(f"seed {seed}: {plan}")
    volumes = [_make(resources, volume, seed) for volume in plan.volumes]
    booting = zip(volumes, plan.volumes, strict=True)
    guests = [_boot(resources, source, volume) for (source, _), volume in booting]
    name = _start(pair, plan, volumes)
    _meanwhile(pair.source, name, plan, random.Random(seed))
    _await_convergence(pair.source, name, plan)
    for guest in guests:
        power_off(guest)
    shown = _cut_over(pair.source, name, plan)
    _check_result(pair, name, plan, shown, volumes)
    for (source, target), volume in zip(volumes, plan.volumes, strict=True):
        disks.assert_equal(source, target)
        if volume.workload == "verify":
            finish(fio(target, "--rw=read", *HEADERS))
    _end(pair, name, plan, volumes)


def _make(stack: ExitStack, volume: VolumePlan, seed: int) -> tuple[str, str]:
    source = disks.KINDS[volume.source](stack, volume.size_bytes)
    room_bytes = -(-disks.size_of(source) // disks.MIB) * disks.MIB + seed % 2 * 3 * disks.MIB
    target = disks.KINDS[volume.target](stack, room_bytes)
    (disks.scatter if volume.sparse else content.fill)(source, seed)
    disks.soil(target, seed + 1)
    return source, target


def _boot(stack: ExitStack, path: str, volume: VolumePlan) -> subprocess.Popen[str]:
    if volume.workload == "verify":
        finish(fio(path, "--rw=write", *HEADERS, "--do_verify=0"))
    size = [] if volume.source != "file" else [f"--size={disks.size_of(path) // 4096 * 4096}"]
    guest = boot(path, *size, *volume.guest)
    stack.callback(destroy, guest)
    return guest


def _start(pair: Pair, plan: Scenario, volumes: list[tuple[str, str]]) -> str:
    words = ["--tracker", plan.tracker, "--block-size", str(plan.block_size_bytes)]
    return pair.start(*words, "--max-downtime", BUDGET, volumes=volumes)


def _meanwhile(agent: Agent, name: str, plan: Scenario, rng: random.Random) -> None:
    for change in plan.changes:
        if change == "pause":
            _pause(agent, name)
        elif change == "limit":
            rate = rng.choice(("8M", "64M"))
            agent.ask("update", name, "--bandwidth-limit", rate)
        else:
            agent.ask("update", name, "--max-downtime", rng.choice(("10s", "30s")))
        _await_progress(agent, name)
    agent.ask("update", name, "--bandwidth-limit", "0")


def _await_progress(agent: Agent, name: str) -> None:
    seen = agent.show(name)
    agent.wait(name, until=lambda now: _done(now) > _done(seen))


def _done(shown: Shown) -> int:
    return int(shown["bytes_sent"] + shown["rounds"])


def _pause(agent: Agent, name: str) -> None:
    agent.wait(name, "SEEDING", "SYNCING", "CONVERGED")
    assert agent.ask("pause", name)["state"] == "PAUSED"
    assert agent.ask("resume", name)["state"] in ("SEEDING", "SYNCING")


def _await_convergence(agent: Agent, name: str, plan: Scenario) -> None:
    if plan.forced:
        agent.wait(name, "SYNCING", "CONVERGED")
    else:
        agent.wait(name, "CONVERGED")


def _cut_over(agent: Agent, name: str, plan: Scenario) -> Shown:
    return agent.ask("cutover", name, *(["--force"] if plan.forced else []))


def _check_result(
    pair: Pair, name: str, plan: Scenario, shown: Shown, volumes: list[tuple[str, str]]
) -> None:
    assert shown["state"] == "CUT_OVER"
    assert shown["bytes_total"] == sum(disks.size_of(source) for source, _ in volumes)
    assert shown["downtime_seconds"] > 0
    assert shown["suspect_volumes"] == 0
    if plan.tracker != "auto":
        assert shown["tracker"] == plan.tracker
    there = pair.target.show(name)
    assert (there["state"], there["incomplete"]) == ("CUT_OVER", False)
    for source, target in volumes:
        assert disks.is_fenced(source)
        assert disks.is_free(target)


def _end(pair: Pair, name: str, plan: Scenario, volumes: list[tuple[str, str]]) -> None:
    state = {"rollback": "ROLLED_BACK", "finish": "COMPLETED"}[plan.ending]
    assert pair.source.ask("verify", name)["equal"] is True
    assert pair.source.ask(plan.ending, name)["state"] == state
    assert pair.target.show(name)["state"] == state
    for source, _ in volumes:
        assert disks.is_fenced(source) is (plan.ending == "finish")


def test_every_kind_is_met() -> None:
    """The seeds reach every kind of disk, workload, tracker and change."""
    plans = [scenario(seed) for seed in SEEDS]
    met: dict[str, set[Any]] = {
        "sources": {volume.source for plan in plans for volume in plan.volumes},
        "targets": {volume.target for plan in plans for volume in plan.volumes},
        "workloads": {volume.workload for plan in plans for volume in plan.volumes},
        "changes": {change for plan in plans for change in plan.changes},
        "trackers": {plan.tracker for plan in plans},
        "counts": {len(plan.volumes) for plan in plans},
        "endings": {plan.ending for plan in plans},
        "forced": {plan.forced for plan in plans},
    }
    assert {name: len(values) for name, values in met.items()} == {
        "sources": 5,
        "targets": 4,
        "workloads": 7,
        "changes": 3,
        "trackers": 3,
        "counts": 3,
        "endings": 2,
        "forced": 2,
    }
