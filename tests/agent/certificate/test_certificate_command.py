"""`warmsync certificate verify`: exit codes, what is printed, real devices."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from agent.certificate import Certificate, dump
from agent.certificate.fields import MAX_CERTIFICATE_BYTES
from agent.certificate.statement import End, ProvenVolume
from agent.cli import cli
from agent.imprint import read_root
from agent.migration import Depth, Role
from tests import devices
from tests.agent.certificates import certificate, sign, signer, statement
from tests.content import content

SIZES = (3 << 16, (1 << 20) + 512)


def check(*args: object) -> Result:
    words = ["certificate", "verify", *map(str, args)]
    return CliRunner().invoke(cli, words, prog_name="warmsync")


def answer(*args: object, code: int = 0) -> Any:
    result = check(*args, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def saved(directory: Path, made: Certificate) -> Path:
    path = directory / "web1.json"
    path.write_bytes(dump(made))
    return path


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    """Two target images, larger than their volumes."""
    paths = [tmp_path / "0", tmp_path / "1"]
    for number, path in enumerate(paths):
        path.write_bytes(content(SIZES[number], seed=number) + b"behind the volume".ljust(4096))
    return paths


@pytest.fixture
def proven(tmp_path: Path, disks: list[Path]) -> Path:
    """A certificate about them."""
    roots = [
        read_root(str(path), size, lambda *_: None) for path, size in zip(disks, SIZES, strict=True)
    ]
    volumes = tuple(
        ProvenVolume(f"/dev/s{at}", f"/dev/t{at}", size, size, root, root)
        for at, (size, root) in enumerate(zip(SIZES, roots, strict=True))
    )
    return saved(tmp_path, sign(statement(volumes=volumes)))


def spoil(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_for_people(tmp_path: Path) -> None:
    result = check(saved(tmp_path, certificate()))
    assert result.exit_code == 0
    assert "web1, generation 7" in result.stdout
    assert "one, warmsync 0.1.0" in result.stdout
    assert "/srv/ä -> /srv/ö, 1073741824 bytes" in result.stdout
    assert "2023-11-14T22:13:21.500000Z" in result.stdout
    for role in Role:
        assert f"{role}, key {signer(role).fingerprint} (not checked" in result.stdout
    assert "equal at the cutover, every byte, if these are the agents' keys" in result.stdout


def test_keys_that_are_known(tmp_path: Path) -> None:
    path = saved(tmp_path, certificate())
    key = base64.b64encode(signer(Role.SOURCE).public_key).decode()
    known = ["--source-key", key, "--target-key", signer(Role.TARGET).fingerprint]
    result = check(path, *known)
    assert result.exit_code == 0
    assert result.stdout.count("(as expected)") == 2
    assert result.stdout.splitlines()[-1].endswith("every byte")
    shown = answer(path, *known)
    assert [one["key_checked"] for one in shown["signatures"]] == [True, True]


def test_keys_that_are_not(tmp_path: Path) -> None:
    path = saved(tmp_path, certificate())
    shown = answer(path, "--target-key", signer(Role.SOURCE).fingerprint, code=1)
    assert (shown["error"]["reason"], shown["valid"]) == ("UNEXPECTED_KEY", False)


def test_one_key_for_both_is_said(tmp_path: Path) -> None:
    made = statement()
    both = tuple(signer(Role.SOURCE).sign(made, role) for role in Role)
    result = check(saved(tmp_path, Certificate(made, both)))
    assert result.exit_code == 0
    assert "both signatures are of one key" in result.stdout
    assert "of one key" not in check(saved(tmp_path, certificate())).stdout


@pytest.mark.parametrize(
    ("depth", "words"),
    [(Depth.FINAL, "8.0 KiB of the last rounds"), (Depth.NONE, "NOTHING was compared")],
)
def test_less_than_all(tmp_path: Path, depth: Depth, words: str) -> None:
    path = saved(tmp_path, certificate(depth))
    assert words in check(path).stdout
    shown = answer(path)
    assert (shown["valid"], shown["all_compared"]) == (True, False)
    shown = answer(path, "--device", "/dev/null", "--volume", 1, code=1)
    assert (shown["error"]["reason"], shown["valid"]) == ("NO_ROOTS", True)


def test_what_does_not_hold(tmp_path: Path) -> None:
    made = certificate()
    path = saved(tmp_path, replace(made, statement=statement(generation=8)))
    result = check(path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("warmsync: error: the source's signature does not fit")
    assert answer(path, code=1)["error"]["reason"] == "SIGNATURE_INVALID"


def test_what_is_no_certificate(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"{}")
    assert answer(path, code=1)["error"]["reason"] == "BAD_CUTOVER_CERTIFICATE"
    # Endless: no more than a certificate's size of it is read.
    assert answer("/dev/zero", code=1)["error"]["values"]["field"] == "file"
    # What lies behind that size is not cut away unseen.
    path.write_bytes(dump(certificate()).ljust(MAX_CERTIFICATE_BYTES) + b"{}")
    assert "larger than" in answer(path, code=1)["error"]["message"]


def test_a_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    made = sign(statement(source=End("\x1b[2Jone\nresult     valid", "0.1")))
    result = check(saved(tmp_path, made))
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    assert "\\x1b[2Jone\\nresult" in result.stdout


def test_devices_are_read_and_equal(proven: Path, disks: list[Path]) -> None:
    result = check(proven, "--device", disks[0], "--device", disks[1])
    assert result.exit_code == 0
    assert f"{disks[1]} is equal to volume 2" in result.stdout
    assert f"read {disks[0]}" in result.stderr
    shown = answer(proven, "--device", disks[0], "--device", disks[1])
    assert [one["equal"] for one in shown["devices"]] == [True, True]
    assert [one["volume"] for one in shown["devices"]] == [1, 2]
    assert shown["error"] is None


@pytest.mark.parametrize("at", [0, 70_000, SIZES[1] - 1])
def test_a_bit_that_differs_is_found(proven: Path, disks: list[Path], at: int) -> None:
    spoil(disks[1], at)
    shown = answer(proven, "--device", disks[0], "--device", disks[1], code=1)
    assert shown["error"]["reason"] == "DEVICE_DIFFERS"
    assert [one["equal"] for one in shown["devices"]] == [True, False]
    assert shown["valid"]
    assert answer(proven, "--device", disks[1], "--volume", 2, code=1)["error"]
    assert answer(proven, "--device", disks[0], "--volume", 1)["error"] is None


def test_what_lies_behind_the_volume_does_not_count(proven: Path, disks: list[Path]) -> None:
    spoil(disks[1], SIZES[1])
    assert answer(proven, "--device", disks[1], "--volume", 2)["error"] is None


def test_volumes_are_not_taken_for_each_other(proven: Path, disks: list[Path]) -> None:
    result = check(proven, "--device", disks[1], "--volume", 1)
    assert result.exit_code == 1
    assert "is NOT equal to volume 1" in result.stdout


def test_a_block_device(proven: Path, disks: list[Path]) -> None:
    with devices.attached(disks[0]) as path:
        assert answer(proven, "--device", path, "--volume", 1)["devices"][0]["equal"]


def test_a_device_that_cannot_be_compared(proven: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(bytes(SIZES[0] - 1))
    shown = answer(proven, "--device", small, "--volume", 1, code=1)
    assert (shown["error"]["reason"], shown["valid"]) == ("DEVICE_TOO_SMALL", True)
    shown = answer(proven, "--device", tmp_path / "gone", "--volume", 1, code=1)
    assert shown["error"]["reason"] == "DEVICE_NOT_FOUND"


@pytest.mark.parametrize(
    "flags",
    [
        ("--device", "/dev/null"),
        ("--device", "a", "--device", "b", "--device", "c"),
        ("--device", "a", "--device", "b", "--volume", "1"),
        ("--device", "a", "--volume", "0"),
        ("--device", "a", "--volume", "3"),
        ("--volume", "1"),
        ("--source-key", "nonsense"),
        ("--target-key", "SHA256:short"),
    ],
)
def test_usage(proven: Path, flags: tuple[str, ...]) -> None:
    result = check(proven, *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1


def test_usage_without_a_file(tmp_path: Path) -> None:
    assert check().exit_code == 2
    assert check(tmp_path / "gone").exit_code == 2
    assert check(tmp_path).exit_code == 2
