"""Evacuates a host: moves its virtual machines elsewhere, some at once, over the public API.

It keeps no state of its own. What is to be done next follows from each migration's state, which
the agent keeps: killed and started again at any moment, it goes on. See README.md beside this file.
"""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import DEVNULL
from collections.abc import Sequence
from pathlib import Path

import grpc
import grpc.aio
from warmsync.v1 import migration_pb2 as pb
from warmsync.v1 import migration_service_pb2 as service
from warmsync.v1.migration_service_pb2_grpc import MigrationServiceStub

from examples.controller.plan import Evacuation, Machine, load

RETRY_SECONDS = 1.0
CREATE_SECONDS = 60.0
UNSEEN_SECONDS = 2 * CREATE_SECONDS
"""How long an id may be taken by a migration that is not to be seen: one is being created."""
UNKNOWN_SECONDS = 60.0
"""How long nobody may know who owns the disks before a person is asked; the agent asks on."""
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_AGAIN = (*_PASSING, grpc.StatusCode.FAILED_PRECONDITION)
_OVER = (pb.STATE_FAILED, pb.STATE_CANCELLED, pb.STATE_ROLLED_BACK)


class NeedsAPerson(Exception):  # noqa: N818 - a condition, not a mistake
    """What a controller cannot mend."""


class Controller:
    """One evacuation."""

    def __init__(self, plan: Evacuation, channel: grpc.aio.Channel) -> None:
        self._plan = plan
        self._agent = MigrationServiceStub(channel)
        self._slots = asyncio.Semaphore(plan.at_once)
        self._off: set[Machine] = set()

    async def evacuate(self) -> int:
        """Move all machines; returns how many could not be."""
        results = await asyncio.gather(*(self._try(vm) for vm in self._plan.machines))
        return results.count(False)

    async def _try(self, vm: Machine) -> bool:
        async with self._slots:
            try:
                await self._move(vm)
            except (NeedsAPerson, grpc.aio.AioRpcError) as error:
                said = error.details() if isinstance(error, grpc.aio.AioRpcError) else error
                off = " (power_down has run: the VM is off)" if vm in self._off else ""
                say(vm, f"LEFT BEHIND{off}: {said}")
                return False
            say(vm, "evacuated")
            return True

    async def _move(self, vm: Machine) -> None:
        """Begin, or find what was begun before, and drive it to its end. Again, if it failed."""
        for attempt in range(1, self._plan.tries + 1):
            name = vm.migration(attempt)
            last = await self._carry(vm, name)
            if last.state == pb.STATE_COMPLETED:
                return
            if last.owner == pb.OWNER_NOBODY:  # the target may have the disks
                raise NeedsAPerson(last.error.message)
            say(vm, f"{name} {name_of(last)} {last.error.message}")
        raise NeedsAPerson(f"{self._plan.tries} migrations failed: see the agents' logs")

    async def _carry(self, vm: Machine, name: str) -> pb.Migration:
        """Create it, or find it, and drive it to its end; return its last state.

        An id is taken before there is a migration to be seen. A call that a restart or a deadline
        has cut short goes on there, or fails and leaves the id free.
        """
        unseen_until, told = time.monotonic() + UNSEEN_SECONDS, ""
        while True:
            found = await self._create(vm, name)
            if found != told:
                say(vm, found)
            told = found
            try:
                return await self._drive(vm, name)
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.NOT_FOUND:
                    raise
            if time.monotonic() > unseen_until:
                last = await self._ask_target(vm, name)
                if last.state != pb.STATE_PENDING:  # nothing sent: it is still being created
                    return last
            await asyncio.sleep(RETRY_SECONDS)

    async def _ask_target(self, vm: Machine, name: str) -> pb.Migration:
        """Return what is left of it, of which only the target knows: the VM may run there.

        PENDING is neither: nothing was sent, and its end gives up if nobody goes on there.
        """
        request = service.GetMigrationRequest(name=f"migrations/{name}")
        async with open_channel(self._plan, vm.peer) as channel:
            while True:
                try:
                    last: pb.Migration = await MigrationServiceStub(channel).GetMigration(
                        request, timeout=CREATE_SECONDS
                    )
                    break
                except grpc.aio.AioRpcError as error:
                    if error.code() not in _PASSING:
                        raise
                say(vm, f"again: {vm.peer} does not answer")
                await asyncio.sleep(RETRY_SECONDS)
        if last.state == pb.STATE_PENDING:
            return last
        if last.state not in _OVER or last.owner != pb.OWNER_SOURCE:
            raise NeedsAPerson(
                f"only {vm.peer} knows of {name}, which is {name_of(last)} there; if the VM runs "
                "there take it off the list, else end that migration there and delete it"
            )
        return last

    async def _create(self, vm: Machine, name: str) -> str:
        """Return what there is to say of it."""
        wanted = pb.Migration(
            peer=vm.peer,
            volumes=[pb.Volume(source=source, target=target) for source, target in vm.volumes],
            max_downtime_seconds=self._plan.max_downtime_seconds,
        )
        request = service.CreateMigrationRequest(migration_id=name, migration=wanted)
        while True:
            try:
                await self._agent.CreateMigration(request, timeout=CREATE_SECONDS)
                return "started"
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.ALREADY_EXISTS:  # by us, before a restart
                    return "found under way"
                if error.code() not in _PASSING:
                    raise
                await asyncio.sleep(RETRY_SECONDS)

    async def _drive(self, vm: Machine, name: str) -> pb.Migration:
        """Do what each state asks for until the migration has ended; return its last state."""
        refusals = 0
        while True:
            try:
                last = await self._watch(vm, name)
                if last is not None:
                    return last
            except grpc.aio.AioRpcError as error:
                # The VM still wrote, say; or somebody else did something meanwhile: look again.
                refusals += error.code() == grpc.StatusCode.FAILED_PRECONDITION
                if refusals > self._plan.tries or error.code() not in _AGAIN:
                    raise
                say(vm, f"again: {error.details()}")
                await asyncio.sleep(RETRY_SECONDS)

    async def _watch(self, vm: Machine, name: str) -> pb.Migration | None:
        """Wait until there is something to do, and do it. Returns a migration that has ended."""
        request = service.WatchMigrationRequest(name=f"migrations/{name}")
        migration: pb.Migration = pb.Migration()
        try:
            async with asyncio.timeout(None) as patience:
                async for answer in self._agent.WatchMigration(request):
                    migration = answer.migration
                    if migration.state in (*_OVER, pb.STATE_COMPLETED):
                        return migration
                    if migration.state == pb.STATE_PAUSED and migration.HasField("last_refusal"):
                        raise NeedsAPerson(migration.last_refusal.message)
                    if not is_owner_unknown(migration):
                        patience.reschedule(None)
                    elif patience.when() is None:
                        patience.reschedule(asyncio.get_running_loop().time() + UNKNOWN_SECONDS)
                    if migration.state in (pb.STATE_CONVERGED, pb.STATE_CUT_OVER):
                        await self._act(vm, migration)
                        break  # what the stream holds by now is old
        except TimeoutError as error:
            raise NeedsAPerson(migration.last_refusal.message) from error
        return None

    async def _act(self, vm: Machine, migration: pb.Migration) -> None:
        """Each step may be done twice: before a restart, and after it."""
        if migration.state == pb.STATE_CONVERGED:
            say(vm, "powering down")
            await run(self._plan.power_down, vm)
            self._off.add(vm)
            request = service.CutOverMigrationRequest(name=migration.name, force=True)
            done = await self._agent.CutOverMigration(request)
            say(vm, f"cut over, downtime {done.progress.downtime_seconds:.3f} s")
        else:
            say(vm, "booting")
            self._off.add(vm)  # also if that was before a restart
            await run(self._plan.boot, vm)
            self._off.discard(vm)
            # From here on there is no way back.
            await self._agent.FinishMigration(service.FinishMigrationRequest(name=migration.name))


