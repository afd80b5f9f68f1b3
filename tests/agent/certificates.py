"""Certificates to test with: real keys, made once."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.certificate import Certificate, verify
from agent.certificate.statement import End, ProvenVolume, Statement, canonical, format_time
from agent.migration import Depth, Role
from agent.signer import Signer

if TYPE_CHECKING:  # the fuzzer of certificates needs no target, nor the time to import it
    from agent.peer import Proof
    from agent.target import TargetSession

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


def statement_of(session: TargetSession, generation: int, proofs: tuple[Proof, ...]) -> Statement:
    """What a source says whose bytes are those that the target has read back."""
    plan = session.snapshot().plan
    full = plan.verify is Depth.FULL
    volumes = tuple(
        ProvenVolume(
            volume.source,
            volume.target,
            volume.size_bytes,
            proof.compared_bytes,
            proof.root if full else None,
            proof.root if full else None,
        )
        for volume, proof in zip(plan.volumes, proofs, strict=True)
    )
    return statement(plan.verify, migration=plan.id, generation=generation, volumes=volumes)


async def hand_over(session: TargetSession, generation: int) -> None:
    """Release a session as its source does."""
    proofs = await session.prove(generation)
    said = statement_of(session, generation, proofs)
    signature = signer(Role.SOURCE).sign(said, Role.SOURCE)
    own = session.release(generation, canonical(said), signature)
    verify(Certificate(said, (signature, own)), {})


def release(session: TargetSession, generation: int) -> None:
    """Ask for a release with nothing proved."""
    signature = signer(Role.SOURCE).sign(statement(), Role.SOURCE)
    session.release(generation, canonical(statement()), signature)
