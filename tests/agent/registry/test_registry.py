"""Who may start, which devices are whose; what is refused leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent import registry as registry_module
from agent import source as source_module
from agent.disk import SourceDisk
from agent.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from agent.journal import Journal
from agent.migration import Owner, Role
from agent.registry import preparation as preparation_module
from agent.registry import reception as reception_module
from agent.source import SourceMigration
from agent.state import State
from agent.tracker.scan import ScanTracker
from tests.agent.carriers.rig import descriptors, request, until
from tests.agent.registry.hosts import Host, hosting, refused, trial
from tests.agent.rpc_helpers import run
from tests.fuzz import journal_fuzz


def test_created_found_and_forgotten(tmp_path: Path) -> None:
    async def steps(host: Host) -> None:
        registry = host.registry
        migration = await registry.create(host.plan("a"))
        assert registry.get("a") is registry.get_source("a") is migration
        assert registry.all() == [migration]
        with pytest.raises(FailedPrecondition) as early:
            registry.forget("a")
        assert early.value.reason == "NOT_ENDED"
        await migration.cancel()
        registry.forget("a")
        for call in (registry.get, registry.forget, registry.get_source):
            with pytest.raises(NotFound):
                call("a")
        assert registry.totals().migrations_started == 1

    trial(tmp_path, steps)


def test_what_is_still_held_after_a_cancellation_is_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of it hangs, say: it would lift the fence of whoever has the disk after it."""
    monkeypatch.setattr(source_module, "CANCEL_SECONDS", 0.2)

    async def steps(host: Host) -> None:
        gate = host.gates["abort"] = asyncio.Event()
        migration = await host.registry.create(host.plan("a"))
        assert (await refused(migration.cancel())).reason == "SOURCE_STALLED"
        assert migration.state is State.CANCELLED
        with pytest.raises(FailedPrecondition) as early:
            host.registry.forget("a")
        assert early.value.reason == "NOT_ENDED"
        settling = host.registry.settle("a", Owner.TARGET)
        assert (await refused(settling)).reason == "SOURCE_STALLED"
        assert (
            await refused(host.registry.create(host.plan("b", "a")))
        ).reason == "DEVICE_IN_MIGRATION"
        monkeypatch.setattr(source_module, "CANCEL_SECONDS", 20.0)
        gate.set()
        await migration.cancel()
        host.registry.forget("a")
        await (await host.registry.create(host.plan("b", "a"))).cancel()

    trial(tmp_path, steps)


def test_what_has_failed_is_nobody_elses_before_its_target_is_told(tmp_path: Path) -> None:
    """What it writes down and removes last would be that of the next one of its name."""

    async def steps(host: Host) -> None:
        registry = host.registry
        gate = host.gates["abort"] = asyncio.Event()
        reached = host.gates["open_carrier"] = asyncio.Event()
        reached.set()
        host.errors["open_carrier"] = [FailedPrecondition("ODD", "what nobody expects")]
        migration = await registry.create(host.plan("a"))
        await host.peers[0].until("abort")
        assert migration.state is State.FAILED
        with pytest.raises(FailedPrecondition) as early:
            registry.forget("a")
        assert (early.value.reason, "in a moment" in str(early.value)) == ("NOT_ENDED", True)
        assert (await refused(registry.create(host.plan("b", "a")))).reason == "DEVICE_IN_MIGRATION"
        gate.set()
        await until(migration.bell, lambda: not migration.is_giving_up)
        registry.forget("a")
        host.errors.clear()
        reached.clear()
        await registry.create(host.plan("a"))
        [(_, _, record)] = registry._journal.load()
        assert record["history"][-1]["state"] == State.PENDING

    trial(tmp_path, steps)


def test_the_target_is_told_what_the_source_is(tmp_path: Path) -> None:
    async def steps(host: Host) -> None:
        await host.registry.create(host.plan("a", "a", "b"))
        (asked,) = host.peers[0].requests
        assert asked.migration_id == "a"
        assert [volume.size_bytes for volume in asked.volumes] == [4 << 20] * 2
        assert {volume.block_size_bytes for volume in asked.volumes} == {65536}
        assert all(one.device.startswith("file:") for ids in asked.source_identities for one in ids)

    trial(tmp_path, steps)


