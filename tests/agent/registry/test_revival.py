"""An agent's start: fences first, and ends that were interrupted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent import disk as disk_module
from agent.errors import FailedPrecondition, Unavailable, WarmsyncError
from agent.migration import Owner, Plan, Progress, Scheme, Volume
from agent.qemu.note import Note, write_note
from agent.record import TargetRecord
from agent.source import SourceMigration
from agent.state import Entry, State
from agent.store import Store
from tests.agent.carriers.rig import SIZE
from tests.agent.registry.hosts import (
    CUT_OVER,
    CUTTING_OVER,
    OWNER_UNKNOWN,
    SYNCING,
    Host,
    is_fenced,
    record,
    refused,
    trial,
    until,
    write_down,
    written,
)

pytestmark = pytest.mark.usefixtures("soon")


@pytest.mark.parametrize(
    ("states", "changes"),
    [
        (CUT_OVER, {"releasing": True}),
        (CUTTING_OVER, {"releasing": True}),
        ((*CUTTING_OVER, State.FAILED), {"releasing": True, "error": OWNER_UNKNOWN}),
    ],
    ids=["cut over", "releasing", "owner unknown"],
)
def test_each_volume_is_fenced_whatever_is_wrong_with_another(
    tmp_path: Path, states: tuple[State, ...], changes: dict[str, Any]
) -> None:
    """The first is there late, as a volume group may be; then it is fenced too."""
    write_down(tmp_path, record(tmp_path, states, "late", "b", **changes))

    async def steps(host: Host) -> None:
        assert is_fenced(host.images["b"])
        shown = host.registry.get("web1").snapshot()
        assert shown.owner is not Owner.SOURCE
        assert "late is not fenced" in f"{shown.refusal} {shown.progress.trouble}"
        away = Unavailable("PEER_UNREACHABLE", "away")
        host.errors["resume"] = [away] * 1000  # else the fence comes down again at once
        host.registry.start()
        late = host.images["c"].rename(tmp_path / "late")
        await until(lambda: is_fenced(late))
        await until(lambda: "not fenced" not in f"{host.registry.get('web1').snapshot()}")

    trial(tmp_path, steps)


@pytest.mark.parametrize("reason", ["version", "disk"])
def test_what_a_person_has_decided_since_is_not_fenced(tmp_path: Path, reason: str) -> None:
    """Agents of before had the fence lifted by hand; or the disk is migrated once more."""
    states = (*CUTTING_OVER, State.FAILED)
    unknown = record(tmp_path, states, releasing=True, error=OWNER_UNKNOWN)
    records = [replace(unknown, nameplates=()) if reason == "version" else unknown]
    if reason == "disk":
        later = record(tmp_path, SYNCING)
        history = tuple(replace(entry, at_seconds=time.time() + 60) for entry in later.history)
        records.append(replace(later, plan=replace(later.plan, id="web2"), history=history))
    write_down(tmp_path, *records)

    async def steps(host: Host) -> None:
        host.registry.start()
        assert not is_fenced(host.images["a"])
        assert host.registry.get("web1").snapshot().owner is Owner.NOBODY

    trial(tmp_path, steps)


def test_a_fence_of_long_ago_keeps_none_from_being_lifted(tmp_path: Path) -> None:
    """The disk was handed over once, and has another VM since."""
    (tmp_path / "a").touch(0o444)
    old = record(tmp_path, (*CUT_OVER, State.COMPLETED), releasing=True)
    history = tuple(replace(entry, at_seconds=1.0) for entry in old.history)
    old = replace(old, plan=replace(old.plan, id="web0"), history=history)
    states = (*CUTTING_OVER, State.CANCELLED)
    write_down(tmp_path, old, record(tmp_path, states, releasing=True, owed=True))

    async def steps(host: Host) -> None:
        host.registry.start()
        assert not is_fenced(host.images["a"])

    trial(tmp_path, steps)


@pytest.mark.parametrize("states", [CUT_OVER, SYNCING], ids=["cut over", "syncing"])
@pytest.mark.parametrize("same", [True, False])
def test_a_disk_that_has_the_name_of_another_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: tuple[State, ...], same: bool
) -> None:
    """As after a reboot at which two names were swapped: nobody asked for that one to be moved."""
    monkeypatch.setattr(disk_module, "nameplate", lambda device: "serial=B")
    known = ("serial=B" if same else "serial=A",)
    write_down(tmp_path, record(tmp_path, states, nameplates=known, releasing=states is CUT_OVER))

    async def steps(host: Host) -> None:
        host.registry.start()
        shown = host.registry.get("web1").snapshot()
        assert is_fenced(host.images["a"]) is (same and states is CUT_OVER)
        told = f"{shown.error} {shown.refusal} {shown.progress.trouble}"
        assert ("a is another disk" in told) is not same
        assert (shown.state is State.FAILED) is (states is SYNCING and not same)

    trial(tmp_path, steps)


def test_what_was_fenced_late_can_be_finished_and_taken_back(tmp_path: Path) -> None:
    write_down(tmp_path, record(tmp_path, CUT_OVER, "late", releasing=True))

    async def steps(host: Host) -> None:
        registry = host.registry
        registry.start()
        waiting = registry.get_source("web1")
        for command in (waiting.finish, waiting.roll_back):
            assert (await refused(command())).reason == "NOT_TAKEN_UP"
        assert (await refused(waiting.cancel())).reason == "ILLEGAL_TRANSITION"
        late = host.images["c"].rename(tmp_path / "late")
        await until(lambda: isinstance(registry.get("web1"), SourceMigration))
        assert registry.latest(waiting) is registry.get("web1")
        assert is_fenced(late)
        await registry.get_source("web1").roll_back()
        assert not is_fenced(late)

    trial(tmp_path, steps)


@pytest.mark.parametrize(
    ("end", "changes"),
    [
        (State.FAILED, {"releasing": True, "error": OWNER_UNKNOWN}),
        (State.CANCELLED, {"releasing": True, "owed": True}),
        (State.CANCELLED, {"releasing": False, "owed": True}),
        (State.COMPLETED, {"releasing": True}),
    ],
    ids=["owner unknown", "still fenced", "cancelled", "completed"],
)
def test_a_fence_is_found_at_the_start_after_the_next(
    tmp_path: Path, end: State, changes: dict[str, Any]
) -> None:
    """Its image is known by the note, not by the name that it was given with."""
    pytest.importorskip("native.nbd", reason="built without libnbd")
    states = (*CUT_OVER, end) if end is State.COMPLETED else (*CUTTING_OVER, end)
    one = record(tmp_path, states, "vm", scheme=Scheme.QEMU, **changes)
    write_down(tmp_path, one)
    note = tmp_path / "state" / "volumes" / "web1-0.qemu"
    image = tmp_path / "image"  # not there yet
    write_note(note, Note("/no.sock", "disk", "raw", str(image)))
    stays = changes["releasing"] and end is not State.COMPLETED

    async def steps(host: Host) -> None:
        host.registry.start()
        await asyncio.sleep(0.1)
        await until(lambda: note.exists() is stays)

    trial(tmp_path, steps)
    assert note.exists() is stays
    if end is not State.FAILED:
        return
    image.write_bytes(bytes(SIZE))

    async def again(host: Host) -> None:
        assert is_fenced(image)

    trial(tmp_path, again)


def test_what_is_no_more_to_be_remembered_is_no_more_fenced(tmp_path: Path) -> None:
    states = (*CUTTING_OVER, State.FAILED)
    write_down(tmp_path, record(tmp_path, states, "late", releasing=True, error=OWNER_UNKNOWN))

    async def steps(host: Host) -> None:
        host.registry.start()
        host.registry.forget("web1")
        late = host.images["c"].rename(tmp_path / "late")
        await asyncio.sleep(0.3)
        assert not is_fenced(late)

    trial(tmp_path, steps)


def test_a_target_that_cannot_be_found_again_keeps_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its room in the state directory is gone; the sources are fenced before."""
    now = time.time()
    plan = Plan("web2", "", (Volume("/dev/x", str(tmp_path / "b"), SIZE, 65536),))
    history = tuple(Entry(state, now) for state in SYNCING)
    target = TargetRecord(plan, "q" * 32, 1, history, 1, Progress(), boot_id="an earlier boot")
    write_down(tmp_path, record(tmp_path, CUT_OVER, releasing=True), target)
    monkeypatch.setattr(Path, "open", fail_below(tmp_path / "state" / "targets"))
    fenced: list[bool] = []
    make = Store.make

    def watched(store: Store, name: str, size_bytes: int) -> Any:
        fenced.append(is_fenced(tmp_path / "a"))
        return make(store, name, size_bytes)

    monkeypatch.setattr(Store, "make", watched)

    async def steps(host: Host) -> None:
        assert fenced
        assert all(fenced)
        assert host.registry.get("web1").state is State.CUT_OVER
        session = host.registry.get("web2")
        assert session.state is State.FAILED
        error = session.snapshot().error
        assert error is not None
        assert error.reason == "STATE_DIR_FULL"

    trial(tmp_path, steps)


