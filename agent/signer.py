"""This agent's identity: an Ed25519 key in its state directory, and what is signed with it.

Owns the key's file: made whole at the first start, readable for its owner only. The private key
never leaves this room. A key that is damaged or was open to others is refused, never replaced:
who trusts it must learn of a new one.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from agent.certificate import Signature, fingerprint, signed_bytes
from agent.certificate.statement import Statement
from agent.errors import DataLoss, NotAllowed, ResourceExhausted, WarmsyncError
from agent.migration import Role

NAME = "identity.pem"
_MAX_BYTES = 4096
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Signer:
    """Signs with one key. Thread-safe."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes_raw()

    @property
    def fingerprint(self) -> str:
        """Return the public key's short name."""
        return fingerprint(self.public_key)

    def sign(self, statement: Statement, role: Role) -> Signature:
        """Return this agent's signature in its role. BAD_CUTOVER_CERTIFICATE."""
        signature = self._key.sign(signed_bytes(statement, role))
        return Signature(role, self.public_key, signature)


def open_signer(directory: Path) -> Signer:
    """Return the signer with the directory's key, which is made if there is none.

    NotAllowed IDENTITY_EXPOSED or STATE_DIR_UNUSABLE, DataLoss IDENTITY_DAMAGED,
    ResourceExhausted STATE_DIR_FULL. The caller holds the directory (`agent.daemon`).
    """
    found = read_signer(directory)
    if found is not None:
        return found
    path = directory / NAME
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    made = read_signer(directory)
    if made is None:
        raise _unusable(path, "it was removed while it was made")
    return made


def read_signer(directory: Path) -> Signer | None:
    """Return the signer with the directory's key, None if there is none. As `open_signer`."""
    path = directory / NAME
    try:
        data = _read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _damaged(path, "is no private key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _damaged(path, "holds a key of another kind than Ed25519")
    return Signer(key)


def _read(path: Path) -> bytes:
    """Return what the file holds, once nobody else can have changed it. OSError."""
    # NONBLOCK: a pipe of that name would wait for ever for who writes it.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _damaged(path, "is no file")
        # The directory's owner could put another key there anyway: root may look at his key.
        owners = (os.geteuid(), path.parent.stat().st_uid)
        if status.st_mode & 0o077 or status.st_uid not in owners:
            raise _exposed(path, status)
        return os.read(descriptor, _MAX_BYTES)
    finally:
        os.close(descriptor)


def _make(path: Path) -> None:
    """Write a new key beside its place, and move it there once it is on the disk. OSError."""
    key = Ed25519PrivateKey.generate()
    data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    aside = path.with_name(f"{path.name}.new")
    aside.unlink(missing_ok=True)  # of a start that was cut short
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with os.fdopen(os.open(aside, flags, 0o600), "wb") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask took away
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _flush_directory(path.parent)


def _flush_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exposed(path: Path, status: os.stat_result) -> NotAllowed:
    mode = stat.S_IMODE(status.st_mode)
    return NotAllowed(
        "IDENTITY_EXPOSED",
        f"{path} has mode {mode:04o} and owner {status.st_uid}: others than this agent may have "
        "its key; chmod 600 and chown it if nobody had, else remove it and make the new key known",
        path=path,
        mode=f"{mode:04o}",
        owner=status.st_uid,
    )


def _damaged(path: Path, what: str) -> DataLoss:
    return DataLoss(
        "IDENTITY_DAMAGED",
        f"{path} {what}; put it back from a backup, or remove it: the agent makes another, which "
        "must be made known to those who check certificates",
        path=path,
    )


def _unusable(path: Path, what: str) -> NotAllowed:
    message = f"the key {path} cannot be used ({what}); mend that, or choose another --state-dir"
    return NotAllowed("STATE_DIR_UNUSABLE", message, path=path)


def _unwritable(path: Path, error: OSError) -> WarmsyncError:
    if error.errno in _FULL:
        message = f"no room for the key {path} ({error.strerror}); free space there"
        return ResourceExhausted("STATE_DIR_FULL", message, path=path)
    return _unusable(path, error.strerror or str(error))
