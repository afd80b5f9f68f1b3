"""The agent's key: made once and whole, refused if damaged or open, never replaced."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from agent.certificate import Certificate, verify
from agent.errors import WarmsyncError
from agent.migration import Role
from agent.signer import NAME, open_signer, read_signer
from tests.agent.certificates import statement


def fails(directory: Path) -> WarmsyncError:
    with pytest.raises(WarmsyncError) as caught:
        open_signer(directory)
    return caught.value


def written(directory: Path, data: bytes, mode: int = 0o600) -> Path:
    path = directory / NAME
    path.write_bytes(data)
    path.chmod(mode)
    return path


def test_made_at_the_first_start_and_kept(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    assert read_signer(directory) is None
    made = open_signer(directory)
    data = (directory / NAME).read_bytes()
    assert data.startswith(b"-----BEGIN PRIVATE KEY-----")  # PKCS #8
    again = open_signer(directory)
    assert again.public_key == made.public_key
    assert (directory / NAME).read_bytes() == data
    assert [path.name for path in directory.iterdir()] == [NAME]
    assert open_signer(tmp_path / "other").public_key != made.public_key


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
def test_for_its_owner_only_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        open_signer(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == 0o600


def test_what_it_signs_holds(tmp_path: Path) -> None:
    source, target = open_signer(tmp_path / "a"), open_signer(tmp_path / "b")
    made = statement()
    both = (source.sign(made, Role.SOURCE), target.sign(made, Role.TARGET))
    prints = {Role.SOURCE: source.fingerprint, Role.TARGET: target.fingerprint}
    verify(Certificate(made, both), prints)


def test_a_start_that_was_cut_short_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.new").write_bytes(b"half a k")
    open_signer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610, 0o777])
def test_a_key_that_others_may_have_is_refused(tmp_path: Path, mode: int) -> None:
    open_signer(tmp_path)
    path = tmp_path / NAME
    path.chmod(mode)
    error = fails(tmp_path)
    assert (error.reason, error.values["mode"]) == ("IDENTITY_EXPOSED", f"{mode:04o}")
    path.chmod(0o600)
    open_signer(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_key_of_another_owner_is_refused(tmp_path: Path) -> None:
    open_signer(tmp_path)
    os.chown(tmp_path / NAME, 12345, 0)
    assert fails(tmp_path).reason == "IDENTITY_EXPOSED"
    # All of it is another's: an agent that is not root's, which root looks at.
    os.chown(tmp_path, 12345, 0)
    assert read_signer(tmp_path) is not None


def _pem(key: Ed25519PrivateKey | X25519PrivateKey, *, password: bytes = b"") -> bytes:
    hidden = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden)


DAMAGED = {
    "empty": b"",
    "text": b"no key",
    "not utf-8": b"\xff" * 100,
    "half": _pem(Ed25519PrivateKey.generate())[:60],
    "another kind": _pem(X25519PrivateKey.generate()),
    "a password": _pem(Ed25519PrivateKey.generate(), password=b"x"),
    "much": b"A" * (1 << 20),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_key_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, DAMAGED[name])
    assert fails(tmp_path).reason == "IDENTITY_DAMAGED"
    assert path.read_bytes() == DAMAGED[name]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / NAME, 0o600)
    assert fails(tmp_path / "pipe").reason == "IDENTITY_DAMAGED"
    (tmp_path / "directory" / NAME).mkdir(parents=True)
    assert fails(tmp_path / "directory").reason == "IDENTITY_DAMAGED"


def test_a_link_is_not_followed_and_not_replaced(tmp_path: Path) -> None:
    link = tmp_path / NAME
    link.symlink_to(tmp_path / "gone")
    assert fails(tmp_path).reason == "STATE_DIR_UNUSABLE"
    assert link.is_symlink()


def test_no_place_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert fails(tmp_path / "file" / "state").reason == "STATE_DIR_UNUSABLE"
