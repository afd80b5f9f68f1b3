"""migrate and cutover: the main job."""

from __future__ import annotations

import json
from typing import Any

import click
import grpc.aio
from warmsync.v1 import migration_pb2 as pb
from warmsync.v1 import migration_service_pb2 as service_pb
from warmsync.v1.migration_service_pb2_grpc import MigrationServiceStub

from agent.cli.connection import DEADLINE_SECONDS, Agent, agent_options
from agent.cli.types import DURATION, NAME, RATE, SIZE, VOLUME
from agent.cli.waiting import CONVERGED, goes_on, interrupted, is_handed_over, wait_for
from agent.units import format_bytes, format_seconds
from agent.view import describe, migration_id, page

TRACKERS = {
    "auto": pb.TRACKER_AUTO,
    "ebpf": pb.TRACKER_EBPF,
    "qemu": pb.TRACKER_QEMU,
    "scan": pb.TRACKER_SCAN,
}
CARRIERS = {"auto": pb.CARRIER_UNSPECIFIED, "tcp": pb.CARRIER_TCP, "grpc": pb.CARRIER_GRPC}
DEPTHS = {"none": pb.VERIFY_NONE, "final": pb.VERIFY_FINAL, "full": pb.VERIFY_FULL}
MODES = {"manual": pb.CUTOVER_MODE_MANUAL, "auto": pb.CUTOVER_MODE_AUTO}
COMPRESSIONS = {"none": pb.COMPRESSION_NONE, "zstd": pb.COMPRESSION_ZSTD}


@click.command()
@agent_options
@click.option(
    "--peer", required=True, metavar="HOST:PORT", help="The target's agent, seen from the source."
)
@click.option(
    "--volume",
    "volumes",
    required=True,
    multiple=True,
    type=VOLUME,
    metavar="SRC:DST",
    help="A source device and the target device it is copied to; may be repeated.",
)
@click.option("--id", "wanted_id", default="", metavar="ID", help="Name it. Default: chosen.")
@click.option(
    "--tracker",
    type=click.Choice(list(TRACKERS)),
    default="auto",
    show_default=True,
    help="How writes are learned of. auto: qemu for SOCKET/NODE, ebpf for devices, else scan.",
)
@click.option(
    "--max-downtime",
    type=DURATION,
    default=None,
    metavar="TIME",
    help="The downtime that is acceptable, such as 500ms.",
)
@click.option(
    "--bandwidth-limit", type=RATE, default=0, metavar="RATE", help="Such as 100M; 0: no limit."
)
@click.option(
    "--block-size", type=SIZE, default=None, metavar="SIZE", help="Unit of tracking, such as 4K."
)
@click.option(
    "--carrier",
    type=click.Choice(list(CARRIERS)),
    default="auto",
    show_default=True,
    help="How data travels: tcp needs the peer's data port, grpc is slower; auto: tcp if it can.",
)
@click.option(
    "--compression",
    type=click.Choice(list(COMPRESSIONS)),
    default="none",
    show_default=True,
    help="zstd, for slow links: frames that gain time by it are compressed (carrier tcp).",
)
@click.option(
    "--reuse-target",
    is_flag=True,
    help="The target holds an older copy: compare first, and send only what differs.",
)
@click.option(
    "--verify",
    type=click.Choice(list(DEPTHS)),
    default="full",
    show_default=True,
    help="What is compared at the cutover: every byte, the last round's, or nothing.",
)
@click.option(
    "--resize",
    is_flag=True,
    help="Grow what is on a larger target (ext4, XFS, btrfs; GPT, MBR) in the cutover. Adds to the "
    "downtime, and is not part of what is predicted. A smaller target is taken, if nothing lies "
    "behind its end.",
)
@click.option(
    "--guest-cgroup",
    default=None,
    metavar="DIR",
    help="The VM's cgroup on the source: its writes are slowed while the migration is stalled.",
)
@click.option(
    "--guest-least-rate",
    type=RATE,
    default=None,
    metavar="RATE",
    help="Never slow the VM's writes below this, such as 4M.",
)
@click.option(
    "--cutover",
    type=click.Choice(list(MODES)),
    default="manual",
    show_default=True,
    help="auto: the agents power the VM down, cut over and boot it, by their own hooks.",
)
@click.option("--cold", is_flag=True, help="The VM is off already: copy once and cut over at once.")
@click.option(
    "--wait",
    type=click.Choice(["none", "converged", "end"]),
    default="none",
    show_default=True,
    help="Return at once, when the VM may be powered down, or when all is done (auto, cold).",
)
@click.option(
    "--timeout", type=DURATION, default=None, metavar="TIME", help="Wait at most so long (10m)."
)
def migrate(agent: Agent, wait: str, timeout: float | None, wanted_id: str, **spec: Any) -> None:
    """Start to move a VM's disks.

    The VM goes on running until you power it down before the cutover.
    """
    if timeout is not None and wait == "none":
        raise click.UsageError("--timeout needs --wait converged or --wait end")
    by_itself = spec["cutover"] == "auto" or spec["cold"]
    if wait == "end" and not by_itself:
        raise click.UsageError("--wait end needs --cutover auto or --cold: who would cut over?")
    request = service_pb.CreateMigrationRequest(migration_id=wanted_id, migration=_message(**spec))
    started: list[pb.Migration] = []

    async def work(channel: grpc.aio.Channel) -> pb.Migration:
        stub = MigrationServiceStub(channel)
        created: pb.Migration = await stub.CreateMigration(request, timeout=DEADLINE_SECONDS)
        started.append(created)
        if wait == "none":
            return created
        # Nothing is to be done by hand in between: then all is waited for.
        return await wait_for(channel, created, is_handed_over if by_itself else CONVERGED, timeout)

    try:
        migration = agent.run(work)
    except KeyboardInterrupt as error:
        raise interrupted(migration_id(started[0]) if started else "") from error
    if by_itself and wait != "none" and not agent.json:
        click.echo(_handed_over(migration))
        return
    _print_started(agent, migration, converged=wait != "none")


