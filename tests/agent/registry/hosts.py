"""An agent in this process whose peers are fakes, and what one before it has written down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.config import AgentConfig, LimitsConfig
from agent.errors import FailedPrecondition, WarmsyncError
from agent.journal import Journal
from agent.migration import Depth, Plan, Progress, Role, Scheme, Volume
from agent.record import SourceRecord, TargetRecord, dump, load_source
from agent.registry import Registry
from agent.state import Entry, State
from tests.agent.carriers.rig import SIZE, image
from tests.agent.ends import SIGNER, FakeCarrier, FakePeer
from tests.agent.rpc_helpers import run

SYNCING = (State.PENDING, State.SEEDING, State.SYNCING)
CUTTING_OVER = (*SYNCING, State.CUTTING_OVER)
CUT_OVER = (*CUTTING_OVER, State.CUT_OVER)
OWNER_UNKNOWN = FailedPrecondition("OWNER_UNKNOWN", "the source stays fenced")


class Host:
    """A registry whose peers are fakes; `peers` are those it connected to."""

    def __init__(self, directory: Path, **limits: int) -> None:
        self.directory = directory
        self.images = {name: image(directory, name, seed=1) for name in ("a", "b", "c")}
        self.targets = {name: image(directory, f"{name}.target") for name in ("a", "b", "c")}
        self.peers: list[FakePeer] = []
        self.errors: dict[str, list[Exception]] = {}
        self.gates: dict[str, asyncio.Event] = {}
        config = AgentConfig(
            state_dir=str(directory / "state"),
            bpffs_dir=str(directory / "bpf"),
            allow_devices=(f"{directory}/*",),
            limits=LimitsConfig(**limits),
        )
        self.registry = Registry(config, self._connect, SIGNER)

    def plan(self, name: str, *images: str, **changes: Any) -> Plan:
        volumes = tuple(
            Volume(str(self.images[i]), str(self.targets[i])) for i in images or (name,)
        )
        return replace(Plan(name, "target:7070", volumes, Scheme.SCAN), **changes)

    def _connect(self, address: str) -> FakePeer:
        peer = FakePeer(FakeCarrier([self.targets["a"]]))
        peer.errors.update({call: list(errors) for call, errors in self.errors.items()})
        peer.gates.update(self.gates)
        peer.gates.setdefault("open_carrier", asyncio.Event())  # it begins, and stays PENDING
        self.peers.append(peer)
        return peer


@asynccontextmanager
async def hosting(directory: Path, **limits: int) -> AsyncIterator[Host]:
    host = Host(directory, **limits)
    try:
        yield host
    finally:
        await host.registry.close()
        for peer in host.peers:
            await peer.carrier.close()


def trial(
    directory: Path, steps: Callable[[Host], Coroutine[Any, Any, None]], **limits: int
) -> None:
    async def main() -> None:
        async with hosting(directory, **limits) as host:
            await steps(host)

    run(main)


async def refused(attempt: Coroutine[Any, Any, Any]) -> WarmsyncError:
    with pytest.raises(WarmsyncError) as caught:
        await attempt
    return caught.value


def record(directory: Path, states: tuple[State, ...], *names: str, **changes: Any) -> SourceRecord:
    """Return what an agent wrote down of a migration of these images."""
    names = names or ("a",)
    volumes = tuple(Volume(str(directory / name), f"/dev/{name}", SIZE, 65536) for name in names)
    now = time.time()
    made = SourceRecord(
        plan=Plan("web1", "target:7070", volumes, Scheme.SCAN, verify=Depth.NONE),
        scheme=Scheme.SCAN,
        scheme_reason="",
        secret="s" * 32,
        epoch=3,
        boot_id="an earlier boot",
        devices=tuple((0, 0, 0) for _ in names),
        history=tuple(Entry(state, now) for state in states),
        generation=5,
        progress=Progress(total_bytes=SIZE),
        nameplates=tuple("" for _ in names),
    )
    return replace(made, **changes)


def named(name: str, made: SourceRecord) -> SourceRecord:
    return replace(made, plan=replace(made.plan, id=name))


def write_down(directory: Path, *records: SourceRecord | TargetRecord) -> None:
    journal = Journal(directory / "state")
    for one in records:
        role = Role.SOURCE if isinstance(one, SourceRecord) else Role.TARGET
        journal.save(role, one.plan.id, dump(one))
    journal.close()


def written(directory: Path) -> SourceRecord:
    """Return what is written down of the source's end."""
    journal = Journal(directory / "state")
    found = {role: values for role, _, values in journal.load()}
    journal.close()
    return load_source(found[Role.SOURCE])


def is_fenced(path: Path) -> bool:
    return not path.stat().st_mode & 0o222


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - files and journals ring no bell
        await asyncio.sleep(0.01)