def test_tracking_starts_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 1: on all volumes, and what may differ from the target is everything."""
    events: list[str] = []
    start, begin = SourceDisk.start, SourceMigration.start

    def tracking(disk: SourceDisk) -> None:
        start(disk)
        events.append(f"tracking, {disk.pending.count_bytes()} bytes to send")

    def seeding(migration: SourceMigration) -> None:
        events.append("first round")
        begin(migration)

    monkeypatch.setattr(SourceDisk, "start", tracking)
    monkeypatch.setattr(SourceMigration, "start", seeding)
    begin_scan = ScanTracker.start

    def started(tracker: ScanTracker) -> None:
        begin_scan(tracker)
        events.append("started")

    monkeypatch.setattr(ScanTracker, "start", started)

    async def steps(host: Host) -> None:
        await host.registry.create(host.plan("a", "a", "b"))
        one = ["started", f"tracking, {4 << 20} bytes to send"]
        assert events == [*one, *one, "first round"]

    trial(tmp_path, steps)


def test_an_id_is_used_once(tmp_path: Path) -> None:
    async def steps(host: Host) -> None:
        migration = await host.registry.create(host.plan("a"))
        error = await refused(host.registry.create(host.plan("a", "b")))
        assert isinstance(error, AlreadyExists)
        await migration.cancel()  # ended, not forgotten
        assert isinstance(await refused(host.registry.create(host.plan("a"))), AlreadyExists)
        host.registry.forget("a")
        await host.registry.create(host.plan("a"))

    trial(tmp_path, steps)


def test_one_of_two_at_once_wins(tmp_path: Path) -> None:
    async def steps(host: Host) -> None:
        attempts = [host.registry.create(host.plan("a")) for _ in range(2)]
        results = await asyncio.gather(*attempts, return_exceptions=True)
        assert sorted(isinstance(result, AlreadyExists) for result in results) == [False, True]

    trial(tmp_path, steps)


def test_a_device_is_in_one_migration(tmp_path: Path) -> None:
    async def steps(host: Host) -> None:
        registry = host.registry
        migration = await registry.create(host.plan("a", "a", "b"))
        error = await refused(registry.create(host.plan("c", "c", "b")))
        assert (error.reason, error.values["id"]) == ("DEVICE_IN_MIGRATION", "a")
        # Nor may it be a target meanwhile; of a file that is open the kernel says so first.
        error = await refused(registry.open_session(request([host.images["b"]])))
        assert error.reason in ("DEVICE_IN_MIGRATION", "DEVICE_IN_USE")
        await migration.cancel()
        await registry.create(host.plan("c", "c", "b"))

    trial(tmp_path, steps)


def test_a_target_is_no_source_meanwhile(tmp_path: Path) -> None:
    async def steps(host: Host) -> None:
        session = await host.registry.open_session(request([host.images["a"]]))
        error = await refused(host.registry.create(host.plan("a")))
        assert (error.reason, error.values["id"]) == ("DEVICE_IN_MIGRATION", "web1")
        with pytest.raises(FailedPrecondition) as caught:
            host.registry.get_source("web1")
        assert caught.value.reason == "NOT_THE_SOURCE"
        session.abort("done", cancelled=True)
        await host.registry.create(host.plan("a"))

    trial(tmp_path, steps)


def test_sources_that_share_bytes(tmp_path: Path) -> None:
    async def steps(host: Host) -> None:
        host.images["b"].unlink()
        host.images["b"].hardlink_to(host.images["a"])
        error = await refused(host.registry.create(host.plan("x", "a", "b")))
        assert isinstance(error, InvalidArgument)
        assert error.reason == "DUPLICATE_DEVICE"
        assert host.peers == []

    trial(tmp_path, steps)


def test_only_the_latest_that_ended_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "MAX_ENDED", 3)

    async def steps(host: Host) -> None:
        registry = host.registry
        for number in range(20):
            asked = request([host.targets["c"]], migration_id=f"dead{number}")
            session = await registry.open_session(asked)
            session.abort("gone", cancelled=False)
        assert [end.id for end in registry.all()] == ["dead16", "dead17", "dead18", "dead19"]
        assert len(registry._journal.load()) == 4

    trial(tmp_path, steps)


def test_the_limit(tmp_path: Path) -> None:
    async def steps(host: Host) -> None:
        registry = host.registry
        first = await registry.create(host.plan("a"))
        session = await registry.open_session(request([host.targets["c"]]))
        for attempt in (
            registry.create(host.plan("b")),
            registry.open_session(request([host.targets["b"]], migration_id="web2")),
        ):
            error = await refused(attempt)
            assert isinstance(error, ResourceExhausted)
            assert error.reason == "TOO_MANY_MIGRATIONS"
        await first.cancel()
        await registry.create(host.plan("b"))
        session.abort("done", cancelled=True)

    trial(tmp_path, steps, max_migrations=2)


@pytest.mark.parametrize(
    ("most", "asked", "given"), [(0, 0, 0), (0, 7, 7), (5, 0, 5), (5, 7, 5), (5, 3, 3)]
)
def test_the_configured_bandwidth_holds(tmp_path: Path, most: int, asked: int, given: int) -> None:
    async def steps(host: Host) -> None:
        plan = host.plan("a", limit_bytes_per_second=asked)
        migration = await host.registry.create(plan)
        assert migration.snapshot().plan.limit_bytes_per_second == given

    trial(tmp_path, steps, bandwidth_bytes_per_second=most)


def break_open(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.images["b"].unlink()


def break_session(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.errors["open_session"] = [FailedPrecondition("TARGET_TOO_SMALL", "too small")]


def lose_answer(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session may be there: only its source knows how it is named."""
    host.errors["open_session"] = [Unavailable("PEER_LOST", "the connection was lost")]


