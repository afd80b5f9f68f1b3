"""The cutover certificate: a statement, and the signatures of both agents under it. Pure.

Owns the file's form and what makes a certificate hold. A certificate carries its own keys, so
without keys that the verifier knows from elsewhere it proves only that nobody damaged it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from agent.certificate.fields import bad, fields_of, items, parse_json
from agent.certificate.statement import Statement, canonical, dump_statement, read_statement
from agent.errors import DataLoss, FailedPrecondition, InvalidArgument
from agent.migration import Role

KEY_BYTES = 32
SIGNATURE_BYTES = 64

_DOMAIN = b"warmsync cutover certificate 1"
"""So that a signature under this is none under anything else that a key may ever sign."""

_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")


@dataclass(frozen=True, slots=True)
class Signature:
    """One agent's: its role, its raw Ed25519 public key, the signature over `signed_bytes`."""

    role: Role
    public_key: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Certificate:
    """A statement and its signatures: the source's and the target's."""

    statement: Statement
    signatures: tuple[Signature, ...]


def signed_bytes(statement: Statement, role: Role) -> bytes:
    """Return what an agent signs in its role. BAD_CUTOVER_CERTIFICATE for a wrong statement.

    The role is part of it: one agent's signature cannot be shown as the other's.
    """
    return b"\0".join((_DOMAIN, role.encode(), canonical(statement)))


def fingerprint(public_key: bytes) -> str:
    """Return the key's short name: "SHA256:" and 43 letters, as ssh-keygen writes them."""
    digest = hashlib.sha256(public_key).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def parse_key(given: str) -> str:
    """Return the fingerprint of a key given as such or in base64. InvalidArgument BAD_KEY."""
    if _FINGERPRINT.fullmatch(given):
        return given
    key = _decode(given)
    if key is None or len(key) != KEY_BYTES:
        raise InvalidArgument(
            "BAD_KEY",
            f"{given[:60]!r} is no public key: give its fingerprint (SHA256:...) or its "
            f"{KEY_BYTES} bytes in base64, as `warmsync doctor` shows them",
        )
    return fingerprint(key)


def dump(certificate: Certificate) -> bytes:
    """Return the file: JSON for people, whose layout no signature depends on."""
    values = {
        "statement": dump_statement(certificate.statement),
        "signatures": [
            {
                "role": str(one.role),
                "public_key": base64.b64encode(one.public_key).decode(),
                "signature": base64.b64encode(one.signature).decode(),
            }
            for one in certificate.signatures
        ],
    }
    return json.dumps(values, ensure_ascii=False, sort_keys=True, indent=2).encode() + b"\n"


def load(data: bytes) -> Certificate:
    """Return the certificate in a file. InvalidArgument BAD_CUTOVER_CERTIFICATE for all else.

    It is whole then, and of the right form; whether it holds, `verify` says.
    """
    take = fields_of(parse_json(data), "certificate", "statement signatures")
    statement = read_statement(take["statement"])
    signatures = items(take["signatures"], "signatures", 2, 2)
    found = tuple(_signature(one, f"signatures[{at}]") for at, one in enumerate(signatures))
    _check_roles(found)
    return Certificate(statement, found)


def verify(certificate: Certificate, keys: Mapping[Role, str]) -> None:
    """Return if the certificate holds; `keys`: expected fingerprints, of either role, or none.

    DataLoss SIGNATURE_INVALID or ROOTS_DIFFER, FailedPrecondition UNEXPECTED_KEY,
    BAD_CUTOVER_CERTIFICATE.
    """
    _check_roles(certificate.signatures)
    for one in certificate.signatures:
        _check_key(one, keys.get(one.role))
        _check_signature(one, certificate.statement)
    for volume in certificate.statement.volumes:
        if volume.source_root != volume.target_root:
            raise DataLoss(
                "ROOTS_DIFFER",
                f"{volume.source_path} and {volume.target_path} were not equal, says the "
                "certificate; do not use the target",
                source=volume.source_path,
                target=volume.target_path,
            )


def signature_of(data: bytes, role: Role) -> Signature:
    """Return one end's signature of a certificate in a file. BAD_CUTOVER_CERTIFICATE."""
    return next(one for one in load(data).signatures if one.role is role)


def _check_roles(signatures: tuple[Signature, ...]) -> None:
    if sorted(one.role for one in signatures) != sorted(Role):
        raise bad("signatures", "are not one of the source and one of the target")


def _check_key(one: Signature, expected: str | None) -> None:
    found = fingerprint(one.public_key)
    if expected is not None and expected != found:
        raise FailedPrecondition(
            "UNEXPECTED_KEY",
            f"the {one.role} signed with the key {found}, not with {expected}; do not trust the "
            "certificate unless that agent's key was changed",
            role=one.role,
            found=found,
            expected=expected,
        )


def _check_signature(one: Signature, statement: Statement) -> None:
    try:
        key = Ed25519PublicKey.from_public_bytes(one.public_key)
        key.verify(one.signature, signed_bytes(statement, one.role))
    except (InvalidSignature, ValueError) as error:
        raise DataLoss(
            "SIGNATURE_INVALID",
            f"the {one.role}'s signature does not fit the statement: it was changed after it was "
            "signed, or damaged; get the certificate anew from the agent",
            role=one.role,
        ) from error


def _signature(value: object, where: str) -> Signature:
    take = fields_of(value, where, "role public_key signature")
    if take["role"] not in list(Role):
        raise bad(f"{where}.role", f"is not one of {', '.join(Role)}")
    return Signature(
        Role(take["role"]),
        _bytes(take["public_key"], f"{where}.public_key", KEY_BYTES),
        _bytes(take["signature"], f"{where}.signature", SIGNATURE_BYTES),
    )


def _bytes(value: object, where: str, length_bytes: int) -> bytes:
    found = _decode(value) if isinstance(value, str) else None
    if found is None or len(found) != length_bytes:
        raise bad(where, f"is not {length_bytes} bytes in base64")
    return found


def _decode(text: str) -> bytes | None:
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    # Several texts stand for the same bytes (spare bits); only one of them is right.
    return found if base64.b64encode(found).decode() == text else None
