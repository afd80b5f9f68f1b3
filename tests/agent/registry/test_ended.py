"""What has ended: how long it is remembered, its target told, its fence put up late."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from agent import registry as registry_module
from agent.errors import FailedPrecondition, Unavailable, WarmsyncError, agent_stopped
from agent.journal import Journal
from agent.migration import Owner
from agent.record import SourceRecord
from agent.registry import ended as ended_module
from agent.registry.ended import Ended
from agent.registry.fence import Fence
from agent.registry.preparation import Preparation
from agent.state import State
from tests.agent.carriers.rig import request
from tests.agent.registry.hosts import (
    CUT_OVER,
    CUTTING_OVER,
    OWNER_UNKNOWN,
    SYNCING,
    Host,
    is_fenced,
    named,
    record,
    refused,
    trial,
    until,
    write_down,
    written,
)

pytestmark = pytest.mark.usefixtures("soon")
AWAY = Unavailable("PEER_UNREACHABLE", "away")


async def receive(host: Host, *names: str) -> None:
    """Let sessions begin and end; what is too much is forgotten."""
    for name in names:
        asked = request([host.targets["c"]], migration_id=name)
        (await host.registry.open_session(asked)).abort("gone", cancelled=False)


def known(host: Host) -> list[str]:
    return [end.id for end in host.registry.all()]


def test_what_tells_of_a_fence_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many end after it: after a reboot nothing else keeps the old VM from writing."""
    monkeypatch.setattr(registry_module, "MAX_ENDED", 1)
    failed, cancelled = (*CUTTING_OVER, State.FAILED), (*CUTTING_OVER, State.CANCELLED)
    write_down(
        tmp_path,
        record(tmp_path, failed, "a", releasing=True, error=OWNER_UNKNOWN),
        named("web2", record(tmp_path, cancelled, "late", releasing=True, owed=True)),
        named("web3", record(tmp_path, (*CUT_OVER, State.COMPLETED), "b", releasing=True)),
    )

    async def steps(host: Host) -> None:
        host.registry.start()
        await receive(host, "x1", "x2", "x3")
        assert known(host) == ["web1", "web2", "x2", "x3"]

    trial(tmp_path, steps)
    (tmp_path / "a").chmod(0o644)  # as after a reboot of a host whose disk is a device

    async def again(host: Host) -> None:
        assert is_fenced(host.images["a"])
        host.errors["resume"] = [AWAY]
        await host.registry.settle("web1", Owner.TARGET)
        await receive(host, "x4", "x5")
        assert known(host) == ["web2", "x4", "x5"]

    trial(tmp_path, again)


def test_what_its_target_is_told_of_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would tell it again; and a late answer would write down what was forgotten."""
    monkeypatch.setattr(registry_module, "MAX_ENDED", 0)
    write_down(tmp_path, record(tmp_path, (*SYNCING, State.CANCELLED), owed=True))

    async def steps(host: Host) -> None:
        gate = host.gates["abort"] = asyncio.Event()
        host.registry.start()
        await until(lambda: bool(host.peers) and bool(host.peers[0].calls))
        await receive(host, "x1")
        assert known(host) == ["web1", "x1"]
        with pytest.raises(FailedPrecondition, match="delete it again in a moment"):
            host.registry.forget("web1")
        gate.set()
        end = cast(Ended, host.registry.get("web1"))
        await until(lambda: not end.is_held)
        host.registry.forget("web1")
        assert known(host) == ["x1"]

    trial(tmp_path, steps)
    journal = Journal(tmp_path / "state")
    assert [name for _, name, _ in journal.load()] == ["x1"]
    journal.close()


def test_what_is_settled_while_its_target_is_told_stays_so(tmp_path: Path) -> None:
    states = (*CUTTING_OVER, State.CANCELLED)
    write_down(tmp_path, record(tmp_path, states, "late", releasing=True, owed=True))

    async def steps(host: Host) -> None:
        gate = host.gates["abort"] = asyncio.Event()
        host.registry.start()
        await until(lambda: bool(host.peers) and bool(host.peers[0].calls))
        host.images["c"].rename(tmp_path / "late")
        await host.registry.settle("web1", Owner.SOURCE)
        gate.set()
        await until(lambda: host.peers[0].calls[-1] == "close")
        assert not written(tmp_path).owed
        assert not written(tmp_path).releasing

    trial(tmp_path, steps)


def test_what_the_source_owns_is_not_to_be_fenced(tmp_path: Path) -> None:
    states = (*CUTTING_OVER, State.FAILED)
    write_down(tmp_path, record(tmp_path, states, "late", releasing=True, error=OWNER_UNKNOWN))

    async def steps(host: Host) -> None:
        registry = host.registry
        host.errors["resume"] = [AWAY]
        registry.start()
        assert "is not fenced" in str(registry.get("web1").snapshot().refusal)
        error = await refused(registry.settle("web1", Owner.SOURCE))
        assert registry.get("web1").snapshot().refusal is error
        late = host.images["c"].rename(tmp_path / "late")
        await registry.settle("web1", Owner.SOURCE)
        assert registry.get("web1").snapshot().refusal is None
        assert not is_fenced(late)

    trial(tmp_path, steps)


class SlowFence:
    """A disk that answers a try to fence it when it is let; `is_slow` from the next one on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_slow = False
        self.gate = threading.Event()
        self.asked = 0
        open_fence = Preparation.open_fence

        def opened(preparation: Preparation, record: SourceRecord, index: int) -> Any:
            if self.is_slow:
                self.asked += 1
                assert self.gate.wait(20)
            return open_fence(preparation, record, index)

        monkeypatch.setattr(Preparation, "open_fence", opened)


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlowFence:
    """Of a migration whose owner is unknown, and whose disk is not there at the start."""
    states = (*CUTTING_OVER, State.FAILED)
    write_down(tmp_path, record(tmp_path, states, "late", releasing=True, error=OWNER_UNKNOWN))
    return SlowFence(monkeypatch)