def break_start(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    start = SourceDisk.start

    def second_fails(disk: SourceDisk) -> None:
        if disk.volume.source == str(host.images["b"]):
            raise FailedPrecondition("TRACKER_FAILED", "no")
        start(disk)

    monkeypatch.setattr(SourceDisk, "start", second_fails)


def break_choice(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(*args: object) -> None:
        raise InvalidArgument("TRACKER_UNAVAILABLE", "no")

    monkeypatch.setattr(preparation_module, "choose_scheme", choose)


@pytest.mark.parametrize(
    "breaking", [break_open, break_session, lose_answer, break_start, break_choice]
)
def test_what_fails_leaves_nothing_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    breaking: Callable[[Host, pytest.MonkeyPatch], None],
) -> None:
    async def steps(host: Host) -> None:
        breaking(host, monkeypatch)
        await refused(host.registry.create(host.plan("x", "a", "b")))
        sources = set(map(str, host.images.values()))
        assert sources.isdisjoint(descriptors())
        for peer in host.peers:
            asked = "open_session" in peer.calls
            assert peer.calls[-1] == "close"
            assert any(call.startswith("abort failed") for call in peer.calls) == asked
        assert host.registry.all() == []
        # Neither the id nor the devices are taken.
        monkeypatch.undo()
        host.errors.clear()
        await host.registry.create(host.plan("x", "a", "c"))

    trial(tmp_path, steps)


def test_a_session_that_is_refused_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No session either, whose timer would report a failure a minute later."""
    made: list[object] = []

    def taken(*args: object) -> None:
        raise FailedPrecondition("DEVICE_IN_MIGRATION", "another has it")

    async def steps(host: Host) -> None:
        registry = host.registry
        monkeypatch.setattr(registry._reservations, "take", taken)
        monkeypatch.setattr(reception_module, "TargetSession", lambda *args: made.append(args))
        error = await refused(registry.open_session(request([host.targets["b"]])))
        assert error.reason == "DEVICE_IN_MIGRATION"
        assert made == registry.all() == []
        monkeypatch.undo()
        session = await registry.open_session(request([host.targets["b"]]))
        assert registry.session(session.token) is session

    trial(tmp_path, steps)


@pytest.mark.parametrize("begun", [False, True])
def test_a_session_given_up_before_it_began_is_forgotten(tmp_path: Path, begun: bool) -> None:
    """Its source was refused: the next try may have the same id and the same devices."""

    async def steps(host: Host) -> None:
        registry, wanted = host.registry, request([host.targets["b"]])
        session = await registry.open_session(wanted)
        if begun:
            session.begin_stream()
        registry.abort_session(session.token, "no tracker", cancelled=False)
        assert session.state is State.FAILED
        assert registry.all() == ([session] if begun else [])
        if not begun:
            await registry.open_session(wanted)

    trial(tmp_path, steps)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol_version": 99}, "PROTOCOL_MISMATCH"),
        ({"migration_id": "a/b"}, "INVALID_ID"),
        ({"volumes": ()}, "NO_VOLUMES"),
        ({"secret": ""}, "BAD_SESSION"),
        ({"epoch": 0}, "BAD_SESSION"),
    ],
)
def test_sessions_that_make_no_sense(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    async def steps(host: Host) -> None:
        error = await refused(host.registry.open_session(request([host.targets["a"]], **changes)))
        assert error.reason == reason
        with pytest.raises(NotFound):
            host.registry.session("")

    trial(tmp_path, steps)


def test_nothing_begins_once_the_agent_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even what was half way when it did."""
    started, gate = threading.Event(), threading.Event()
    start = SourceDisk.start

    def slow(disk: SourceDisk) -> None:
        started.set()
        assert gate.wait(20)
        start(disk)

    monkeypatch.setattr(SourceDisk, "start", slow)

    async def main() -> None:
        host = Host(tmp_path)
        creating = asyncio.create_task(host.registry.create(host.plan("a")))
        assert await asyncio.to_thread(started.wait, 20)
        await host.registry.close()
        gate.set()
        error = await refused(creating)  # type: ignore[arg-type]
        assert (type(error), error.reason) == (Unavailable, "AGENT_STOPPED")
        assert host.peers[0].calls[-1] == "close"
        assert host.registry.all() == []
        late = await refused(host.registry.create(host.plan("b")))
        assert late.reason == "AGENT_STOPPED"
        await host.peers[0].carrier.close()

    run(main)


def test_close_ends_both_ends(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosting(tmp_path) as host:
            migration = await host.registry.create(host.plan("a"))
            session = await host.registry.open_session(request([host.targets["b"]]))
            waiting = asyncio.create_task(host.registry.wait(session.bell, session.bell.count + 9))
            await asyncio.sleep(0)
        # They go on with the next start.
        assert not migration.state.is_terminal
        assert session.state is State.PENDING
        assert {end.snapshot().role for end in host.registry.all()} == {Role.SOURCE, Role.TARGET}
        await asyncio.wait([waiting])

    run(main)


def test_watchers_are_told_of_the_stop(tmp_path: Path) -> None:
    async def main() -> None:
        async with hosting(tmp_path) as host:
            session = await host.registry.open_session(request([host.targets["b"]]))
            seen = session.bell.count
            waiting = asyncio.create_task(host.registry.wait(session.bell, seen))
            await asyncio.sleep(0)
            host.registry._closed.set()
            error = await refused(waiting)  # type: ignore[arg-type]
            assert error.reason == "AGENT_STOPPED"
            host.registry._closed.clear()
            session.bell.ring()
            await host.registry.wait(session.bell, seen)
            await until(session.bell, lambda: True)

    run(main)


@pytest.mark.parametrize("which", [0, 1], ids=["source", "target"])
@pytest.mark.parametrize(
    "spoilt",
    [{"history": []}, {"history": [{"state": "COMPLETED", "at_seconds": 1.0}]}, {"progress": 1}],
    ids=["no history", "no such history", "no progress"],
)
def test_an_agent_starts_whatever_a_record_says(
    tmp_path: Path, which: int, spoilt: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """One record that is not understood keeps no other migration from going on."""
    journal = Journal(tmp_path / "state")
    journal.save(journal_fuzz.ROLES[which], "web1", {**journal_fuzz.records()[which], **spoilt})
    journal.close()

    async def steps(host: Host) -> None:
        assert host.registry.all() == []

    trial(tmp_path, steps)
    assert "record not understood id=web1" in caplog.text