def test_an_error_of_the_host_at_one_record_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Plan("web2", "", (Volume("/dev/x", str(tmp_path / "b"), SIZE, 65536),))
    history = (Entry(State.PENDING, time.time()),)
    target = TargetRecord(plan, "q" * 32, 1, history, 0, Progress())
    write_down(tmp_path, record(tmp_path, CUT_OVER, releasing=True), target)

    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("agent.registry.reception.Reception.restore", fail)

    async def steps(host: Host) -> None:
        assert [end.id for end in host.registry.all()] == ["web1"]

    trial(tmp_path, steps)
    assert "session not found again id=web2" in caplog.text


def fail_below(directory: Path) -> Callable[..., Any]:
    opening = Path.open

    def open_(path: Path, mode: str = "r", *args: Any, **named: Any) -> Any:
        if path.parent == directory and "w" in mode:
            raise OSError(28, "No space left on device")
        return opening(path, mode, *args, **named)

    return open_


GIVEN_UP = [
    (State.CANCELLED, None, "abort cancelled: "),
    (State.FAILED, FailedPrecondition("SOURCE_SIZE_CHANGED", "other size"), "abort failed: "),
]


@pytest.mark.parametrize(("state", "error", "told"), GIVEN_UP, ids=["cancelled", "failed"])
def test_an_end_that_was_interrupted_is_brought_to_its_end(
    tmp_path: Path, state: State, error: WarmsyncError | None, told: str
) -> None:
    """Killed between what it wrote down and the fence: that comes down, the target is let go."""
    states = (*CUTTING_OVER, state)
    write_down(tmp_path, record(tmp_path, states, releasing=True, error=error, owed=True))

    (tmp_path / "a").touch(0o444)

    async def steps(host: Host) -> None:
        host.registry.start()
        assert not is_fenced(host.images["a"])
        await until(lambda: any(call.startswith(told) for p in host.peers for call in p.calls))
        await until(lambda: not written(tmp_path).owed)
        assert not written(tmp_path).releasing
        assert host.registry.get("web1").snapshot().owner is Owner.SOURCE
        assert host.registry.totals().migrations_failed == 0, "counted when it was written down"

    trial(tmp_path, steps)

    async def once(host: Host) -> None:
        host.registry.start()
        await asyncio.sleep(0.1)
        assert host.peers == []

    trial(tmp_path, once)


