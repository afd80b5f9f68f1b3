"""What a person settles of a source that is not driven any more: found again, or failed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent.config import AgentConfig
from agent.device import boot_id
from agent.errors import FailedPrecondition, NotFound, Unavailable, WarmsyncError
from agent.journal import Journal
from agent.migration import Depth, Owner, Plan, Progress, Role, Scheme, Volume
from agent.record import SourceRecord, dump
from agent.registry import Registry
from agent.registry import settling as settling_module
from agent.registry.fence import lift
from agent.state import Entry, State
from tests.agent.carriers.rig import SIZE, image
from tests.agent.ends import SIGNER, FakeCarrier, FakePeer
from tests.agent.rpc_helpers import run

BEGUN = (State.PENDING, State.SEEDING, State.SYNCING, State.CUTTING_OVER)
UNKNOWN = FailedPrecondition("OWNER_UNKNOWN", "the target did not answer the release")
LOST = Unavailable("PEER_UNREACHABLE", "nobody answers")
FORGOTTEN = NotFound("SESSION_NOT_FOUND", "no such session")
ENDS = {Owner.SOURCE: State.ROLLED_BACK, Owner.TARGET: State.COMPLETED}
DOUBTS: dict[str, tuple[State, ...]] = {
    "failed": (*BEGUN, State.FAILED),
    "in the release": BEGUN,
    "cut over": (*BEGUN, State.CUT_OVER),
}


class Host:
    """An agent that starts on what another has written down; `source` is fenced."""

    def __init__(self, directory: Path, states: tuple[State, ...], **changes: Any) -> None:
        self.directory = directory
        self.source, self.target = image(directory, "source", seed=1), image(directory, "target")
        self.source.chmod(0o444)
        self.peers: list[FakePeer] = []
        self.answer: WarmsyncError | bool = LOST
        """What the target says: that it was released, that it was not, or an error."""
        self.gates: dict[str, asyncio.Event] = {}
        self._write(states, changes)

    def _write(self, states: tuple[State, ...], changes: dict[str, Any]) -> None:
        volume = Volume(str(self.source), str(self.target), SIZE, 65536)
        record = SourceRecord(
            plan=Plan("web1", "target:7070", (volume,), Scheme.SCAN, verify=Depth.NONE),
            scheme=Scheme.SCAN,
            scheme_reason="",
            secret="a secret of a test",
            epoch=3,
            boot_id=boot_id(),
            devices=((0, 0, 0),),
            history=tuple(Entry(state, time.time()) for state in states),
            generation=5,
            progress=Progress(total_bytes=SIZE, sent_bytes=1000),
            releasing=True,
            error=UNKNOWN if states[-1] is State.FAILED else None,
        )
        journal = Journal(self.directory / "state")
        journal.save(Role.SOURCE, "web1", dump(replace(record, **changes)))
        journal.close()

    @property
    def is_fenced(self) -> bool:
        return not self.source.stat().st_mode & 0o200

    @property
    def calls(self) -> list[str]:
        return [call for peer in self.peers for call in peer.calls]

    def connect(self, address: str) -> FakePeer:
        peer = FakePeer(FakeCarrier([self.target]))
        peer.address = address
        peer.gates.update(self.gates)
        if isinstance(self.answer, WarmsyncError):
            for call in ("resume", "unread", "abort", "finish"):
                peer.errors[call] = [self.answer] * 100
        else:
            peer.released = self.answer
        self.peers.append(peer)
        return peer

    def run(self, steps: Callable[[Registry], Coroutine[Any, Any, None]]) -> None:
        """Run `steps(registry)` on an agent that starts now."""

        async def main() -> None:
            config = AgentConfig(
                state_dir=str(self.directory / "state"),
                bpffs_dir=str(self.directory / "bpf"),
                allow_devices=(f"{self.directory}/*",),
            )
            registry = Registry(config, self.connect, SIGNER)
            registry.start()
            try:
                await steps(registry)
            finally:
                await registry.close()
                for peer in self.peers:
                    await peer.carrier.close()

        run(main)


async def refusal(registry: Registry, owner: Owner) -> WarmsyncError:
    with pytest.raises(WarmsyncError) as caught:
        await registry.settle("web1", owner)
    return caught.value


@pytest.mark.parametrize("owner", ENDS)
@pytest.mark.parametrize("doubt", DOUBTS)
@pytest.mark.parametrize("answer", [LOST, FORGOTTEN], ids=["silent", "forgotten"])
def test_a_person_says_who_owns(
    tmp_path: Path, owner: Owner, doubt: str, answer: WarmsyncError
) -> None:
    host = Host(tmp_path, DOUBTS[doubt])
    host.answer = answer

    async def settle(registry: Registry) -> None:
        assert host.is_fenced
        end = await registry.settle("web1", owner)
        check(end)
        await registry.settle("web1", owner)  # may be repeated
        check(registry.get("web1"))
        other = Owner.TARGET if owner is Owner.SOURCE else Owner.SOURCE
        with pytest.raises(WarmsyncError):
            await registry.settle("web1", other)
        check(registry.get("web1"))

    def check(end: Any) -> None:
        assert end.state is ENDS[owner]
        shown = end.snapshot()
        assert (shown.owner, shown.error, shown.refusal) == (owner, None, None)
        assert host.is_fenced is (owner is Owner.TARGET)

    async def start_again(registry: Registry) -> None:
        """It leaves the disks alone, asks nobody, and can be forgotten."""
        check(registry.get("web1"))
        assert host.calls == []
        if owner is Owner.SOURCE:  # a VM may have been booted
            host.source.chmod(0o644)
        registry.forget("web1")
        again = await registry.create(
            Plan("web2", "target:7070", (Volume(str(host.source), str(host.target)),), Scheme.SCAN)
        )
        assert not again.state.is_terminal
        await again.cancel()

    host.run(settle)
    host.peers.clear()
    host.run(start_again)


def test_the_one_of_now_that_failed(tmp_path: Path) -> None:
    """It is driven by nobody any more, and its devices are closed."""
    host = Host(tmp_path, BEGUN)
    host.answer = FailedPrecondition("ODD", "what nobody expects")

    async def steps(registry: Registry) -> None:
        migration = registry.get("web1")
        while not migration.state.is_terminal:
            await migration.bell.wait(migration.bell.count)
        assert (migration.state, migration.snapshot().owner) == (State.FAILED, Owner.NOBODY)
        await registry.settle("web1", Owner.SOURCE)
        assert registry.get("web1").state is State.ROLLED_BACK
        assert not host.is_fenced

    host.run(steps)


@pytest.mark.parametrize("owner", ENDS)
def test_a_target_that_answers_decides(tmp_path: Path, owner: Owner) -> None:
    """Of a migration that has failed nobody asks it any more but the person."""
    host = Host(tmp_path, DOUBTS["failed"])
    other = Owner.TARGET if owner is Owner.SOURCE else Owner.SOURCE

    async def steps(registry: Registry) -> None:
        host.answer = other is Owner.TARGET
        said = await refusal(registry, owner)
        assert said.reason == "OWNER_KNOWN"
        assert f"says that the {other} owns" in str(said)
        assert registry.get("web1").snapshot().owner is Owner.NOBODY
        assert host.is_fenced
        host.answer = owner is Owner.TARGET
        await registry.settle("web1", owner)
        told = "finish" if owner is Owner.TARGET else "abort cancelled"
        assert any(call.startswith(told) for call in host.calls)
        # An answer is given to an epoch once only.
        resumed = [call for call in host.calls if call.startswith("resume")]
        assert resumed == ["resume 4", "resume 5"]

    host.run(steps)


def test_a_session_that_ended_there_was_not_released(tmp_path: Path) -> None:
    host = Host(tmp_path, DOUBTS["failed"])
    host.answer = FailedPrecondition("SOURCE_FAILED", "it is CANCELLED here", owner="source")

    async def steps(registry: Registry) -> None:
        assert (await refusal(registry, Owner.TARGET)).reason == "OWNER_KNOWN"
        await registry.settle("web1", Owner.SOURCE)
        assert not host.is_fenced

    host.run(steps)


def test_an_end_between_the_decision_and_the_fence(tmp_path: Path) -> None:
    """Said once more, the fence comes down, also if nobody is there to be asked."""
    host = Host(tmp_path, (*BEGUN, State.ROLLED_BACK), releasing=True)

    async def steps(registry: Registry) -> None:
        await registry.settle("web1", Owner.SOURCE)
        assert not host.is_fenced
        host.source.chmod(0o444)  # the fence of another migration
        await registry.settle("web1", Owner.SOURCE)
        assert host.is_fenced

    host.run(steps)


@pytest.mark.parametrize("state", ["in the release", "cut over"])
def test_a_source_whose_disk_is_gone(tmp_path: Path, state: str) -> None:
    host = Host(tmp_path, DOUBTS[state])
    away = host.source.rename(tmp_path / "away")

    async def steps(registry: Registry) -> None:
        said = await refusal(registry, Owner.SOURCE)
        assert said.reason == "STILL_FENCED"
        assert registry.get("web1").state is State.ROLLED_BACK
        assert registry.get("web1").snapshot().error is said
        away.rename(host.source)
        await registry.settle("web1", Owner.SOURCE)
        assert not host.is_fenced
        assert registry.get("web1").snapshot().error is None

    host.run(steps)


def test_a_fence_that_is_up_for_another_migration_stays(tmp_path: Path) -> None:
    """The same disk went elsewhere later, and its VM runs there."""
    host = Host(tmp_path, (*BEGUN, State.FAILED))
    journal = Journal(tmp_path / "state")
    _, _, values = journal.load()[0]
    plan = {**values["plan"], "id": "web2"}
    history = [*values["history"][:-1], {**values["history"][-1], "state": "CUT_OVER"}]
    journal.save(Role.SOURCE, "web2", {**values, "plan": plan, "history": history, "error": None})
    journal.close()

    async def steps(registry: Registry) -> None:
        assert registry.get("web2").state is State.CUT_OVER
        await registry.settle("web1", Owner.SOURCE)
        assert registry.get("web1").state is State.ROLLED_BACK
        assert host.is_fenced

    host.run(steps)


def test_what_failed_before_its_release_is_the_sources(tmp_path: Path) -> None:
    error = FailedPrecondition("SOURCE_IO_ERROR", "unreadable")
    host = Host(tmp_path, (*BEGUN[:-1], State.FAILED), releasing=False, error=error)

    async def steps(registry: Registry) -> None:
        await registry.settle("web1", Owner.SOURCE)  # it is so already
        assert registry.get("web1").state is State.FAILED
        assert (await refusal(registry, Owner.TARGET)).reason == "OWNER_KNOWN"
        assert host.calls == []

    host.run(steps)


def test_a_rollback_leaves_no_fence_to_be_lifted(tmp_path: Path) -> None:
    host = Host(tmp_path, DOUBTS["cut over"])
    host.answer = True

    async def steps(registry: Registry) -> None:
        migration = registry.get_source("web1")
        await migration.roll_back()
        assert not host.is_fenced
        host.source.chmod(0o444)  # the fence of another migration
        await registry.settle("web1", Owner.SOURCE)
        assert host.is_fenced

    host.run(steps)


def test_after_a_cutover_nothing_is_in_doubt(tmp_path: Path) -> None:
    """An agent that starts again does not say that the target never answered."""
    host = Host(tmp_path, DOUBTS["cut over"])

    async def steps(registry: Registry) -> None:
        shown = registry.get("web1").snapshot()
        assert (shown.state, shown.owner, shown.refusal) == (State.CUT_OVER, Owner.TARGET, None)

    host.run(steps)


def test_of_two_who_say_otherwise_one_is_refused(tmp_path: Path) -> None:
    host = Host(tmp_path, DOUBTS["failed"])

    async def steps(registry: Registry) -> None:
        gate = host.gates["resume"] = asyncio.Event()
        both = asyncio.gather(
            *(registry.settle("web1", owner) for owner in ENDS), return_exceptions=True
        )
        await asyncio.sleep(0.05)
        gate.set()
        said = await both
        (refusal,) = [one for one in said if isinstance(one, WarmsyncError)]
        assert refusal.reason == "OWNER_KNOWN"
        end = registry.get("web1")
        assert host.is_fenced is (end.snapshot().owner is Owner.TARGET)

    host.run(steps)


def test_a_disk_that_hangs_keeps_no_other_from_being_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, DOUBTS["failed"])
    other = image(tmp_path, "other", seed=2)
    journal = Journal(tmp_path / "state")
    _, _, values = journal.load()[0]
    volume = {**values["plan"]["volumes"][0], "source": str(other)}
    plan = {**values["plan"], "id": "web2", "volumes": [volume]}
    journal.save(Role.SOURCE, "web2", {**values, "plan": plan})
    journal.close()
    reached, gate = threading.Event(), threading.Event()

    def hang(record: SourceRecord, *rest: Any) -> None:
        if record.plan.id == "web1":
            reached.set()
            assert gate.wait(20)
        lift(record, *rest)

    monkeypatch.setattr(settling_module, "lift", hang)

    async def steps(registry: Registry) -> None:
        settling = asyncio.create_task(registry.settle("web1", Owner.SOURCE))
        await asyncio.to_thread(reached.wait, 20)
        try:
            async with asyncio.timeout(15):
                await registry.settle("web2", Owner.SOURCE)
            assert other.stat().st_mode & 0o200
            assert host.is_fenced
            with pytest.raises(WarmsyncError) as early:
                registry.forget("web1")  # its disk would be somebody else's when it answers
            assert early.value.reason == "NOT_ENDED"
        finally:
            gate.set()
            await settling
        assert not host.is_fenced
        registry.forget("web1")

    host.run(steps)
