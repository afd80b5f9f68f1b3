"""What cannot be taken up yet at an agent's start: tried again, cancelled, settled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agent.disk import SourceDisk
from agent.errors import FailedPrecondition, Unavailable, WarmsyncError
from agent.migration import Owner, Scheme
from agent.record import SourceRecord
from agent.registry import waiting as waiting_module
from agent.registry.preparation import Preparation, Reopened
from agent.registry.waiting import Waiting
from agent.source import SourceMigration
from agent.state import State
from native.blockio import BlockDevice
from tests.agent.registry.hosts import (
    CUT_OVER,
    CUTTING_OVER,
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
BUSY = Unavailable("QMP_UNREACHABLE", "QMP at /vm.sock cannot be used")


def trouble(host: Host) -> str:
    return host.registry.get("web1").snapshot().progress.trouble


class Busy:
    """The QEMU of one migration, as it is taken up: it answers, or not, or not yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: list[Exception] = []
        self.gate = threading.Event()
        self.gate.set()
        self.asked = 0
        self.opened: list[SourceDisk] = []
        reopen = Preparation.reopen

        def asked(preparation: Preparation, record: SourceRecord) -> Reopened:
            self.asked += 1
            assert self.gate.wait(20)
            if self.errors:
                raise self.errors[0]
            opened = reopen(preparation, replace(record, scheme=Scheme.SCAN))
            self.opened += opened.disks
            return opened

        monkeypatch.setattr(Preparation, "reopen", asked)

    def is_open(self) -> bool:
        return any(not is_closed(disk.device) for disk in self.opened)


def is_closed(device: BlockDevice) -> bool:
    try:
        device.fileno()
    except ValueError:
        return True
    return False


