"""The example's controller against an agent that only pretends: what it makes of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import grpc.aio
import pytest
from warmsync.v1 import migration_pb2 as pb
from warmsync.v1 import migration_service_pb2 as service

from agent.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable
from agent.rpc.errors import to_status
from examples.controller import controller as controller_module
from examples.controller.controller import Controller
from examples.controller.plan import Evacuation, Machine
from tests.agent.fake_agent import FakeAgent, failed, pretending
from tests.agent.messages import migration


class Taken(FakeAgent):
    """Its first id is taken, by what cannot be seen, for the first `unseen` calls."""

    def __init__(self, unseen: int) -> None:
        super().__init__()
        self.unseen = unseen
        self.ids: list[str] = []
        self.watched = [migration(state=pb.STATE_COMPLETED)]

    async def CreateMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.ids.append(request.migration_id)
        if self._is_unseen(request.migration_id):
            raise AlreadyExists("MIGRATION_EXISTS", "there is one already")
        return migration(request.migration_id)

    async def WatchMigration(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        if self._is_unseen(request.name.removeprefix("migrations/")):
            raise NotFound("MIGRATION_NOT_FOUND", f"there is no {request.name}")
        async for answer in super().WatchMigration(request, context):
            yield answer

    def _is_unseen(self, name: str) -> bool:
        return name == "evacuate-web1" and self.ids.count(name) <= self.unseen


class Remembering(FakeAgent):
    """A target that knows a migration whose source has forgotten it."""

    def __init__(self, state: pb.State, owner: pb.Owner) -> None:
        super().__init__()
        self._state = state
        self._owner = owner

    async def GetMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        known = migration(request.name.removeprefix("migrations/"), state=self._state)
        known.role, known.owner = pb.ROLE_TARGET, self._owner
        return known


class Refusing(Taken):
    """Takes no cutover: the copies are as they are, the VM is off."""

    def __init__(self, state: pb.State) -> None:
        super().__init__(0)
        self.watched = [migration(state=state)]

    async def CutOverMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise FailedPrecondition("SOURCE_UNREADABLE", "a block cannot be read")


class Undecided(FakeAgent):
    """A release is not answered: never, or until the message was told `answered` times."""

    def __init__(self, answered: int) -> None:
        super().__init__()
        self._answered = answered
        self._state = pb.STATE_CUT_OVER

    async def WatchMigration(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        while self._answered and self._state == pb.STATE_CUT_OVER:
            message = migration(state=pb.STATE_CUTTING_OVER)
            message.owner = pb.OWNER_NOBODY
            message.last_refusal.CopyFrom(to_status(FailedPrecondition("OWNER_UNKNOWN", "nobody")))
            yield service.WatchMigrationResponse(migration=message)
            await asyncio.sleep(0.02)  # it is told again with each try
            self._answered -= 1
        yield service.WatchMigrationResponse(migration=migration(state=self._state))

    async def FinishMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._state = pb.STATE_COMPLETED
        return migration(state=self._state)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "RETRY_SECONDS", 0.01)


def evacuate(
    fake: FakeAgent, *, peer: str = "there:7070", power_down: str = "true", boot: str = "true"
) -> int:
    """Evacuate one machine from an agent; returns how many were left behind."""
    machines = (Machine("web1", peer, (("/dev/a", "/dev/b"),)),)

    async def main(address: str) -> int:
        plan = Evacuation(address, (power_down,), (boot,), machines, {}, tries=2)
        async with grpc.aio.insecure_channel(address) as channel:
            return await Controller(plan, channel).evacuate()

    with pretending(fake=fake):
        return asyncio.run(asyncio.wait_for(main(fake.address), 20))


def test_what_is_still_being_created_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    """As after a restart in the middle of a slow call: a second id would find its disks taken."""
    fake = Taken(unseen=3)
    assert evacuate(fake) == 0
    assert fake.ids == ["evacuate-web1"] * 4
    said = ["web1: found under way", "web1: started", "web1: evacuated"]
    assert capsys.readouterr().out.splitlines() == said


@pytest.mark.parametrize(
    ("state", "owner", "begins"),
    [
        (pb.STATE_CANCELLED, pb.OWNER_SOURCE, True),
        (pb.STATE_COMPLETED, pb.OWNER_TARGET, False),
        (pb.STATE_CUT_OVER, pb.OWNER_TARGET, False),
        (pb.STATE_SYNCING, pb.OWNER_SOURCE, False),
    ],
    ids=["cancelled", "finished", "cut over", "syncing"],
)
def test_an_id_that_only_the_target_knows(
    state: pb.State,
    owner: pb.Owner,
    begins: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Begun anew only if the VM cannot run there: its disks would be written over."""
    monkeypatch.setattr(controller_module, "UNSEEN_SECONDS", 0.1)
    fake = Taken(unseen=10**6)
    with pretending(fake=Remembering(state, owner)) as target:
        assert evacuate(fake, peer=target.address) == (0 if begins else 1)
    assert set(fake.ids) == {"evacuate-web1", *(["evacuate-web1-2"] if begins else [])}
    if not begins:
        name = pb.State.Name(state).removeprefix("STATE_")
        said = f"LEFT BEHIND: only {target.address} knows of evacuate-web1, which is {name} there"
        assert said in capsys.readouterr().out


