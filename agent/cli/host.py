"""agent, doctor, devices, completion: commands about a host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import grpc.aio
from click.core import ParameterSource
from click.shell_completion import get_completion_class
from warmsync.v1 import host_service_pb2 as pb
from warmsync.v1.host_service_pb2_grpc import HostServiceStub

from agent import doctor as doctor_checks
from agent.cli.connection import DEADLINE_SECONDS, Agent, agent_options, json_option
from agent.cli.failure import CommandFailed
from agent.config import AgentConfig, load
from agent.errors import FailedPrecondition
from agent.units import format_bytes, format_seconds
from agent.view import format_table

_VERDICTS = {
    pb.CHECK_STATUS_OK: doctor_checks.Verdict.OK,
    pb.CHECK_STATUS_WARNING: doctor_checks.Verdict.WARNING,
    pb.CHECK_STATUS_MISSING: doctor_checks.Verdict.MISSING,
}


@click.command("agent")
@click.option("--listen", metavar="HOST:PORT|unix:PATH", help=f"Default: {AgentConfig().listen}.")
@click.option("--config", metavar="FILE", help="Settings in TOML; flags win over them.")
@click.option("--state-dir", metavar="DIR", help=f"Default: {AgentConfig().state_dir}.")
@click.option(
    "--allow-device",
    "allow_devices",
    multiple=True,
    metavar="GLOB",
    help="Devices and files that may be touched; may be repeated. Default: none.",
)
@click.option(
    "--allow-cgroup",
    "allow_cgroups",
    multiple=True,
    metavar="GLOB",
    help="Cgroups whose writes may be throttled; may be repeated. Default: none.",
)
@click.option("--tls-cert", metavar="FILE", help="This agent's certificate, PEM.")
@click.option("--tls-key", metavar="FILE", help="Its key, PEM.")
@click.option("--tls-ca", metavar="FILE", help="Certificate of the authority of all agents, PEM.")
@click.option("--insecure", is_flag=True, help="No TLS (loopback and unix sockets only).")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Least severity that is logged.",
)
@json_option
def run_agent(config: str | None, log_level: str, as_json: bool, **flags: Any) -> None:
    """Run this host's agent.

    It ends with SIGTERM or SIGINT; a second one ends it at once. With --json it logs JSON lines.
    """
    from agent.daemon import run

    settings = (load(config) if config else AgentConfig()).merged(**flags)
    run(settings, log_level=log_level, as_json=as_json)


@click.command()
@agent_options
@click.option(
    "--state-dir",
    metavar="DIR",
    default=AgentConfig().state_dir,
    show_default=True,
    help="Where the agent will keep its state.",
)
@click.pass_context
def doctor(context: click.Context, agent: Agent, state_dir: str) -> None:
    """Check this host, with the mends.

    With --agent the host of that agent. Fails if something is missing without which no agent works.
    """
    if context.get_parameter_source("agent") is ParameterSource.COMMANDLINE:
        checks, totals = _remote_checks(agent)
    else:
        totals = None
        checks = doctor_checks.examine(doctor_checks.Host(Path(state_dir)))
    missing = [check.name for check in checks if check.verdict is doctor_checks.Verdict.MISSING]
    shown: dict[str, Any] = {"checks": [_shown(check) for check in checks]}
    if totals is not None:
        shown["totals"] = _totals(totals)
    if not agent.json:
        _print_checks(checks)
        if totals is not None:
            click.echo(_totals_line(totals))
    if missing:
        message = f"missing: {', '.join(missing)}; see the mends above"
        raise CommandFailed(FailedPrecondition("HOST_LACKS", message), shown)
    if agent.json:
        click.echo(json.dumps({**shown, "error": None}))


@click.command()
@agent_options
def devices(agent: Agent) -> None:
    """List devices the agent may touch."""

    async def work(channel: grpc.aio.Channel) -> pb.ListDevicesResponse:
        answer: pb.ListDevicesResponse = await HostServiceStub(channel).ListDevices(
            pb.ListDevicesRequest(), timeout=DEADLINE_SECONDS
        )
        return answer

    found = agent.run(work).devices
    if agent.json:
        click.echo(json.dumps({"devices": [_device(device) for device in found]}))
        return
    rows = [["PATH", "SIZE", "SECTOR", "MODE", "IN USE BY"]]
    for device in found:
        mode = "ro" if device.read_only else "rw"
        size, sector = format_bytes(device.size_bytes), str(device.logical_block_size_bytes)
        rows.append([device.path, size, sector, mode, device.in_use_by or "-"])
    click.echo(format_table(rows))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
@json_option
def completion(context: click.Context, shell: str, as_json: bool) -> None:
    """Print a completion script.

    Use it as: eval "$(warmsync completion bash)"
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    root = context.find_root().command
    script = kind(root, {}, "warmsync", "_WARMSYNC_COMPLETE").source()
    click.echo(json.dumps({"shell": shell, "script": script}) if as_json else script)


def _remote_checks(agent: Agent) -> tuple[list[doctor_checks.Check], pb.Totals]:
    async def work(channel: grpc.aio.Channel) -> pb.GetHostResponse:
        answer: pb.GetHostResponse = await HostServiceStub(channel).GetHost(
            pb.GetHostRequest(), timeout=DEADLINE_SECONDS
        )
        return answer

    answer = agent.run(work)
    checks = [
        doctor_checks.Check(
            check.name,
            _VERDICTS.get(check.status, doctor_checks.Verdict.WARNING),
            check.finding,
            check.mend,
        )
        for check in answer.checks
    ]
    return checks, answer.totals


def _totals(totals: pb.Totals) -> dict[str, float]:
    return {field.name: getattr(totals, field.name) for field in pb.Totals.DESCRIPTOR.fields}


def _totals_line(totals: pb.Totals) -> str:
    return (
        f"\nMoved from here: {totals.migrations_cut_over} of {totals.migrations_started} "
        f"migrations cut over, {totals.migrations_failed} failed; disks of "
        f"{format_bytes(totals.moved_bytes)}, sent {format_bytes(totals.sent_bytes)}; downtime "
        f"{format_seconds(totals.downtime_seconds)}, saved "
        f"{format_seconds(totals.downtime_saved_seconds)}"
    )


def _print_checks(checks: list[doctor_checks.Check]) -> None:
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        click.echo(f"{check.verdict:<8} {check.name:<{width}}  {check.finding}")
        if check.mend:
            click.echo(f"{'':<8} {'':<{width}}  mend: {check.mend}")


def _shown(check: doctor_checks.Check) -> dict[str, str]:
    return {
        "name": check.name,
        "status": str(check.verdict),
        "finding": check.finding,
        "mend": check.mend,
    }


def _device(device: pb.Device) -> dict[str, Any]:
    return {
        "path": device.path,
        "size_bytes": device.size_bytes,
        "logical_block_size_bytes": device.logical_block_size_bytes,
        "read_only": device.read_only,
        "in_use_by": device.in_use_by,
    }
