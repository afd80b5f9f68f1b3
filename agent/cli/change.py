"""pause, resume, cancel, rollback, finish, settle, update, delete."""

from __future__ import annotations

import json
from typing import Any

import click
import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask
from warmsync.v1 import migration_pb2 as pb
from warmsync.v1 import migration_service_pb2 as service_pb
from warmsync.v1.migration_service_pb2_grpc import MigrationServiceStub

from agent.cli.connection import DEADLINE_SECONDS, Agent, agent_options
from agent.cli.move import MODES
from agent.cli.types import DURATION, NAME, RATE
from agent.view import describe, migration_id, state_name

OWNERS = {"source": pb.OWNER_SOURCE, "target": pb.OWNER_TARGET}


def _command(verb: str, method: str, text: str) -> click.Command:
    """Return the command for a method that takes a name and answers with the migration."""

    def change(agent: Agent, name: str) -> None:
        request = getattr(service_pb, f"{method}MigrationRequest")(name=name)
        _print(agent, _call(agent, f"{method}Migration", request))

    change.__doc__ = text
    argument = click.argument("name", type=NAME, metavar="ID")
    return click.command(verb)(agent_options(argument(change)))


pause = _command("pause", "Pause", "Stop sending; tracking goes on.")
resume = _command("resume", "Resume", "Go on after a pause.")
cancel = _command(
    "cancel",
    "Cancel",
    "Give up.\n\nThe target is released, marked incomplete; the source stays as it is.",
)
rollback = _command(
    "rollback",
    "RollBack",
    "Undo a cutover.\n\nThe target is taken back and the source writable again.",
)
finish = _command(
    "finish", "Finish", "Confirm a cutover.\n\nThe VM runs on the target; there is no way back."
)


@click.command()
@agent_options
@click.option(
    "--owner",
    type=click.Choice(list(OWNERS)),
    required=True,
    help="Who may write to the disks from now on; the VM must be off at the other one, for good.",
)
@click.argument("name", type=NAME, metavar="ID")
def settle(agent: Agent, name: str, owner: str) -> None:
    """Say who owns the disks.

    For a person, where one agent is gone for good and the other cannot learn it: it ends the
    migration there. Refused as long as the agents can find out by themselves.
    """
    request = service_pb.SettleMigrationRequest(name=name, owner=OWNERS[owner])
    _print(agent, _call(agent, "SettleMigration", request))


@click.command()
@agent_options
@click.option("--bandwidth-limit", type=RATE, metavar="RATE", help="Such as 100M; 0: no limit.")
@click.option("--max-downtime", type=DURATION, metavar="TIME", help="Such as 500ms.")
@click.option(
    "--cutover",
    type=click.Choice(list(MODES)),
    help="auto: the agents' hooks, from here on or once more; manual: no hook is begun any more.",
)
@click.argument("name", type=NAME, metavar="ID")
def update(
    agent: Agent,
    name: str,
    bandwidth_limit: int | None,
    max_downtime: float | None,
    cutover: str | None,
) -> None:
    """Change a migration while it runs."""
    values: dict[str, Any] = {
        "bandwidth_limit_bytes_per_second": bandwidth_limit,
        "max_downtime_seconds": max_downtime,
        "cutover": None if cutover is None else MODES[cutover],
    }
    given = {field: value for field, value in values.items() if value is not None}
    if not given:
        raise click.UsageError(
            "nothing to change: give --bandwidth-limit, --max-downtime or --cutover"
        )
    request = service_pb.UpdateMigrationRequest(
        migration=pb.Migration(name=name, **given), update_mask=FieldMask(paths=list(given))
    )
    _print(agent, _call(agent, "UpdateMigration", request))


@click.command()
@agent_options
@click.argument("name", type=NAME, metavar="ID")
def delete(agent: Agent, name: str) -> None:
    """Forget a migration that has ended."""
    _call(agent, "DeleteMigration", service_pb.DeleteMigrationRequest(name=name))
    short = name.removeprefix("migrations/")
    click.echo(json.dumps({"id": short, "deleted": True}) if agent.json else f"{short} deleted")


def _call(agent: Agent, method: str, request: Any) -> Any:
    async def work(channel: grpc.aio.Channel) -> Any:
        return await getattr(MigrationServiceStub(channel), method)(
            request, timeout=DEADLINE_SECONDS
        )

    return agent.run(work)


def _print(agent: Agent, migration: pb.Migration) -> None:
    if agent.json:
        click.echo(json.dumps(describe(migration)))
    else:
        click.echo(f"{migration_id(migration)} {state_name(migration.state)}")