class Slow(Remembering):
    """A target that does not answer at first; then the migration is still being created."""

    def __init__(self) -> None:
        super().__init__(pb.STATE_PENDING, pb.OWNER_SOURCE)
        self.asked = 0

    async def GetMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.asked += 1
        if self.asked == 1:
            raise Unavailable("AGENT_STOPPED", "the agent stops")
        return await super().GetMigration(request, context)


def test_what_the_target_has_but_begun_is_still_being_created(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller_module, "UNSEEN_SECONDS", 0.0)
    fake = Taken(unseen=3)
    with pretending(fake=Slow()) as target:
        assert evacuate(fake, peer=target.address) == 0
        assert cast(Slow, target).asked == 4
    assert fake.ids == ["evacuate-web1"] * 4


def test_an_id_that_nobody_knows_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "UNSEEN_SECONDS", 0.1)
    fake = Taken(unseen=10**6)
    with pretending() as target:
        assert evacuate(fake, peer=target.address) == 1
    assert set(fake.ids) == {"evacuate-web1"}


def test_disks_that_nobody_is_known_to_own_are_left_to_a_person(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = Taken(unseen=0)
    message = failed()
    message.owner = pb.OWNER_NOBODY
    fake.watched = [message]
    assert evacuate(fake) == 1
    assert fake.ids == ["evacuate-web1"]
    assert "LEFT BEHIND: source /dev/x: check the disk" in capsys.readouterr().out


@pytest.mark.parametrize("answered", [10**6, 3], ids=["never", "in time"])
def test_a_release_that_is_not_answered_is_left_to_a_person(
    answered: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Once it is answered there is time for everything."""
    monkeypatch.setattr(controller_module, "UNKNOWN_SECONDS", 0.5)
    boot = tmp_path / "boot"
    boot.write_text("#!/bin/sh\nsleep 1\n")
    boot.chmod(0o755)
    is_left = answered > 3
    assert evacuate(Undecided(answered), boot=str(boot)) == is_left
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ("web1: LEFT BEHIND: nobody" if is_left else "web1: evacuated")


@pytest.mark.parametrize(
    ("state", "commands", "off"),
    [
        (pb.STATE_CONVERGED, {"power_down": "false"}, False),
        (pb.STATE_CONVERGED, {}, True),
        (pb.STATE_CUT_OVER, {"boot": "false"}, True),
    ],
    ids=["not powered down", "not cut over", "not booted"],
)
def test_what_is_left_behind_powered_down_is_said_to_be_off(
    state: pb.State, commands: dict[str, str], off: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evacuate(Refusing(state), **commands) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("web1: LEFT BEHIND")
    assert ("the VM is off" in last) is off