@pytest.fixture
def busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Busy:
    write_down(tmp_path, record(tmp_path, SYNCING, scheme=Scheme.QEMU))
    return Busy(monkeypatch)


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the migrations whose rests were removed from their QEMUs."""
    names: list[str] = []

    def give_back(preparation: Preparation, record: SourceRecord) -> None:
        names.append(record.plan.id)

    monkeypatch.setattr(Preparation, "give_back", give_back)
    return names


def test_a_qemu_that_cannot_be_asked_yet_ends_no_migration(tmp_path: Path, busy: Busy) -> None:
    busy.errors = [BUSY]

    async def steps(host: Host) -> None:
        registry = host.registry
        registry.start()
        await registry.first_tries()
        waiting = registry.get_source("web1")
        assert waiting.state is State.SYNCING
        assert str(BUSY) in trouble(host)
        assert waiting.snapshot().error is None
        for refusal in (
            await refused(waiting.cut_over(force=True)),
            caught(waiting.pause),
            caught(lambda: waiting.update(1, None)),
        ):
            assert refusal.reason == "NOT_TAKEN_UP"
            assert str(BUSY) in str(refusal)
        assert caught(lambda: registry.forget("web1")).reason == "NOT_ENDED"
        await until(lambda: busy.asked > 2)
        seen = waiting.bell.count
        busy.errors = []
        await registry.wait(waiting.bell, seen)
        taken_up = registry.latest(waiting)
        assert isinstance(taken_up, SourceMigration)
        assert taken_up.snapshot().progress.resumes == 1
        await taken_up.cancel()

    trial(tmp_path, steps)


def test_a_qemu_that_does_not_answer_keeps_the_agent_from_nothing(
    tmp_path: Path, busy: Busy
) -> None:
    busy.gate.clear()

    async def steps(host: Host) -> None:
        host.registry.start()
        await until(lambda: busy.asked == 1)
        assert "being opened" in str(caught(host.registry.get_source("web1").pause))
        await host.registry.create(host.plan("b"))
        error = await refused(host.registry.create(host.plan("x", "a")))
        assert error.reason == "DEVICE_IN_MIGRATION"
        busy.gate.set()
        await until(lambda: isinstance(host.registry.get("web1"), SourceMigration))

    trial(tmp_path, steps)


def test_what_another_try_does_not_mend_ends_it(tmp_path: Path, busy: Busy) -> None:
    busy.errors = [FailedPrecondition("QEMU_DISK_READ_ONLY", "read-only")]

    async def steps(host: Host) -> None:
        host.registry.start()
        await until(lambda: host.registry.get("web1").state is State.FAILED)
        await until(lambda: not written(tmp_path).owed)
        assert host.peers[0].calls[0] == "abort failed: read-only"
        assert host.registry.totals().migrations_failed == 1
        assert busy.asked == 1

    trial(tmp_path, steps)


@pytest.mark.parametrize("answering", [False, True], ids=["silent", "in the middle of a try"])
def test_what_waits_can_be_cancelled(tmp_path: Path, busy: Busy, answering: bool) -> None:
    """What a try under way has opened is given back; the target is told."""
    busy.errors = [] if answering else [BUSY]
    busy.gate.clear()

    async def steps(host: Host) -> None:
        host.registry.start()
        await until(lambda: busy.asked == 1)
        asyncio.get_running_loop().call_later(0.1, busy.gate.set)
        await host.registry.get_source("web1").cancel()
        await until(lambda: not written(tmp_path).owed)
        assert host.peers[0].calls[0].startswith("abort cancelled")
        assert host.registry.get("web1").state is State.CANCELLED
        assert bool(busy.opened) is answering
        assert not busy.is_open()
        assert busy.asked == 1
        host.registry.forget("web1")

    trial(tmp_path, steps)


def test_what_a_slow_try_opens_after_the_cancel_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: Busy, given_back: list[str]
) -> None:
    """And nothing of it before: bitmaps that are removed under it would be made again."""
    monkeypatch.setattr(waiting_module, "TRY_SECONDS", 0.1)
    busy.gate.clear()

    async def steps(host: Host) -> None:
        host.registry.start()
        await until(lambda: busy.asked == 1)
        await host.registry.get_source("web1").cancel()
        assert host.registry.get("web1").state is State.CANCELLED
        assert given_back == []
        assert caught(lambda: host.registry.forget("web1")).reason == "NOT_ENDED"
        busy.gate.set()
        await until(lambda: bool(busy.opened) and not busy.is_open())
        one = host.registry.get("web1")
        assert isinstance(one, waiting_module.Waiting)
        await until(lambda: not one.is_giving_up)
        host.registry.forget("web1")

    trial(tmp_path, steps)


def test_a_slow_try_that_fails_after_the_cancel_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: Busy, given_back: list[str]
) -> None:
    """Also if nobody waits for the cancel any more."""
    busy.gate.clear()
    busy.errors = [BUSY]

    async def steps(host: Host) -> None:
        host.registry.start()
        await until(lambda: busy.asked == 1)
        cancelling = asyncio.create_task(host.registry.get_source("web1").cancel())
        await asyncio.sleep(0.1)
        cancelling.cancel()
        await asyncio.wait([cancelling])
        assert given_back == []
        busy.gate.set()
        await until(lambda: given_back == ["web1"])

    trial(tmp_path, steps)


def test_what_a_try_has_opened_is_let_go_when_the_agent_stops(tmp_path: Path, busy: Busy) -> None:
    busy.gate.clear()

    async def steps(host: Host) -> None:
        host.registry.start()
        await until(lambda: busy.asked == 1)
        asyncio.get_running_loop().call_later(0.1, busy.gate.set)

    trial(tmp_path, steps)
    assert busy.opened
    assert not busy.is_open()
    assert written(tmp_path).history[-1].state is State.SYNCING


@pytest.mark.parametrize("owner", [Owner.SOURCE, Owner.TARGET])
def test_what_waits_can_be_settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Owner, given_back: list[str]
) -> None:
    """No try that is under way puts the fence up behind the person's back; nothing is left."""
    pytest.importorskip("native.nbd", reason="built without libnbd")
    write_down(tmp_path, record(tmp_path, CUT_OVER, scheme=Scheme.QEMU, releasing=True))
    busy = Busy(monkeypatch)
    busy.gate.clear()

    async def steps(host: Host) -> None:
        host.errors["resume"] = [Unavailable("PEER_UNREACHABLE", "away")]
        host.registry.start()
        await until(lambda: busy.asked == 1)
        asyncio.get_running_loop().call_later(0.1, busy.gate.set)
        settled = await host.registry.settle("web1", owner)
        assert settled.state.is_terminal
        assert given_back == ["web1"]
        assert host.registry.get("web1") is settled
        await asyncio.sleep(0.2)
        assert is_fenced(host.images["a"]) is (owner is Owner.TARGET)
        assert not busy.is_open()
        assert busy.asked == 1

    trial(tmp_path, steps)


