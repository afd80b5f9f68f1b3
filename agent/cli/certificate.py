"""certificate verify: whether a cutover's certificate holds, and whether a device is what it says.

Offline: asks no agent. Reads the certificate and the devices that are named; changes nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any, BinaryIO

import click
import grpc.aio
from rich.console import Console
from warmsync.v1 import migration_service_pb2 as service_pb
from warmsync.v1.migration_service_pb2_grpc import MigrationServiceStub

from agent.certificate import Certificate, fingerprint, load, parse_key
from agent.certificate import verify as verify_certificate
from agent.certificate.fields import MAX_CERTIFICATE_BYTES
from agent.certificate.statement import ProvenVolume, Statement
from agent.cli.connection import DEADLINE_SECONDS, Agent, agent_options, json_option
from agent.cli.failure import CommandFailed
from agent.cli.types import NAME, Parsed
from agent.display import ShareDisplay
from agent.errors import DataLoss, FailedPrecondition, WarmsyncError
from agent.imprint import read_root
from agent.migration import Depth, Role
from agent.units import format_bytes

KEY = Parsed("key", parse_key)
Compared = tuple[str, int, bytes]
"""A device, the number of the volume it was held against, and the root of what it holds."""


@click.group()
def certificate() -> None:
    """Check the certificates of cutovers."""


@certificate.command()
@agent_options
@click.argument("name", type=NAME, metavar="ID")
def show(agent: Agent, name: str) -> None:
    """Print the certificate of a migration that was cut over, as a file for `verify`.

    Either of its two agents has it, until the migration is deleted there.
    """

    async def work(channel: grpc.aio.Channel) -> bytes:
        request = service_pb.GetCutoverCertificateRequest(name=name)
        stub = MigrationServiceStub(channel)
        answer = await stub.GetCutoverCertificate(request, timeout=DEADLINE_SECONDS)
        return bytes(answer.certificate)

    click.echo(agent.run(work), nl=False)


@certificate.command()
@click.argument("file", type=click.File("rb"), metavar="FILE")
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="PATH",
    help="Read this device or file whole and compare it; repeat it in the order of the volumes.",
)
@click.option(
    "--volume",
    "number",
    type=click.IntRange(min=1),
    metavar="N",
    help="Compare the one --device with the N-th volume, from 1.",
)
@click.option(
    "--source-key", type=KEY, metavar="KEY", help="The source agent's: fingerprint or base64."
)
@click.option(
    "--target-key", type=KEY, metavar="KEY", help="The target agent's: fingerprint or base64."
)
@json_option
def verify(
    *,
    file: BinaryIO,
    devices: tuple[str, ...],
    number: int | None,
    source_key: str | None,
    target_key: str | None,
    as_json: bool,
) -> None:
    """Check a certificate, and devices against it.

    A certificate carries the keys it was signed with. Without --source-key and --target-key it is
    only shown that nothing was changed since somebody signed it, not who that was: compare the
    fingerprints printed here with those that `warmsync doctor` shows on the two hosts.

    A device equals the certificate until something writes to it, so compare before the VM boots.
    Needs no agent. Ends with 0 if all holds, 1 if anything does not.
    """
    found = load(file.read(MAX_CERTIFICATE_BYTES + 1))
    given = {Role.SOURCE: source_key, Role.TARGET: target_key}
    keys = {role: key for role, key in given.items() if key}
    chosen = _choose(found.statement, devices, number)
    shown = _describe(found, keys)
    try:
        verify_certificate(found, keys)
    except WarmsyncError as error:
        raise CommandFailed(error, {**shown, "valid": False}) from error
    if not as_json:
        click.echo(_page(found, keys))
    try:
        _check_roots(found.statement, chosen)
        compared = [(path, at, _root(path, volume)) for path, at, volume in chosen]
    except WarmsyncError as error:
        raise CommandFailed(error, shown) from error
    shown["devices"] = [_describe_device(found.statement, *one) for one in compared]
    _report(found.statement, compared, shown, as_json=as_json)


def _choose(
    statement: Statement, devices: Sequence[str], number: int | None
) -> list[tuple[str, int, ProvenVolume]]:
    """Return which device is held against which volume. UsageError."""
    volumes = statement.volumes
    if number is None:
        if devices and len(devices) != len(volumes):
            raise click.UsageError(
                f"the certificate has {len(volumes)} volumes, {len(devices)} devices are given: "
                "give one for each in its order, or choose with --volume"
            )
        pairs = zip(devices, range(1, len(devices) + 1), volumes, strict=False)
        return list(pairs)
    if len(devices) != 1:
        raise click.UsageError("--volume goes with one --device")
    if number > len(volumes):
        raise click.UsageError(f"there is no volume {number}: the certificate has {len(volumes)}")
    return [(devices[0], number, volumes[number - 1])]


def _check_roots(statement: Statement, chosen: Sequence[object]) -> None:
    if chosen and statement.depth is not Depth.FULL:
        raise FailedPrecondition(
            "NO_ROOTS",
            f"the certificate was made with --verify {statement.depth}: it has no roots that a "
            "device can be compared with; only --verify full makes them",
            verify=statement.depth,
        )


def _root(path: str, volume: ProvenVolume) -> bytes:
    with ShareDisplay(Console(stderr=True), f"read {path}:") as display:
        return read_root(path, volume.size_bytes, display.update)


def _report(
    statement: Statement, compared: list[Compared], shown: dict[str, Any], *, as_json: bool
) -> None:
    unequal = [
        (path, at) for path, at, root in compared if root != statement.volumes[at - 1].target_root
    ]
    if not as_json:
        for path, at, _ in compared:
            word = "NOT equal" if (path, at) in unequal else "equal"
            click.echo(f"device     {path} is {word} to volume {at}")
    if unequal:
        names = ", ".join(f"{path} (volume {at})" for path, at in unequal)
        message = (
            f"not what the certificate says: {names}; if nothing has written to it since the "
            "cutover, do not use it, and report this"
        )
        raise CommandFailed(DataLoss("DEVICE_DIFFERS", message, devices=names), shown)
    if as_json:
        click.echo(json.dumps({**shown, "error": None}))


def _page(found: Certificate, keys: dict[Role, str]) -> str:
    statement = found.statement
    lines = [
        f"migration  {statement.migration}, generation {statement.generation}",
        f"source     {_end(statement, Role.SOURCE)}",
        f"target     {_end(statement, Role.TARGET)}",
        f"asked      {statement.cutover_asked_at}",
        f"proved     {statement.proved_at}",
        *(_volume_line(at, one) for at, one in enumerate(statement.volumes, 1)),
        *(_key_line(one.role, one.public_key, keys) for one in found.signatures),
    ]
    if len({one.public_key for one in found.signatures}) == 1:
        lines.append("           both signatures are of one key: of one agent, on one host")
    condition = "" if keys.keys() == set(Role) else ", if these are the agents' keys"
    return "\n".join([*lines, f"result     {_verdict(statement)}{condition}"])


def _verdict(statement: Statement) -> str:
    compared = format_bytes(sum(volume.compared_bytes for volume in statement.volumes))
    return {
        Depth.FULL: "valid: source and target were equal at the cutover, every byte",
        Depth.FINAL: f"valid: {compared} of the last rounds were read back and equal, no more",
        Depth.NONE: "valid: a cutover at which NOTHING was compared (--verify none)",
    }[statement.depth]


def _end(statement: Statement, role: Role) -> str:
    end = statement.source if role is Role.SOURCE else statement.target
    return f"{_plain(end.host)}, warmsync {_plain(end.agent_version)}"


def _volume_line(at: int, volume: ProvenVolume) -> str:
    places = f"{_plain(volume.source_path)} -> {_plain(volume.target_path)}"
    root = f", root {volume.target_root.hex()}" if volume.target_root else ""
    return f"volume {at:<3} {places}, {volume.size_bytes} bytes{root}"


def _key_line(role: Role, public_key: bytes, keys: dict[Role, str]) -> str:
    known = "as expected" if role in keys else f"not checked: give --{role}-key"
    return f"signed by  {role}, key {fingerprint(public_key)} ({known})"


def _plain(text: str) -> str:
    """Return a stranger's text, unable to steer the terminal."""
    return text if text.isprintable() else ascii(text)


