"""What both agents sign at a cutover: the words of it, and their only form as bytes. Pure.

Owns the statement's fields, their limits and the canonical JSON. Whatever stands in what is read,
it is a statement or one error that names the field: BAD_CUTOVER_CERTIFICATE.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from agent.certificate.fields import bad, fields_of, items, matching, number, parse_json, text
from agent.certificate.roots import ALGORITHM
from agent.errors import InvalidArgument
from agent.migration import Depth, check_id
from native.chunk import CHUNK_BYTES, DIGEST_BYTES

FORMAT_VERSION = 1
MAX_VOLUMES = 1024

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)
_HEX = re.compile(rf"[0-9a-f]{{{2 * DIGEST_BYTES}}}")


@dataclass(frozen=True, slots=True)
class End:
    """An agent as it names itself."""

    host: str
    agent_version: str


@dataclass(frozen=True, slots=True)
class ProvenVolume:
    """A volume; the roots are None unless the depth is FULL."""

    source_path: str
    target_path: str
    size_bytes: int
    compared_bytes: int
    source_root: bytes | None = None
    target_root: bytes | None = None


@dataclass(frozen=True, slots=True)
class Statement:
    """What is signed. Times are those of the source's clock, as `format_time` writes them."""

    migration: str
    generation: int
    depth: Depth
    volumes: tuple[ProvenVolume, ...]
    source: End
    target: End
    cutover_asked_at: str
    proved_at: str


def format_time(at_seconds: float) -> str:
    """Return seconds since the epoch as RFC 3339 in UTC: "2025-01-31T12:00:00.000000Z"."""
    return datetime.fromtimestamp(at_seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def canonical(statement: Statement) -> bytes:
    """Return the statement's only form: JSON, keys sorted, no spaces, UTF-8 (RFC 8785).

    BAD_CUTOVER_CERTIFICATE for one that `read_statement` would refuse: such a one is never signed.
    """
    values = dump_statement(statement)
    if read_statement(values) != statement:
        raise bad("statement", "has a value of another type")
    return encode(values)


def encode(values: dict[str, Any]) -> bytes:
    """Return values that were checked as canonical JSON."""
    text = json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode()


def dump_statement(statement: Statement) -> dict[str, Any]:
    """Return the values of the JSON object."""
    return {
        "format_version": FORMAT_VERSION,
        "migration": statement.migration,
        "generation": statement.generation,
        "verify": str(statement.depth),
        "volumes": [_dump_volume(volume) for volume in statement.volumes],
        "source": _dump_end(statement.source),
        "target": _dump_end(statement.target),
        "cutover_asked_at": statement.cutover_asked_at,
        "proved_at": statement.proved_at,
    }


def read_statement(value: object) -> Statement:
    """Return the statement in a JSON object. BAD_CUTOVER_CERTIFICATE naming what is wrong."""
    where = "statement"
    # First, so that a later format is not told of its fields.
    if isinstance(value, dict) and value.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        found = repr(value["format_version"])[:20]
        raise bad(f"{where}.format_version", f"is {found}, this warmsync knows {FORMAT_VERSION}")
    take = fields_of(
        value,
        where,
        "format_version migration generation verify volumes source target cutover_asked_at "
        "proved_at",
    )
    number(take["format_version"], f"{where}.format_version")
    depth = _depth(take["verify"], f"{where}.verify")
    volumes = items(take["volumes"], f"{where}.volumes", 1, MAX_VOLUMES)
    return Statement(
        migration=_migration(take["migration"], f"{where}.migration"),
        generation=number(take["generation"], f"{where}.generation"),
        depth=depth,
        volumes=tuple(
            _volume(one, f"{where}.volumes[{index}]", depth) for index, one in enumerate(volumes)
        ),
        source=_end(take["source"], f"{where}.source"),
        target=_end(take["target"], f"{where}.target"),
        cutover_asked_at=_time(take["cutover_asked_at"], f"{where}.cutover_asked_at"),
        proved_at=_time(take["proved_at"], f"{where}.proved_at"),
    )


def parse_statement(data: bytes) -> Statement:
    """Return the statement in canonical (or other) JSON. BAD_CUTOVER_CERTIFICATE."""
    return read_statement(parse_json(data))


def _volume(value: object, where: str, depth: Depth) -> ProvenVolume:
    take = fields_of(
        value,
        where,
        "source_path target_path size_bytes chunk_bytes algorithm source_root target_root "
        "compared_bytes",
    )
    _same(take["chunk_bytes"], f"{where}.chunk_bytes", CHUNK_BYTES)
    _same(take["algorithm"], f"{where}.algorithm", ALGORITHM)
    size = number(take["size_bytes"], f"{where}.size_bytes", 1)
    # All or nothing is compared at these depths; anything between is a contradiction.
    least, most = {Depth.NONE: (0, 0), Depth.FINAL: (0, size), Depth.FULL: (size, size)}[depth]
    read_root = _root if depth is Depth.FULL else _no_root
    return ProvenVolume(
        source_path=text(take["source_path"], f"{where}.source_path"),
        target_path=text(take["target_path"], f"{where}.target_path"),
        size_bytes=size,
        compared_bytes=number(take["compared_bytes"], f"{where}.compared_bytes", least, most),
        source_root=read_root(take["source_root"], f"{where}.source_root"),
        target_root=read_root(take["target_root"], f"{where}.target_root"),
    )


def _dump_volume(volume: ProvenVolume) -> dict[str, Any]:
    return {
        "source_path": volume.source_path,
        "target_path": volume.target_path,
        "size_bytes": volume.size_bytes,
        "chunk_bytes": CHUNK_BYTES,
        "algorithm": ALGORITHM,
        "source_root": None if volume.source_root is None else volume.source_root.hex(),
        "target_root": None if volume.target_root is None else volume.target_root.hex(),
        "compared_bytes": volume.compared_bytes,
    }


def _dump_end(end: End) -> dict[str, Any]:
    return {"host": end.host, "agent_version": end.agent_version}


def _end(value: object, where: str) -> End:
    take = fields_of(value, where, "host agent_version")
    version = text(take["agent_version"], f"{where}.agent_version", 255)
    return End(text(take["host"], f"{where}.host", 255), version)


def _migration(value: object, where: str) -> str:
    name = text(value, where)
    try:
        check_id(name)
    except InvalidArgument as error:
        raise bad(where, "is no id of a migration") from error
    return name


def _depth(value: object, where: str) -> Depth:
    if not isinstance(value, str) or value not in list(Depth):
        raise bad(where, f"is not one of {', '.join(Depth)}")
    return Depth(value)


def _time(value: object, where: str) -> str:
    what = "a time such as 2025-01-31T12:00:00.000000Z"
    found = matching(value, where, _TIME, what)
    try:
        datetime.fromisoformat(found)
    except ValueError as error:  # the 31st of February
        raise bad(where, f"is not {what}") from error
    return found


def _root(value: object, where: str) -> bytes:
    return bytes.fromhex(matching(value, where, _HEX, f"{2 * DIGEST_BYTES} hexadecimal digits"))


def _no_root(value: object, where: str) -> None:
    if value is not None:
        raise bad(where, "is not null, as it must be where not all was compared")


def _same(value: object, where: str, expected: int | str) -> None:
    if type(value) is not type(expected) or value != expected:
        raise bad(where, f"is not {expected}")