async def being_fenced(host: Host, slow: SlowFence) -> Path:
    """Return the disk, which a thread is fencing."""
    host.errors["resume"] = [AWAY]
    host.registry.start()
    slow.is_slow = True
    late = host.images["c"].rename(host.directory / "late")
    await until(lambda: slow.asked == 1)
    return late


def test_a_fence_that_is_going_up_is_waited_for_before_it_comes_down(
    tmp_path: Path, slow: SlowFence
) -> None:
    async def steps(host: Host) -> None:
        late = await being_fenced(host, slow)
        asyncio.get_running_loop().call_later(0.2, slow.gate.set)
        settled = await host.registry.settle("web1", Owner.SOURCE)
        assert settled.state is State.ROLLED_BACK
        assert settled.snapshot().refusal is None
        await asyncio.sleep(0.2)
        assert not is_fenced(late)
        assert slow.asked == 2, "once to fence it, once to lift that"

    trial(tmp_path, steps)


def test_a_fence_that_does_not_end_going_up_is_not_lifted_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: SlowFence
) -> None:
    monkeypatch.setattr(ended_module, "TRY_SECONDS", 0.1)

    async def steps(host: Host) -> None:
        registry = host.registry
        late = await being_fenced(host, slow)
        error = await refused(registry.settle("web1", Owner.SOURCE))
        assert error.reason == "SOURCE_STALLED"
        assert str(late) in str(error)
        assert registry.get("web1").state is State.FAILED
        with pytest.raises(WarmsyncError) as early:
            registry.forget("web1")
        assert early.value.reason == "NOT_ENDED"
        await asyncio.sleep(0.2)
        assert slow.asked == 1
        slow.gate.set()
        await until(lambda: is_fenced(late))
        await until(lambda: registry.get("web1").snapshot().refusal is None)
        await registry.settle("web1", Owner.SOURCE)
        assert not is_fenced(late)

    trial(tmp_path, steps)


def test_an_agent_stops_while_a_fence_goes_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: SlowFence
) -> None:
    """It goes up all the same, and complains of nothing."""
    monkeypatch.setattr(ended_module, "TRY_SECONDS", 0.1)
    put_up, failures = Fence.put_up, list[BaseException]()

    def watched(fence: Fence) -> None:
        try:
            put_up(fence)
        except BaseException as error:
            failures.append(error)
            raise

    monkeypatch.setattr(Fence, "put_up", watched)

    async def steps(host: Host) -> None:
        late = await being_fenced(host, slow)
        await host.registry.get_source("web1").close(agent_stopped())
        slow.gate.set()
        await until(lambda: is_fenced(late))

    trial(tmp_path, steps)
    assert failures == []
