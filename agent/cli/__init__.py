"""The `warmsync` command."""

from __future__ import annotations

import click

from agent.cli import certificate, change, host, look, move, power
from agent.cli.failure import FailingGroup
from agent.version import agent_version


@click.group(cls=FailingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(agent_version(), prog_name="warmsync")
def cli() -> None:
    """Move the disks of running virtual machines between hosts."""


for _command in (
    host.run_agent,
    move.migrate,
    move.cutover,
    look.list_migrations,
    look.show,
    look.watch_migration,
    change.update,
    change.pause,
    change.resume,
    change.cancel,
    change.rollback,
    change.finish,
    change.settle,
    change.delete,
    look.verify,
    certificate.certificate,
    power.power_down,
    host.devices,
    host.doctor,
    host.completion,
):
    cli.add_command(_command)
