"""Watching a migration until it is where the caller wants it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

import grpc.aio
from rich.console import Console
from warmsync.v1 import migration_pb2 as pb
from warmsync.v1 import migration_service_pb2 as service_pb
from warmsync.v1.migration_service_pb2_grpc import MigrationServiceStub

from agent.cli.failure import INTERRUPTED, TIMED_OUT, CommandFailed
from agent.display import open_display
from agent.errors import Cancelled, FailedPrecondition, Unavailable, WarmsyncError
from agent.rpc.errors import from_status
from agent.units import format_seconds
from agent.view import describe, migration_id, state_name

# Level-triggered: CONVERGED itself may be skipped.
CONVERGED = frozenset({pb.STATE_CONVERGED, pb.STATE_CUTTING_OVER, pb.STATE_CUT_OVER})
HANDED_OVER = frozenset({pb.STATE_CUT_OVER, pb.STATE_COMPLETED})
ENDED = frozenset({pb.STATE_FAILED, pb.STATE_CANCELLED, pb.STATE_ROLLED_BACK, pb.STATE_COMPLETED})


def is_handed_over(migration: pb.Migration) -> bool:
    """Return whether a cutover that the agents do by themselves is done, boot hook and all."""
    done = migration.cutover_step in (pb.CUTOVER_STEP_DONE, pb.CUTOVER_STEP_UNSPECIFIED)
    return migration.state in HANDED_OVER and done


async def watch(
    channel: grpc.aio.Channel, name: str, show: Callable[[pb.Migration], None]
) -> pb.Migration:
    """Show every state until the migration has ended; return the last."""
    newest: pb.Migration | None = None
    stub = MigrationServiceStub(channel)
    async for message in stub.WatchMigration(service_pb.WatchMigrationRequest(name=name)):
        newest = message.migration
        show(newest)
    return _present(newest, name)


async def wait_for(
    channel: grpc.aio.Channel,
    migration: pb.Migration,
    wanted: Collection[int] | Callable[[pb.Migration], bool],
    timeout_seconds: float | None,
) -> pb.Migration:
    """Show progress on stderr until the migration is in one of the states `wanted`, or that holds.

    CommandFailed if it ends otherwise, or (exit code 3) if the time is over: it goes on then.
    """
    newest: pb.Migration = migration
    holds = wanted if callable(wanted) else lambda now: now.state in wanted
    stub = MigrationServiceStub(channel)
    with open_display(Console(stderr=True)) as display:
        try:
            async with asyncio.timeout(timeout_seconds):
                request = service_pb.WatchMigrationRequest(name=migration.name)
                async for message in stub.WatchMigration(request):
                    newest = message.migration
                    display.update(newest)
                    if holds(newest):
                        return newest
                    if newest.state in ENDED or _needs_a_person(newest):
                        break
        except TimeoutError as error:
            raise _timed_out(newest, timeout_seconds) from error
    raise CommandFailed(ending(newest), describe(newest))


def ending(migration: pb.Migration) -> WarmsyncError:
    """Return why a migration that has ended did not come to where it should."""
    if migration.HasField("error"):
        return from_status(migration.error)
    if _needs_a_person(migration):
        return from_status(migration.last_refusal)
    name, state = migration_id(migration), state_name(migration.state)
    if migration.state in ENDED:
        message = f"migration {name} ended in state {state}: start another one"
        return FailedPrecondition(f"MIGRATION_{state}", message, id=name, state=state)
    message = f"the agent stopped reporting on migration {name}: see `warmsync show {name}`"
    return Unavailable("WATCH_ENDED", message, id=name, state=state)


def _needs_a_person(migration: pb.Migration) -> bool:
    """Return whether it has stopped by itself, for a reason: it waits for a mend."""
    stopped = migration.cutover_step == pb.CUTOVER_STEP_STOPPED
    return (stopped or migration.state == pb.STATE_PAUSED) and migration.HasField("last_refusal")


def goes_on(name: str) -> str:
    """Return the sentence for a migration that is left alone."""
    return (
        f"migration {name} goes on: see `warmsync watch {name}`, stop it with "
        f"`warmsync cancel {name}`"
    )


def interrupted(name: str) -> CommandFailed:
    """Return how a command ends that waits for a migration when Ctrl-C is pressed."""
    if not name:
        message = "interrupted before the agent answered: see `warmsync list`"
        return CommandFailed(Cancelled("INTERRUPTED", message), code=INTERRUPTED)
    error = Cancelled("INTERRUPTED", f"interrupted; {goes_on(name)}", id=name)
    return CommandFailed(error, {"id": name}, INTERRUPTED)


def _timed_out(migration: pb.Migration, timeout_seconds: float | None) -> CommandFailed:
    name = migration_id(migration)
    waited = format_seconds(timeout_seconds or 0)
    message = f"not there within {waited}; {goes_on(name)}"
    return CommandFailed(Unavailable("TIMED_OUT", message, id=name), describe(migration), TIMED_OUT)


def _present(migration: pb.Migration | None, name: str) -> pb.Migration:
    if migration is None:
        message = f"the agent reported nothing about {name}: look into its log"
        raise Unavailable("WATCH_ENDED", message, name=name)
    return migration
