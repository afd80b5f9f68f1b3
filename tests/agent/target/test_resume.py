"""A source that comes back, a target that starts again: what is durable, and whose claim it is."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from warmsync.v1 import peer_service_pb2 as pb

from agent.errors import (
    DataLoss,
    FailedPrecondition,
    NotFound,
    Unavailable,
    WarmsyncError,
)
from agent.registry import Registry
from agent.registry import reception as reception_module
from agent.rpc.peer_service import PeerServicer
from agent.state import State
from agent.target import TargetSession
from agent.target import claim as claim_module
from agent.target import holding as holding_module
from agent.target import intake as intake_module
from agent.target.claim import claim
from agent.writer import Writer
from native.blockio import BlockDevice
from tests.agent.carriers.rig import frame_of, request
from tests.agent.certificates import hand_over
from tests.agent.rpc_helpers import run
from tests.agent.target.sessions import (
    STEP,
    assert_state,
    is_claimed,
    receive,
    refused,
    registry_of,
    trial,
)


def test_a_stream_that_ends_is_a_cut_and_may_begin_again(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        await receive(session, source)
        session.end_stream(None, 1)
        assert_state(session, State.SYNCING)
        assert session.snapshot().incomplete
        assert is_claimed(target)
        with pytest.raises(Unavailable):  # what is left of the old stream writes nothing
            await session.write(memoryview(frame_of(source, 0, STEP, generation=2)), 1)
        old = session.token
        assert await session.resume(session.secret, 2) == 1
        with pytest.raises(FailedPrecondition) as late:
            registry.session(old)
        assert late.value.reason == "SESSION_SUPERSEDED"
        assert registry.session(session.token) is session
        stream = session.begin_stream()
        await session.write(memoryview(frame_of(source, 0, STEP, generation=2)), stream)
        await session.flush(2, stream)
        await hand_over(session, 2)
        assert await session.resume(session.secret, 3) == 2
        assert_state(session, State.CUT_OVER)
        assert not is_claimed(target)

    trial(target, steps)


def test_a_comparison_that_meets_the_end_of_the_agent(target: Path) -> None:
    """Its source tries again; an internal error would end the migration. Found by the gauntlet."""

    async def steps(registry: Registry, session: TargetSession) -> None:
        registry.workshop.threads.shutdown()
        with pytest.raises(Unavailable) as caught:
            _ = [item async for item in session.digests(0)]
        assert caught.value.reason == "AGENT_STOPPED"

    trial(target, steps)


def test_who_has_not_come_back_yet_is_not_superseded(target: Path) -> None:
    """Its agent counts a connection before it makes it."""

    async def steps(registry: Registry, session: TargetSession) -> None:
        assert refused(lambda: registry.session(f"{session.secret}/2")) == "SOURCE_NOT_BACK"
        await session.resume(session.secret, 2)
        assert registry.session(f"{session.secret}/2") is session
        for odd in ("", "-1", "1.5", "²"):
            with pytest.raises(FailedPrecondition):
                registry.session(f"{session.secret}/{odd}")

    trial(target, steps)


def test_the_end_is_heard_from_a_source_that_has_not_come_back_yet(target: Path) -> None:
    """Each try counts, also one that did not arrive; an earlier run ends nothing."""

    async def steps(registry: Registry, session: TargetSession) -> None:
        session.begin_stream()
        await session.resume(session.secret, 3)

        def abort(epoch: int) -> None:
            registry.abort_session(f"{session.secret}/{epoch}", "enough", cancelled=True)

        assert refused(lambda: abort(2)) == "SESSION_SUPERSEDED"
        assert is_claimed(target)
        abort(5)
        assert_state(session, State.CANCELLED)
        assert not is_claimed(target)

    trial(target, steps)


def test_what_an_earlier_connection_still_reads_is_waited_for(target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        reading = BlockDevice(str(target))
        end = threading.Timer(0.5, reading.close)
        end.start()
        await session.resume(session.secret, 2)
        assert is_claimed(target)
        end.join()

    trial(target, steps)


def test_what_was_not_released_is_said_to_be_the_source_s(target: Path) -> None:
    """So that it need not keep its fence up for a target that cannot go on."""

    async def resumed(session: TargetSession, epoch: int) -> tuple[str, str]:
        with pytest.raises(WarmsyncError) as caught:
            await session.resume(session.secret, epoch)
        return caught.value.reason, caught.value.values.get("owner", "")

    async def steps(registry: Registry, session: TargetSession) -> None:
        away = target.with_suffix(".away")
        os.rename(target, away)
        assert await resumed(session, 2) == ("TARGET_NOT_CLAIMED", "source")
        os.rename(away, target)
        await session.resume(session.secret, 3)
        assert await resumed(session, 3) == ("SESSION_SUPERSEDED", "")
        session.give_up(Unavailable("SOURCE_LOST", "gone"))
        assert await resumed(session, 4) == ("SOURCE_LOST", "source")

    trial(target, steps)


def test_the_newer_fences_the_older(target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        await session.resume(session.secret, 5)
        for epoch in (1, 4, 5):
            with pytest.raises(FailedPrecondition) as refusal:
                await session.resume(session.secret, epoch)
            assert refusal.value.reason == "SESSION_SUPERSEDED"
        with pytest.raises(NotFound):
            await session.resume("guessed", 6)

    trial(target, steps)


class SlowDisk:
    """Claims as `agent.target.claim` does, but not before it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._claim = claim
        self.calls = 0
        self.asked = threading.Event()
        self.answer = threading.Event()
        monkeypatch.setattr(holding_module, "claim", self)

    def __call__(self, *args: Any, **named: Any) -> list[BlockDevice]:
        self.calls += 1
        self.asked.set()
        assert self.answer.wait(20)
        devices: list[BlockDevice] = self._claim(*args, **named)
        return devices