async def run(command: Sequence[str], vm: Machine) -> None:
    """Run a command for a machine. NeedsAPerson unless it ends well."""
    try:
        process = await asyncio.create_subprocess_exec(*command, vm.name, stdin=DEVNULL)
    except OSError as error:
        raise NeedsAPerson(f"{command[0]} cannot be run: {error.strerror}") from error
    if await process.wait():
        raise NeedsAPerson(f"{command[0]} {vm.name} ended with {process.returncode}")


def say(vm: Machine, what: str) -> None:
    """Tell on stdout what happens."""
    print(f"{vm.name}: {what}", flush=True)


def name_of(migration: pb.Migration) -> str:
    """Return "FAILED", say."""
    return pb.State.Name(migration.state).removeprefix("STATE_")


def is_owner_unknown(migration: pb.Migration) -> bool:
    """Return whether a release was never answered: the target has the disks, or has not."""
    refused = migration.state == pb.STATE_CUTTING_OVER and migration.HasField("last_refusal")
    return refused and migration.owner == pb.OWNER_NOBODY


def open_channel(plan: Evacuation, address: str) -> grpc.aio.Channel:
    """Return a channel to an agent."""
    if not plan.tls:
        return grpc.aio.insecure_channel(address)
    key, cert, ca = (Path(plan.tls[name]).read_bytes() for name in ("key", "cert", "ca"))
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert))


async def main(path: str) -> int:
    """Evacuate as a file says; returns the exit code."""
    plan = load(Path(path))
    async with open_channel(plan, plan.source) as channel:
        return 1 if await Controller(plan, channel).evacuate() else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m examples.controller.controller FILE")
    sys.exit(asyncio.run(main(sys.argv[1])))
