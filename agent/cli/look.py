"""list, show, watch, verify: commands that change nothing."""

from __future__ import annotations

import json
from typing import Any

import click
import grpc.aio
from rich.console import Console
from warmsync.v1 import migration_pb2 as pb
from warmsync.v1 import migration_service_pb2 as service_pb
from warmsync.v1.migration_service_pb2_grpc import MigrationServiceStub

from agent.cli.connection import DEADLINE_SECONDS, Agent, agent_options
from agent.cli.failure import CommandFailed
from agent.cli.types import NAME
from agent.cli.waiting import ending, interrupted, watch
from agent.display import ShareDisplay, open_display
from agent.errors import DataLoss, Unavailable
from agent.units import format_bytes
from agent.view import describe, page, table

PAGE_SIZE = 1000


@click.command("list")
@agent_options
def list_migrations(agent: Agent) -> None:
    """List the agent's migrations."""

    async def work(channel: grpc.aio.Channel) -> list[pb.Migration]:
        stub, found, token = MigrationServiceStub(channel), [], ""
        while True:
            request = service_pb.ListMigrationsRequest(page_size=PAGE_SIZE, page_token=token)
            answer = await stub.ListMigrations(request, timeout=DEADLINE_SECONDS)
            found += answer.migrations
            token = answer.next_page_token
            if not token:
                return found

    migrations = agent.run(work)
    if agent.json:
        click.echo(json.dumps({"migrations": [describe(migration) for migration in migrations]}))
    elif migrations:
        click.echo(table(migrations))
    else:
        click.echo("no migrations", err=True)


@click.command()
@agent_options
@click.argument("name", type=NAME, metavar="ID")
def show(agent: Agent, name: str) -> None:
    """Show a migration."""

    async def work(channel: grpc.aio.Channel) -> pb.Migration:
        request = service_pb.GetMigrationRequest(name=name)
        answer: pb.Migration = await MigrationServiceStub(channel).GetMigration(
            request, timeout=DEADLINE_SECONDS
        )
        return answer

    migration = agent.run(work)
    click.echo(json.dumps(describe(migration)) if agent.json else page(migration))


@click.command("watch")
@agent_options
@click.argument("name", type=NAME, metavar="ID")
def watch_migration(agent: Agent, name: str) -> None:
    """Follow a migration.

    Until it has ended; with --json an object a line.
    """

    async def work(channel: grpc.aio.Channel) -> pb.Migration:
        if agent.json:
            return await watch(channel, name, _print_line)
        with open_display(Console()) as display:
            return await watch(channel, name, display.update)

    try:
        last = agent.run(work)
    except KeyboardInterrupt as error:
        raise interrupted(name.removeprefix("migrations/")) from error
    if last.state == pb.STATE_FAILED:
        raise CommandFailed(ending(last), describe(last))


@click.command()
@agent_options
@click.argument("name", type=NAME, metavar="ID")
def verify(agent: Agent, name: str) -> None:
    """Compare the two ends.

    Digest by digest; fails if a range differs that is not marked to be sent, or if one of the
    source cannot be read: the others are compared all the same.
    """

    async def work(channel: grpc.aio.Channel) -> service_pb.VerifyMigrationResponse:
        newest = service_pb.VerifyMigrationResponse()
        request = service_pb.VerifyMigrationRequest(name=name)
        with ShareDisplay(Console(stderr=True), "compared") as display:
            async for newest in MigrationServiceStub(channel).VerifyMigration(request):
                done = newest.compared_bytes + newest.unread_bytes
                display.update(done, newest.total_bytes)
        return newest

    result = agent.run(work)
    shown = {"id": name.removeprefix("migrations/"), **_comparison(result)}
    if not result.done:
        message = "the comparison ended early: look into the agents' logs and repeat it"
        raise CommandFailed(Unavailable("VERIFY_ENDED", message), shown)
    if result.mismatched_bytes:
        raise CommandFailed(_unequal(result), shown)
    if result.unread_bytes:
        raise CommandFailed(_incomplete(result), shown)
    click.echo(json.dumps({**shown, "error": None}) if agent.json else _equal(result))


def _print_line(migration: pb.Migration) -> None:
    click.echo(json.dumps(describe(migration)))


def _comparison(result: service_pb.VerifyMigrationResponse) -> dict[str, Any]:
    return {
        "equal": result.done
        and not (result.mismatched_bytes or result.pending_bytes or result.unread_bytes),
        "done": result.done,
        "compared_bytes": result.compared_bytes,
        "total_bytes": result.total_bytes,
        "pending_bytes": result.pending_bytes,
        "mismatched_bytes": result.mismatched_bytes,
        "unread_bytes": result.unread_bytes,
        "mismatches": [_range(one) for one in result.mismatches],
        "unread": [_range(one) for one in result.unread],
    }


def _range(one: service_pb.Mismatch | service_pb.UnreadRange) -> dict[str, Any]:
    return {
        "source": one.source,
        "offset_bytes": one.offset_bytes,
        "length_bytes": one.length_bytes,
    }


def _equal(result: service_pb.VerifyMigrationResponse) -> str:
    compared = format_bytes(result.compared_bytes)
    if result.pending_bytes:
        pending = format_bytes(result.pending_bytes)
        return f"compared {compared}: {pending} differ and are marked, so they will be sent"
    return f"compared {compared}: equal"


def _unequal(result: service_pb.VerifyMigrationResponse) -> DataLoss:
    first = "; ".join(
        f"{mismatch.source} at {mismatch.offset_bytes}, {mismatch.length_bytes} bytes"
        for mismatch in result.mismatches[:3]
    )
    message = (
        f"{format_bytes(result.mismatched_bytes)} differ although nothing marked them ({first}): "
        "do not use the target; cancel or roll back and report this"
    )
    return DataLoss("COPIES_DIFFER", message, mismatched_bytes=result.mismatched_bytes)


def _incomplete(result: service_pb.VerifyMigrationResponse) -> DataLoss:
    first = result.unread[0]
    message = (
        f"{format_bytes(result.unread_bytes)} of the source cannot be read and were not compared, "
        f"the first at offset {first.offset_bytes} of {first.source}; {_equal(result)}: check the "
        "disk and the kernel log, then verify again"
    )
    return DataLoss(
        "COMPARISON_INCOMPLETE",
        message,
        path=first.source,
        offset_bytes=first.offset_bytes,
        unread_bytes=result.unread_bytes,
    )
