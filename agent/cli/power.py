"""power-down: a quiesce hook for VMs that QEMU runs."""

from __future__ import annotations

import glob
import json
import os
from dataclasses import asdict

import click

from agent.cli.connection import json_option
from agent.cli.types import DURATION
from agent.units import format_seconds


@click.command("power-down")
@click.option(
    "--socket",
    "patterns",
    required=True,
    multiple=True,
    metavar="GLOB",
    help="QMP sockets of this host's VMs, such as '/run/vm/*.qmp'; may be repeated.",
)
@click.option(
    "--seconds",
    "limit",
    type=DURATION,
    default="60s",
    show_default=True,
    metavar="TIME",
    help="How long the guest may take.",
)
@click.option("--kill", is_flag=True, help="End QEMU after that time: as a power cut.")
@click.option("--allow-off", is_flag=True, help="It is well if disks are open in no QEMU.")
@json_option
@click.argument("disks", nargs=-1, metavar="[PATH]...")
def power_down(
    *,
    patterns: tuple[str, ...],
    limit: float,
    kill: bool,
    allow_off: bool,
    as_json: bool,
    disks: tuple[str, ...],
) -> None:
    """Power down the VM that has these disks.

    Finds its QEMU by the disks, presses the power button (QMP system_powerdown), and waits until
    QEMU is gone, or the guest off where QEMU was started with -no-shutdown. Without PATHs those of
    the migration are taken (WARMSYNC_VOLUME_0, ...), so that this can be a quiesce hook:

    \b
      [hooks]
      quiesce = ["/usr/bin/warmsync", "power-down", "--socket", "/run/vm/*.qmp"]

    Needs no agent. May be asked for again.
    """
    # Here, not above: most commands have no use for QMP.
    from agent.qemu import power

    paths = disks or _volumes()
    if not paths:
        raise click.UsageError("name a disk, or run this as a quiesce hook")
    sockets = sorted({path for pattern in patterns for path in glob.glob(pattern)})
    found = power.find_vms(paths, sockets)
    if found.missing and not allow_off:
        raise power.not_found(found.missing[0], sockets)
    ended = [power.power_down(address, limit, kill=kill) for address in found.sockets]
    if as_json:
        click.echo(json.dumps({"powered_down": [asdict(one) for one in ended]}))
        return
    for one in ended:
        how = "ended by force" if one.forced else "off"
        click.echo(f"{one.socket}: {how} after {format_seconds(one.seconds)}")
    if not ended:
        click.echo("off already")


def _volumes() -> tuple[str, ...]:
    count = int(os.environ.get("WARMSYNC_VOLUMES", "0"))
    return tuple(os.environ[f"WARMSYNC_VOLUME_{i}"] for i in range(count))
