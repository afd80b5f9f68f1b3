"""Certificates to test with: real keys, made once."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.certificate import Certificate
from agent.migration import Role
from agent.signer import Signer
from agent.statement import Depth, End, ProvenVolume, Statement, format_time

ROOT = bytes(range(16))


@cache
def signer(role: Role) -> Signer:
    return Signer(Ed25519PrivateKey.from_private_bytes(role.encode().ljust(32, b".")))


def statement(depth: Depth = Depth.FULL, **changes: Any) -> Statement:
    full = depth is Depth.FULL
    root = ROOT if full else None
    size, compared = 1 << 30, {Depth.NONE: 0, Depth.FINAL: 4096, Depth.FULL: 1 << 30}[depth]
    made = Statement(
        migration="web1",
        generation=7,
        depth=depth,
        volumes=(
            ProvenVolume("/dev/vg/a", "/dev/vg/b", size, compared, root, root),
            ProvenVolume("/srv/ä", "/srv/ö", size, compared, root, root),
        ),
        source=End("one", "0.1.0"),
        target=End("two", "0.2.0"),
        cutover_asked_at=format_time(1_700_000_000.25),
        proved_at=format_time(1_700_000_001.5),
    )
    return replace(made, **changes)


def sign(signed: Statement) -> Certificate:
    return Certificate(signed, tuple(signer(role).sign(signed, role) for role in Role))


def certificate(depth: Depth = Depth.FULL, **changes: Any) -> Certificate:
    return sign(statement(depth, **changes))