def test_what_is_settled_and_still_fenced_keeps_what_finds_its_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_back: list[str]
) -> None:
    pytest.importorskip("native.nbd", reason="built without libnbd")
    states = CUT_OVER
    write_down(tmp_path, record(tmp_path, states, "late", scheme=Scheme.QEMU, releasing=True))

    async def steps(host: Host) -> None:
        host.errors["resume"] = [Unavailable("PEER_UNREACHABLE", "away")] * 2
        host.registry.start()
        error = await refused(host.registry.settle("web1", Owner.SOURCE))
        assert error.reason == "STILL_FENCED"
        assert given_back == []
        host.images["c"].rename(tmp_path / "late")
        await host.registry.settle("web1", Owner.SOURCE)
        assert given_back == ["web1"]

    trial(tmp_path, steps)


def test_a_try_that_does_not_end_is_not_settled_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("native.nbd", reason="built without libnbd")
    monkeypatch.setattr(waiting_module, "TRY_SECONDS", 0.1)
    write_down(tmp_path, record(tmp_path, CUT_OVER, scheme=Scheme.QEMU, releasing=True))
    busy = Busy(monkeypatch)
    busy.gate.clear()

    async def steps(host: Host) -> None:
        host.registry.start()
        await until(lambda: busy.asked == 1)
        error = await refused(host.registry.settle("web1", Owner.SOURCE))
        assert error.reason == "NOT_TAKEN_UP"
        busy.gate.set()
        await until(lambda: isinstance(host.registry.get("web1"), SourceMigration))
        assert busy.asked == 1

    trial(tmp_path, steps)


def test_what_was_taken_up_meanwhile_settles_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing old is written over what its link has written down since."""
    pytest.importorskip("native.nbd", reason="built without libnbd")
    write_down(tmp_path, record(tmp_path, CUTTING_OVER, scheme=Scheme.QEMU, releasing=True))
    busy = Busy(monkeypatch)
    busy.errors = [BUSY]

    async def steps(host: Host) -> None:
        for call in ("resume", "unread", "abort"):
            host.errors[call] = [Unavailable("PEER_UNREACHABLE", "away")] * 100
        registry = host.registry
        registry.start()
        await registry.first_tries()
        waiting = registry.get("web1")
        assert isinstance(waiting, Waiting)
        async with waiting.settling:  # as somebody else does, who is refused in the end
            settling = asyncio.create_task(registry.settle("web1", Owner.SOURCE))
            busy.errors = []
            await until(lambda: isinstance(registry.get("web1"), SourceMigration))
            await until(lambda: any("resume 4" in peer.calls for peer in host.peers))
        settled = await settling
        assert settled is registry.get("web1")
        assert isinstance(settled, SourceMigration)
        assert settled.state is State.ROLLED_BACK
        assert not is_fenced(host.images["a"])
        asked = [call for peer in host.peers for call in peer.calls if call.startswith("resume")]
        assert len(asked) == len(set(asked)), "an epoch is answered once only"

    trial(tmp_path, steps)
    assert written(tmp_path).history[-1].state is State.ROLLED_BACK


def caught(call: Callable[[], object]) -> WarmsyncError:
    with pytest.raises(WarmsyncError) as error:
        call()
    return error.value
