"""Commands of a controller at every moment: cancel, rollback, refused cutovers, verify."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import content, devices
from tests.content import Disk
from tests.devices import LoopDevice
from tests.e2e import disks
from tests.e2e.agents import ENDED, Pair, eventually
from tests.e2e.disks import MIB
from tests.guest import boot as guest_of
from tests.guest import destroy, power_off

SIZE = 32 * MIB
WRITER = ("--rw=randwrite", "--bs=4096", "--rate=8m", "--time_based", "--runtime=600")
SLOW = ("--bandwidth-limit", "2M")
EASY = ("--max-downtime", "20s")
HARD = ("--max-downtime", "1ms")
"""No cutover is as quick as that: the migration stays SYNCING."""


@pytest.fixture
def volume(loop_device: Callable[..., LoopDevice]) -> tuple[str, str]:
    """A filled source and a target with garbage on it."""
    source, target = loop_device(SIZE).path, loop_device(SIZE).path
    content.fill(source, 1)
    disks.soil(target, 2)
    return source, target


@pytest.fixture
def boot(resources: ExitStack) -> Callable[[str], subprocess.Popen[str]]:
    """`boot(path)`: a guest that writes until it is powered off."""

    def start(path: str) -> subprocess.Popen[str]:
        guest = guest_of(path, *WRITER)
        resources.callback(destroy, guest)
        return guest

    return start


def assert_given_up(pair: Pair, name: str, volume: tuple[str, str]) -> None:
    """The source is as if nothing had been; the target is free and known to be incomplete."""
    source, target = volume
    assert not disks.is_fenced(source)
    disks.assert_writable(source)
    # Writes that were under way when the session ended hold the device until they are done.
    eventually(lambda: disks.is_free(target), bool)
    # One that was given up before the first byte is forgotten there.
    for shown in pair.target.ask("list")["migrations"]:
        if shown["id"] == name:
            assert pair.target.wait(name, *ENDED)["incomplete"] is True
    assert not any(name in pin for pin in pair.source.pinned())
    assert not {source, target} & {*pair.source.held(), *pair.target.held()}


CANCELLABLE = {
    "SEEDING": (*SLOW, *EASY),
    "SYNCING": HARD,
    "CONVERGED": EASY,
    "PAUSED": EASY,
}


@pytest.mark.parametrize("tracker", ["ebpf", "scan"])
@pytest.mark.parametrize("state", CANCELLABLE)
def test_cancel(
    pair: Pair,
    volume: tuple[str, str],
    boot: Callable[[str], subprocess.Popen[str]],
    state: str,
    tracker: str,
) -> None:
    guest = boot(volume[0])
    name = pair.start("--tracker", tracker, *CANCELLABLE[state], volumes=[volume])
    if state == "PAUSED":
        pair.source.wait(name, "SEEDING", "SYNCING", "CONVERGED")
        pair.source.ask("pause", name)
    pair.source.wait(name, state)
    assert pair.source.ask("cancel", name)["state"] == "CANCELLED"
    assert_given_up(pair, name, volume)
    assert pair.target.show(name)["state"] == "CANCELLED"
    assert guest.poll() is None  # it was not disturbed
    power_off(guest)
    pair.source.refuse("cancel", name, reason="ILLEGAL_TRANSITION")


def test_cancel_during_the_cutover(pair: Pair, volume: tuple[str, str]) -> None:
    name = pair.start(*EASY, volumes=[volume])
    pair.source.wait(name, "CONVERGED")
    pair.source.ask("pause", name)
    content.fill(volume[0], 3)  # enough to send for a while
    pair.source.ask("update", name, "--bandwidth-limit", "1M")
    pair.source.ask("resume", name)
    with pair.source.start("cutover", name, "--force") as command:
        pair.source.wait(name, "CUTTING_OVER")
        assert pair.source.ask("cancel", name)["state"] == "CANCELLED"
        out, err = command.communicate()
    assert command.returncode == 1
    assert '"CANCELLED"' in out
    assert len(err.splitlines()) == 1
    assert_given_up(pair, name, volume)


@pytest.mark.parametrize("tracker", ["ebpf", "scan"])
@pytest.mark.parametrize("delay_seconds", [0.0, 0.03, 0.1, 0.3, 0.6])
def test_cancel_at_any_moment(
    pair: Pair, volume: tuple[str, str], tracker: str, delay_seconds: float
) -> None:
    name = pair.start("--tracker", tracker, *HARD, volumes=[volume])
    time.sleep(delay_seconds)  # any moment will do
    assert pair.source.ask("cancel", name)["state"] == "CANCELLED"
    assert_given_up(pair, name, volume)


def test_there_is_no_cancel_after_the_cutover(pair: Pair, volume: tuple[str, str]) -> None:
    name = pair.start(*EASY, volumes=[volume])
    pair.source.wait(name, "CONVERGED")
    pair.source.ask("cutover", name)
    pair.source.refuse("cancel", name, reason="ILLEGAL_TRANSITION")
    assert disks.is_fenced(volume[0])


def test_rollback_waits_until_the_target_is_free(
    pair: Pair, volume: tuple[str, str], tmp_path: Path
) -> None:
    source, target = volume
    devices.run("mkfs.ext4", "-q", source)
    name = pair.start(*EASY, volumes=[volume])
    pair.source.wait(name, "CONVERGED")
    pair.source.ask("cutover", name)
    devices.run("mount", target, tmp_path)
    try:
        answer = pair.source.refuse("rollback", name, reason="DEVICE_IN_USE")
        assert str(tmp_path) in answer.error["message"]
        assert pair.source.show(name)["state"] == "CUT_OVER"
        assert disks.is_fenced(source)
    finally:
        devices.run("umount", tmp_path)
    assert pair.source.ask("rollback", name)["state"] == "ROLLED_BACK"
    assert pair.target.show(name)["state"] == "ROLLED_BACK"
    assert not disks.is_fenced(source)
    disks.assert_writable(source)


@pytest.mark.parametrize("tracker", ["ebpf", "scan"])
def test_no_cutover_while_the_guest_writes(
    pair: Pair,
    volume: tuple[str, str],
    boot: Callable[[str], subprocess.Popen[str]],
    tracker: str,
) -> None:
    guest = boot(volume[0])
    name = pair.start("--tracker", tracker, *EASY, volumes=[volume])
    pair.source.wait(name, "CONVERGED")
    answer = pair.source.refuse("cutover", name, "--force", reason="NOT_QUIESCED")
    assert volume[0] in answer.error["message"]
    assert not disks.is_fenced(volume[0])
    assert guest.poll() is None
    rounds = pair.source.show(name)["rounds"]
    shown = pair.source.wait(
        name, until=lambda now: now["rounds"] > rounds and now["state"] == "CONVERGED"
    )
    assert shown["last_refusal"]["reason"] == "NOT_QUIESCED"
    power_off(guest)
    assert pair.source.ask("cutover", name, "--force")["state"] == "CUT_OVER"
    disks.assert_equal(*volume)


def test_no_cutover_of_a_mounted_source(
    pair: Pair, volume: tuple[str, str], tmp_path: Path
) -> None:
    source, _ = volume
    devices.run("mkfs.ext4", "-q", source)
    devices.run("mount", source, tmp_path)
    try:
        name = pair.start(*EASY, volumes=[volume])
        pair.source.wait(name, "CONVERGED")
        (tmp_path / "file").write_text("buffered")
        pair.source.refuse("cutover", name, "--force", reason="NOT_QUIESCED")
        (tmp_path / "other").write_text("still writable")
    finally:
        devices.run("umount", tmp_path)
    pair.source.ask("cutover", name, "--force")
    disks.assert_equal(*volume)


def test_no_early_cutover_unless_forced(pair: Pair, volume: tuple[str, str]) -> None:
    name = pair.start(*SLOW, *HARD, volumes=[volume])
    pair.source.refuse("cutover", name, reason="NOT_CONVERGED")
    # Before round 0 is done there is nothing that force could hand over.
    pair.source.refuse("cutover", name, "--force", reason="ILLEGAL_TRANSITION")
    pair.source.ask("update", name, "--bandwidth-limit", "0")
    pair.source.wait(name, "SYNCING")
    answer = pair.source.refuse("cutover", name, reason="NOT_CONVERGED")
    assert "SYNCING" in answer.error["message"]
    assert pair.source.ask("cutover", name, "--force")["state"] == "CUT_OVER"
    disks.assert_equal(*volume)


def test_pause_keeps_marks_and_sends_nothing(pair: Pair, volume: tuple[str, str]) -> None:
    name = pair.start(*EASY, volumes=[volume])
    pair.source.wait(name, "CONVERGED")
    pair.source.ask("pause", name)
    before = eventually_still(pair, name)
    content.fill(volume[0], 4)
    assert pair.source.show(name)["bytes_sent"] == before
    pair.source.refuse("cutover", name, "--force", reason="ILLEGAL_TRANSITION")
    pair.source.ask("resume", name)
    pair.source.wait(name, "CONVERGED")
    pair.source.ask("cutover", name, "--force")
    assert pair.source.show(name)["bytes_sent"] > before
    disks.assert_equal(*volume)


def eventually_still(pair: Pair, name: str) -> int:
    """What is under way when the pause comes is finished; then nothing more is sent."""
    looks: list[int] = []
    while len(looks) < 5 or len(set(looks[-5:])) > 1:
        looks.append(int(pair.source.show(name)["bytes_sent"]))
        time.sleep(0.2)
    return looks[-1]


def test_a_limit_holds_and_can_be_lifted(pair: Pair, volume: tuple[str, str]) -> None:
    name = pair.start("--bandwidth-limit", "100K", *EASY, volumes=[volume])
    pair.source.wait(name, "SEEDING")
    shown = pair.source.show(name)
    assert shown["bandwidth_limit_bytes_per_second"] == 100 << 10
    assert shown["bytes_sent"] < SIZE // 4
    assert pair.source.ask("update", name, "--bandwidth-limit", "0")["state"] == "SEEDING"
    assert pair.source.wait(name, "CONVERGED")["bytes_sent"] > 0


def test_verify_finds_a_corrupted_block(pair: Pair, volume: tuple[str, str]) -> None:
    name = pair.start(*EASY, volumes=[volume])
    pair.source.wait(name, "CONVERGED")
    assert pair.source.ask("verify", name)["equal"] is True
    pair.source.ask("cutover", name)
    assert pair.source.ask("verify", name)["mismatched_bytes"] == 0
    offset = 5 * MIB + 512
    with Disk(volume[1], writable=True) as disk:
        sector = disk.read(offset, 512)
        disk.write(offset, bytes([sector[0] ^ 1]) + sector[1:])
        os.fsync(disk.fd)
    answer = pair.source.refuse("verify", name, reason="COPIES_DIFFER")
    assert answer.shown["equal"] is False
    assert answer.shown["mismatches"] == [
        {"source": volume[0], "offset_bytes": 5 * MIB, "length_bytes": 65536}
    ]
    assert f"{volume[0]} at {5 * MIB}" in answer.error["message"]


def test_verify_while_the_guest_writes(
    pair: Pair, volume: tuple[str, str], boot: Callable[[str], subprocess.Popen[str]]
) -> None:
    boot(volume[0])
    name = pair.start("--tracker", "ebpf", *EASY, volumes=[volume])
    pair.source.wait(name, "CONVERGED")
    assert pair.source.ask("verify", name)["mismatched_bytes"] == 0


def test_several_migrations_at_once(pair: Pair, resources: ExitStack) -> None:
    loop = disks.KINDS["loop"]
    volumes = [(loop(resources, SIZE), loop(resources, SIZE)) for _ in range(4)]
    for seed, (source, target) in enumerate(volumes):
        content.fill(source, seed)
        disks.soil(target, seed + 100)
    guests = [guest_of(source, *WRITER) for source, _ in volumes]
    for guest in guests:
        resources.callback(destroy, guest)
    trackers = ("ebpf", "scan", "ebpf", "ebpf")
    names = [
        pair.start("--tracker", tracker, *EASY, volumes=[volume])
        for tracker, volume in zip(trackers, volumes, strict=True)
    ]
    for name in names:
        pair.source.wait(name, "CONVERGED")
    pair.source.ask("cancel", names[3])
    for guest in guests:
        power_off(guest)
    commands = [pair.source.start("cutover", "--force", name) for name in names[:3]]
    for command in commands:
        out, err = command.communicate()
        assert command.returncode == 0, (out, err)
    for volume in volumes[:3]:
        disks.assert_equal(*volume)
    assert_given_up(pair, names[3], volumes[3])