def _describe(found: Certificate, keys: dict[Role, str]) -> dict[str, Any]:
    statement = found.statement
    return {
        "id": statement.migration,
        "generation": statement.generation,
        "verify": str(statement.depth),
        "valid": True,
        "all_compared": statement.depth is Depth.FULL,
        "cutover_asked_at": statement.cutover_asked_at,
        "proved_at": statement.proved_at,
        "source_host": statement.source.host,
        "target_host": statement.target.host,
        "volumes": [_describe_volume(volume) for volume in statement.volumes],
        "signatures": [
            {
                "role": str(one.role),
                "public_key": base64.b64encode(one.public_key).decode(),
                "fingerprint": fingerprint(one.public_key),
                "key_checked": one.role in keys,
            }
            for one in found.signatures
        ],
        "devices": [],
    }


def _describe_volume(volume: ProvenVolume) -> dict[str, Any]:
    return {
        "source_path": volume.source_path,
        "target_path": volume.target_path,
        "size_bytes": volume.size_bytes,
        "compared_bytes": volume.compared_bytes,
        "root": volume.target_root.hex() if volume.target_root else None,
    }


def _describe_device(statement: Statement, path: str, at: int, root: bytes) -> dict[str, Any]:
    equal = root == statement.volumes[at - 1].target_root
    return {"path": path, "volume": at, "root": root.hex(), "equal": equal}