def test_an_end_that_was_not_told_is_told_at_the_next_start(tmp_path: Path) -> None:
    write_down(tmp_path, record(tmp_path, (*SYNCING, State.CANCELLED), owed=True))

    async def away(host: Host) -> None:
        host.errors["abort"] = [Unavailable("PEER_UNREACHABLE", "away")]
        host.registry.start()
        await until(lambda: bool(host.peers) and host.peers[0].calls[-1] == "close")

    trial(tmp_path, away)
    assert written(tmp_path).owed

    async def there(host: Host) -> None:
        host.registry.start()
        await until(lambda: not written(tmp_path).owed)

    trial(tmp_path, there)


@pytest.mark.parametrize("state", [State.CUT_OVER, State.COMPLETED])
def test_no_fence_is_lifted_that_is_up_for_another(tmp_path: Path, state: State) -> None:
    (tmp_path / "a").touch(0o444)
    one = record(tmp_path, (*CUTTING_OVER, State.CANCELLED), releasing=True, owed=True)
    states = CUT_OVER if state is State.CUT_OVER else (*CUT_OVER, state)
    other = record(tmp_path, states, releasing=True)
    write_down(tmp_path, one, replace(other, plan=replace(other.plan, id="web0")))

    async def steps(host: Host) -> None:
        host.registry.start()
        assert is_fenced(host.images["a"])

    trial(tmp_path, steps)


@pytest.mark.parametrize("mend", ["settled", "started again"])
def test_a_fence_that_cannot_be_lifted_is_told(tmp_path: Path, mend: str) -> None:
    states = (*CUTTING_OVER, State.CANCELLED)
    write_down(tmp_path, record(tmp_path, states, "late", releasing=True, owed=True))

    def late() -> Path:
        path = tmp_path / "late"
        path.write_bytes(bytes(SIZE))
        path.chmod(0o444)
        return path

    async def steps(host: Host) -> None:
        host.registry.start()
        shown = host.registry.get("web1").snapshot()
        assert (shown.error and shown.error.reason) == "STILL_FENCED"
        await until(lambda: bool(host.peers) and host.peers[0].calls[-1] == "close")
        if mend == "settled":
            there = late()
            await host.registry.settle("web1", Owner.SOURCE)
            assert host.registry.get("web1").snapshot().error is None
            assert not is_fenced(there)

    trial(tmp_path, steps)
    assert written(tmp_path).releasing is (mend != "settled")
    if mend == "settled":
        return
    assert written(tmp_path).owed
    there = late()

    async def again(host: Host) -> None:
        host.registry.start()
        assert not is_fenced(there)
        await until(lambda: not written(tmp_path).owed)

    trial(tmp_path, again)
    assert not written(tmp_path).releasing