@click.command()
@agent_options
@click.option("--force", is_flag=True, help="Although not converged: the downtime may be longer.")
@click.argument("name", type=NAME, metavar="ID")
def cutover(agent: Agent, name: str, force: bool) -> None:
    """Hand over to the target.

    The VM must be off. Copies what is left; returns once the target is durable and released.
    """

    async def work(channel: grpc.aio.Channel) -> pb.Migration:
        request = service_pb.CutOverMigrationRequest(name=name, force=force)
        # No deadline: a cutover that is forced takes as long as it takes.
        answer: pb.Migration = await MigrationServiceStub(channel).CutOverMigration(request)
        return answer

    migration = agent.run(work)
    if agent.json:
        click.echo(json.dumps(describe(migration)))
        return
    click.echo(_handed_over(migration))


def _handed_over(migration: pb.Migration) -> str:
    progress, name = migration.progress, migration_id(migration)
    booted = progress.HasField("boot_seconds")
    todo = "It was booted there: see that it runs" if booted else "Boot the VM on the target"
    return (
        f"{name} cut over: downtime {format_seconds(progress.downtime_seconds)},"
        f" {progress.rounds} rounds, sent {format_bytes(progress.sent_bytes)} of "
        f"{format_bytes(progress.total_bytes)}. The target owns the disks. {todo}, then run "
        f"`warmsync finish {name}`, or `warmsync rollback`."
    )


def _message(
    *,
    peer: str,
    volumes: tuple[pb.Volume, ...],
    tracker: str,
    max_downtime: float | None,
    bandwidth_limit: int,
    block_size: int | None,
    carrier: str,
    compression: str,
    reuse_target: bool,
    verify: str,
    resize: bool,
    cutover: str,
    cold: bool,
    guest_cgroup: str | None,
    guest_least_rate: int | None,
) -> pb.Migration:
    # 0 means "the default" to the agent; a budget or block size of zero is a mistake of the caller.
    if max_downtime == 0:
        raise click.UsageError("--max-downtime 0 can never be met: give a time such as 500ms")
    if block_size == 0:
        raise click.UsageError("--block-size 0 is no size: give a power of two such as 4K")
    return pb.Migration(
        peer=peer,
        volumes=volumes,
        tracker=TRACKERS[tracker],
        max_downtime_seconds=max_downtime,
        bandwidth_limit_bytes_per_second=bandwidth_limit,
        block_size_bytes=block_size or 0,
        carrier=CARRIERS[carrier],
        compression=COMPRESSIONS[compression],
        reuse_target=reuse_target,
        verify=DEPTHS[verify],
        resize=resize,
        cutover=MODES[cutover],
        cold=cold,
        guest_throttle=_guest_throttle(guest_cgroup, guest_least_rate),
    )


def _guest_throttle(cgroup: str | None, least_rate: int | None) -> pb.GuestThrottle | None:
    if cgroup is None and least_rate is None:
        return None
    if cgroup is None or least_rate is None:
        raise click.UsageError(
            "--guest-cgroup and --guest-least-rate go together: whose writes, and how slow at most"
        )
    if not cgroup.startswith("/"):
        raise click.UsageError(f"--guest-cgroup {cgroup} is not absolute: start it with /")
    if least_rate == 0:
        raise click.UsageError("--guest-least-rate 0 would stop the guest: give a rate such as 4M")
    return pb.GuestThrottle(cgroup=cgroup, least_bytes_per_second=least_rate)


def _print_started(agent: Agent, migration: pb.Migration, *, converged: bool) -> None:
    name = migration_id(migration)
    if agent.json:
        click.echo(json.dumps(describe(migration)))
    elif converged:
        click.echo(page(migration))
        click.echo(f"\nPower the VM down, then run `warmsync cutover {name}`.")
    else:
        click.echo(f"{name} started; {goes_on(name)}")