def test_what_is_claimed_too_late_is_given_back(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given up by its operator while a slow disk is claimed again."""

    async def steps(registry: Registry, session: TargetSession) -> None:
        disk = SlowDisk(monkeypatch)
        resuming = asyncio.ensure_future(session.resume(session.secret, 2))
        await asyncio.to_thread(disk.asked.wait, 20)
        session.abandon()
        disk.answer.set()
        with pytest.raises(FailedPrecondition) as caught:
            await resuming
        assert caught.value.reason == "SESSION_NOT_OPEN"
        assert not is_claimed(target)

    trial(target, steps)


def test_a_source_that_hangs_up_does_not_stop_a_claim(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of it would be left to a thread: a device that nobody knows to be open."""

    async def steps(registry: Registry, session: TargetSession) -> None:
        disk = SlowDisk(monkeypatch)
        asked = pb.ResumeSessionRequest(session_secret=session.secret, epoch=2)
        call = asyncio.ensure_future(PeerServicer(registry).ResumeSession(asked, None))
        await asyncio.to_thread(disk.asked.wait, 20)
        call.cancel()
        await asyncio.wait([call])
        with pytest.raises(FailedPrecondition) as early:
            registry.session(f"{session.secret}/1")
        assert early.value.reason == "SESSION_SUPERSEDED"
        again = asyncio.ensure_future(session.resume(session.secret, 3))
        await asyncio.sleep(0.1)
        assert disk.calls == 1, "claimed twice at the same time"
        disk.answer.set()
        assert await again == 0
        assert (disk.calls, is_claimed(target)) == (2, True)

    trial(target, steps)


def test_a_target_is_found_again(source: Path, target: Path) -> None:
    """By the next agent of this state directory, with its claim and its last generation."""

    async def main() -> None:
        first = registry_of(target.parent, target)
        session = await first.open_session(request([target]))
        stream = session.begin_stream()
        await receive(session, source)
        assert stream == 1
        await first.close()
        assert not is_claimed(target)
        second = registry_of(target.parent, target)
        try:
            again = second.session_of(session.secret)
            assert again.state is State.SYNCING
            assert is_claimed(target)
            assert await again.resume(session.secret, 2) == 1
            again.abort("enough", cancelled=True)
        finally:
            await second.close()
        third = registry_of(target.parent, target)
        try:
            assert third.session_of(session.secret).state is State.CANCELLED
            assert not is_claimed(target)
        finally:
            await third.close()

    run(main)


def test_a_session_whose_source_is_away_can_be_given_up(source: Path, target: Path) -> None:
    async def steps(registry: Registry, session: TargetSession) -> None:
        stream = session.begin_stream()
        assert refused(session.abandon) == "NOT_THE_SOURCE"
        await receive(session, source)
        session.end_stream(None, stream)
        session.abandon()
        assert_state(session, State.CANCELLED)
        assert not is_claimed(target)
        assert refused(session.abandon) == "NOT_THE_SOURCE"

    trial(target, steps)


class Host:
    """A target's host, as its kernel sees it: which boot it is, and which disk has the name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._number = 0
        self.boot = "first"
        self.disk = "wwid=eui.1"
        for module in (holding_module, reception_module):
            monkeypatch.setattr(module, "boot_id", lambda: self.boot)
        for module in (holding_module, claim_module):
            monkeypatch.setattr(module, "nameplate", lambda device: self.disk)
        monkeypatch.setattr(holding_module, "device_key", lambda device: (259, self._number, 7))

    def restart(self, disk: str) -> None:
        """Begin another boot: numbers say nothing any more."""
        self.boot, self.disk = "second", disk
        self._number += 1

    def exchange(self, disk: str) -> None:
        """Let another device have the name, on the same boot."""
        self.disk = disk
        self._number += 1


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def come_back(target: Path, source: Path, change: Callable[[], None]) -> tuple[int | str, bool]:
    """Acknowledge a generation, change something while the agent is away, and resume.

    Returns the generation, or why the source is refused; and whether the device is claimed then.
    """

    async def main() -> tuple[int | str, bool]:
        first = registry_of(target.parent, target)
        session = await first.open_session(request([target]))
        session.begin_stream()
        await receive(session, source)
        await first.close()
        change()
        second = registry_of(target.parent, target)
        try:
            again = second.session_of(session.secret)
            return await again.resume(session.secret, 2), is_claimed(target)
        except FailedPrecondition as refusal:
            return f"{refusal.reason} {refusal.values['owner']}", is_claimed(target)
        finally:
            await second.close()

    found: list[tuple[int | str, bool]] = []

    async def keep() -> None:
        found.append(await main())

    run(keep)
    return found[0]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("wwid=eui.1", "wwid=eui.1", 1),
        ("wwid=eui.1", "wwid=eui.2", "TARGET_NOT_CLAIMED source"),
        ("wwid=eui.1", "", "TARGET_NOT_CLAIMED source"),
        ("", "", 0),
        ("", "wwid=eui.2", 0),
    ],
    ids=["the same", "another", "no longer known", "never known", "known since"],
)
def test_a_disk_is_recognised_after_a_reboot(  # noqa: PLR0917
    target: Path, source: Path, host: Host, before: str, after: str, expected: int | str
) -> None:
    """Names are given anew at each boot: what one had is believed of the same disk only."""
    host.disk = before
    found = come_back(target, source, lambda: host.restart(after))
    assert found == (expected, isinstance(expected, int))


@pytest.mark.parametrize(
    ("after", "expected"),
    [("wwid=eui.1", 0), ("wwid=eui.2", "TARGET_NOT_CLAIMED source")],
    ids=["there again", "another"],
)
def test_a_disk_is_recognised_on_the_same_boot(
    target: Path, source: Path, host: Host, after: str, expected: int | str
) -> None:
    """One that was away may have lost what it had not written; another is not overwritten."""
    found = come_back(target, source, lambda: host.exchange(after))
    assert found == (expected, expected == 0)


def test_a_disk_that_comes_late_is_of_no_boot_before(
    target: Path, source: Path, host: Host
) -> None:
    """Its agent started without it: its numbers are those of another boot, and may be the same."""
    host.disk, away = "", target.with_suffix(".away")

    async def main() -> None:
        first = registry_of(target.parent, target)
        session = await first.open_session(request([target]))
        session.begin_stream()
        await receive(session, source)
        await first.close()
        host.boot = "second"
        os.rename(target, away)
        second = registry_of(target.parent, target)
        try:
            again = second.session_of(session.secret)
            with pytest.raises(FailedPrecondition):
                await again.resume(session.secret, 2)
            os.rename(away, target)
            assert await again.resume(session.secret, 3) == 0
        finally:
            await second.close()

    run(main)


def test_what_an_older_agent_wrote_down_is_believed_on_its_boot_only(
    target: Path, source: Path, host: Host
) -> None:
    """It knew of no nameplates."""

    def forget() -> None:
        with closing(sqlite3.connect(target.parent / "journal.db")) as journal, journal:
            journal.execute("UPDATE migration SET record = json_remove(record, '$.nameplates')")

    assert come_back(target, source, forget) == (1, True)


def test_a_flush_whose_caller_has_gone_is_waited_for(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk hangs: claimed anew, the late flush would be of another session's device."""
    monkeypatch.setattr(intake_module, "DRAIN_SECONDS", 0.3)
    gate = asyncio.Event()

    async def stalled(self: Writer) -> float:
        await gate.wait()
        return 0.0

    async def steps(registry: Registry, session: TargetSession) -> None:
        stream = session.begin_stream()
        await session.write(memoryview(frame_of(source, 0, STEP)), stream)
        monkeypatch.setattr(Writer, "flush", stalled)
        flushing = asyncio.ensure_future(session.flush(1, stream))
        await asyncio.sleep(0)
        flushing.cancel()
        await asyncio.wait([flushing])
        with pytest.raises(DataLoss, match="no answer for 0 s") as caught:
            await session.resume(session.secret, 2)
        assert (caught.value.reason, caught.value.values["path"]) == (
            "TARGET_IO_ERROR",
            str(target),
        )
        monkeypatch.setattr(intake_module, "DRAIN_SECONDS", 20.0)
        gate.set()
        assert await session.resume(session.secret, 3) == 0

    trial(target, steps)
