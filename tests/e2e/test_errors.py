"""What bad input gets: a clear refusal, the right exit code, and nothing left behind.

The table is docs/errors.md; tests/test_error_table.py compares it with the code.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from warmsync.v1 import migration_pb2 as pb
from warmsync.v1 import migration_service_pb2 as service
from warmsync.v1.migration_service_pb2_grpc import MigrationServiceStub

from agent.rpc.errors import from_rpc_error
from native.blockio import BlockDevice
from tests import content, devices
from tests.devices import FaultyDevice, LoopDevice
from tests.e2e import agents, disks
from tests.e2e.agents import Agent, Answer, Pair, agent, eventually
from tests.e2e.disks import MIB

SIZE = 16 * MIB
EASY = ("--max-downtime", "20s")


@pytest.fixture
def volume(loop_device: Callable[..., LoopDevice]) -> tuple[str, str]:
    source = loop_device(SIZE).path
    disks.soil(source, 1)
    return source, loop_device(SIZE).path


def is_untouched(pair: Pair, listed: list[Any]) -> bool:
    """Whether both agents hold and list what they did before, and nothing more."""
    shown = [agent.ask("list")["migrations"] for agent in (pair.source, pair.target)]
    return shown == listed and not any(
        [*pair.source.held(), *pair.target.held(), *pair.source.pinned(), *pair.target.pinned()]
    )


def refused(
    pair: Pair, *words: str, volumes: list[tuple[Any, Any]], reason: str, code: int = 1
) -> Answer:
    """A migration that must be refused before it starts: nobody has changed anything."""
    listed = [agent.ask("list")["migrations"] for agent in (pair.source, pair.target)]
    answer = pair.source.refuse(*pair.migrate(*words, volumes=volumes), reason=reason, code=code)
    assert is_untouched(pair, listed), (pair.source.held(), pair.target.held(), listed)
    return answer


def failed(
    pair: Pair, *words: str, volumes: list[tuple[Any, Any]], reason: str
) -> tuple[str, Answer]:
    """A migration that starts and must fail: the source goes on, the target is given up."""
    request = pair.migrate("--wait", "converged", *words, volumes=volumes)
    answer = pair.source.refuse(*request, reason=reason)
    name = answer.shown["id"]
    assert answer.shown["state"] == "FAILED"
    assert_given_up(pair, name)
    return name, answer


def assert_given_up(pair: Pair, name: str) -> None:
    there = pair.target.wait(name, "FAILED")
    assert there["incomplete"] is True
    for left in (pair.source.held, pair.target.held, pair.source.pinned):
        eventually(left, lambda found: not found)


def test_missing(pair: Pair, volume: tuple[str, str], image_file: Callable[..., Path]) -> None:
    source, target = volume
    missing = image_file(SIZE).with_name("no-disk")
    for volumes in ([(missing, target)], [(source, missing)]):
        answer = refused(pair, volumes=volumes, reason="DEVICE_NOT_FOUND")
        assert answer.error["values"]["path"] == str(missing)
        assert "create it" in answer.error["message"]


def test_neither_device_nor_file(
    pair: Pair, volume: tuple[str, str], image_file: Callable[..., Path]
) -> None:
    source, target = volume
    directory = image_file(SIZE).parent
    (directory / "in").mkdir()
    os.mkfifo(directory / "pipe")
    for name in ("in", "pipe"):
        refused(pair, volumes=[(directory / name, target)], reason="NOT_A_DEVICE")
        refused(pair, volumes=[(source, directory / name)], reason="NOT_A_DEVICE")


@pytest.fixture
def powerless(tmp_path: Path, resources: ExitStack) -> Agent:
    """An agent that the permissions of files hold for."""
    capabilities = "-dac_override,-dac_read_search"
    command = ("setpriv", "--bounding-set", capabilities, "--inh-caps", capabilities)
    return resources.enter_context(agent("powerless", tmp_path, tmp_path / "p", command=command))


def test_no_permission(
    pair: Pair, volume: tuple[str, str], image_file: Callable[..., Path], powerless: Agent
) -> None:
    image = image_file(SIZE)
    image.chmod(0o600)
    os.chown(image, 65534, 65534)
    reason = "PERMISSION_DENIED"
    refused(Pair(powerless, pair.target), volumes=[(image, volume[1])], reason=reason)
    answer = refused(Pair(pair.source, powerless), volumes=[(volume[0], image)], reason=reason)
    assert "run the agent as root" in answer.error["message"]


def test_target_too_small(
    pair: Pair, volume: tuple[str, str], loop_device: Callable[..., LoopDevice]
) -> None:
    small = loop_device(SIZE - 512).path
    answer = refused(pair, volumes=[(volume[0], small)], reason="TARGET_TOO_SMALL")
    assert answer.error["values"]["size_bytes"] == str(SIZE - 512)
    assert answer.error["values"]["needed_bytes"] == str(SIZE)


def test_target_mounted(pair: Pair, volume: tuple[str, str], mounted: Callable[..., Path]) -> None:
    place = mounted(volume[1])
    answer = refused(pair, volumes=[volume], reason="DEVICE_IN_USE")
    assert f"mounted at {place}" in answer.error["message"]


def test_partition_of_the_target_mounted(
    pair: Pair,
    volume: tuple[str, str],
    loop_device: Callable[..., LoopDevice],
    mounted: Callable[..., Path],
) -> None:
    disk = loop_device(2 * SIZE, partitions=True)
    mounted(disk.partitions[0])
    answer = refused(pair, volumes=[(volume[0], disk.path)], reason="DEVICE_IN_USE")
    assert "is mounted" in answer.error["message"]


def test_target_in_use(
    pair: Pair, volume: tuple[str, str], image_file: Callable[..., Path]
) -> None:
    source, target = volume
    with BlockDevice(target, exclusive=True):
        refused(pair, volumes=[volume], reason="DEVICE_IN_USE")
    image = image_file(SIZE)
    with image.open("rb"):  # a VM that has it open need not lock it
        refused(pair, volumes=[(source, image)], reason="DEVICE_IN_USE")


def test_target_read_only(pair: Pair, volume: tuple[str, str]) -> None:
    devices.run("blockdev", "--setro", volume[1])
    answer = refused(pair, volumes=[volume], reason="DEVICE_READ_ONLY")
    assert "blockdev --setrw" in answer.error["message"]


def test_not_allowed(pair: Pair, volume: tuple[str, str], tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(4096))
    for volumes in ([(image, volume[1])], [(volume[0], image)]):
        answer = refused(pair, volumes=volumes, reason="DEVICE_NOT_ALLOWED")
        assert "--allow-device" in answer.error["message"]


def test_same_device(pair: Pair, loop_device: Callable[..., LoopDevice], tmp_path: Path) -> None:
    disk = loop_device(2 * SIZE, partitions=True)
    alias = tmp_path / "alias"
    alias.symlink_to(disk.path)
    for source, target in (
        (disk.path, disk.path),
        (disk.path, alias),
        (disk.partitions[0], disk.path),
        (disk.partitions[0], disk.backing),
        (disk.backing, disk.path),
        (disk.partitions[0], disk.partitions[0]),
    ):
        answer = refused(pair, volumes=[(source, target)], reason="SAME_DEVICE")
        assert str(target) in answer.error["message"]


def test_two_partitions_of_one_disk_are_two_devices(
    pair: Pair, loop_device: Callable[..., LoopDevice]
) -> None:
    disk = loop_device(2 * SIZE + MIB, partitions=True)
    disks.soil(disk.partitions[0], 1)
    name = pair.start(*EASY, volumes=[(disk.partitions[0], disk.partitions[1])])
    pair.source.wait(name, "CONVERGED")
    pair.source.ask("cutover", name)
    disks.assert_equal(*disk.partitions)


def test_device_named_twice(
    pair: Pair, volume: tuple[str, str], loop_device: Callable[..., LoopDevice], tmp_path: Path
) -> None:
    source, target = volume
    other = loop_device(SIZE).path
    alias = tmp_path / "alias"
    alias.symlink_to(source)
    reason = "DUPLICATE_DEVICE"
    refused(pair, volumes=[(source, target), (source, other)], reason=reason)
    refused(pair, volumes=[(source, target), (alias, other)], reason=reason)
    refused(pair, volumes=[(source, target), (other, target)], reason=reason)


def test_target_named_twice_by_another_name(
    pair: Pair, volume: tuple[str, str], loop_device: Callable[..., LoopDevice], tmp_path: Path
) -> None:
    alias = tmp_path / "alias"
    alias.symlink_to(volume[1])
    other = loop_device(SIZE).path
    refused(pair, volumes=[volume, (other, alias)], reason="DEVICE_IN_USE")


def test_device_in_two_migrations(
    pair: Pair, volume: tuple[str, str], loop_device: Callable[..., LoopDevice]
) -> None:
    name = pair.start("--id", "first", "--bandwidth-limit", "100K", volumes=[volume])
    other = loop_device(SIZE).path
    held = pair.source.held(), pair.target.held(), pair.source.pinned()
    for end, pairs, reason in (
        (pair.source, [(volume[0], other)], "DEVICE_IN_MIGRATION"),
        (pair.source, [(other, volume[1])], "DEVICE_IN_USE"),
        (pair.target, [(volume[1], other)], "DEVICE_IN_MIGRATION"),
    ):
        answer = end.refuse(*pair.migrate(volumes=pairs), reason=reason)
        assert held == (pair.source.held(), pair.target.held(), pair.source.pinned()), answer
    assert [shown["id"] for shown in pair.source.ask("list")["migrations"]] == [name]
    assert [shown["id"] for shown in pair.target.ask("list")["migrations"]] == [name]
    assert pair.source.show(name)["state"] == "SEEDING"


def test_duplicate_id(
    pair: Pair, volume: tuple[str, str], loop_device: Callable[..., LoopDevice]
) -> None:
    other = (loop_device(SIZE).path, loop_device(SIZE).path)
    name = pair.start("--id", "vm-7", *EASY, volumes=[volume])
    answer = pair.source.refuse(
        *pair.migrate("--id", name, volumes=[other]), reason="MIGRATION_EXISTS"
    )
    assert "'vm-7'" in answer.error["message"]
    assert pair.source.wait(name, "CONVERGED")["volumes"][0]["source"] == volume[0]


@pytest.mark.parametrize(
    "command", ["show", "watch", "pause", "resume", "cancel", "cutover", "rollback", "finish"]
)
def test_unknown_id(pair: Pair, command: str) -> None:
    answer = pair.source.refuse(command, "nothing", reason="MIGRATION_NOT_FOUND")
    assert "'nothing'" in answer.error["message"]
    assert "warmsync list" in answer.error["message"]


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address that nobody listens on, and nobody else gets."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def test_peer_unreachable(pair: Pair, volume: tuple[str, str], nobody: str) -> None:
    words = ["migrate", "--peer", nobody, "--volume", ":".join(volume)]
    answer = pair.source.refuse(*words, reason="PEER_UNREACHABLE")
    assert answer.error["message"].startswith(f"cannot reach {nobody} ")
    assert is_untouched(pair, [[], []])


def test_target_asked_instead_of_source(pair: Pair, volume: tuple[str, str]) -> None:
    name = pair.start(*EASY, volumes=[volume])
    answer = pair.target.refuse("pause", name, reason="NOT_THE_SOURCE")
    assert "ask the agent of its source" in answer.error["message"]


@pytest.mark.parametrize("size", ["1000", "12K", "2K", "32M"])
def test_block_size(pair: Pair, volume: tuple[str, str], size: str) -> None:
    answer = refused(pair, "--block-size", size, volumes=[volume], reason="INVALID_BLOCK_SIZE")
    assert "power of two" in answer.error["message"]


def test_zeros_on_the_command_line_are_mistakes(pair: Pair, volume: tuple[str, str]) -> None:
    for flag in ("--block-size", "--max-downtime"):
        refused(pair, flag, "0", volumes=[volume], reason="USAGE", code=2)


def test_budget_of_zero(pair: Pair, volume: tuple[str, str]) -> None:
    source, target = volume
    request = service.CreateMigrationRequest(
        migration=pb.Migration(
            peer=pair.target.address,
            volumes=[pb.Volume(source=source, target=target)],
            max_downtime_seconds=0,
        )
    )
    with grpc.insecure_channel(pair.source.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            MigrationServiceStub(channel).CreateMigration(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert from_rpc_error(caught.value).reason == "INVALID_BUDGET"
    assert is_untouched(pair, [[], []])
    name = pair.start(*EASY, volumes=[volume])
    pair.source.refuse("update", name, "--max-downtime", "0", reason="INVALID_BUDGET")
    assert pair.source.show(name)["max_downtime_seconds"] == 20


def test_tracker_that_cannot(
    pair: Pair, volume: tuple[str, str], image_file: Callable[..., Path]
) -> None:
    refused(pair, "--tracker", "qemu", volumes=[volume], reason="QMP_NOT_ALLOWED")
    image = image_file(SIZE)
    reason = "TRACKER_UNSUITABLE"
    refused(pair, "--tracker", "ebpf", volumes=[(image, volume[1])], reason=reason)
    # The id is free again.
    pair.start("--id", "again", volumes=[volume])


@pytest.mark.parametrize("size_bytes", [SIZE - 4096, SIZE + 4096])
def test_source_changes_its_size(
    pair: Pair, loop_device: Callable[..., LoopDevice], size_bytes: int
) -> None:
    source, target = loop_device(SIZE), loop_device(SIZE)
    name = pair.start(*EASY, volumes=[(source.path, target.path)])
    pair.source.wait(name, "CONVERGED")
    os.truncate(source.backing, size_bytes)
    devices.run("losetup", "--set-capacity", source.path)
    shown = eventually(lambda: pair.source.show(name), lambda now: now["state"] == "FAILED")
    assert shown["error"]["reason"] == "SOURCE_SIZE_CHANGED"
    assert shown["error"]["values"]["size_bytes"] == str(size_bytes)
    assert_given_up(pair, name)
    pair.source.refuse("watch", name, reason="SOURCE_SIZE_CHANGED")


def test_target_shrinks(pair: Pair, loop_device: Callable[..., LoopDevice]) -> None:
    source, target = loop_device(SIZE), loop_device(SIZE)
    name = pair.start(*EASY, volumes=[(source.path, target.path)])
    pair.source.wait(name, "CONVERGED")
    os.truncate(target.backing, SIZE // 2)
    devices.run("losetup", "--set-capacity", target.path)
    answer = pair.source.refuse("cutover", name, reason="TARGET_TOO_SMALL")
    assert target.path in answer.error["message"]
    assert_given_up(pair, name)
    assert not disks.is_fenced(source.path)
    disks.assert_writable(source.path)


def test_target_disk_full(pair: Pair, volume: tuple[str, str], resources: ExitStack) -> None:
    directory = resources.enter_context(devices.scratch_directory())
    devices.run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", directory)
    resources.callback(devices.run, "umount", directory)
    image = directory / "disk.img"
    image.touch()
    os.truncate(image, SIZE)
    name, answer = paused(pair, (volume[0], str(image)), reason="DISK_FULL")
    assert answer.error["values"] == {"path": str(image), "errno": "ENOSPC", "side": "target"}
    assert "free space" in answer.error["message"]
    devices.run("mount", "-o", f"remount,size={2 * SIZE}", directory)
    hand_over(pair, name, (volume[0], str(image)))


def paused(pair: Pair, volume: tuple[str, str], reason: str) -> tuple[str, Answer]:
    """Start a migration that pauses for a reason, the source untouched; return its id."""
    words = pair.migrate(*EASY, "--wait", "converged", "--id", "mended", volumes=[volume])
    answer = pair.source.refuse(*words, reason=reason)
    shown = pair.source.show("mended")
    assert (shown["state"], shown["last_refusal"]["reason"]) == ("PAUSED", reason)
    disks.assert_writable(volume[0])
    return "mended", answer


def hand_over(pair: Pair, name: str, volume: tuple[str, str]) -> None:
    """What was in the way is mended: go on to the end."""
    pair.source.ask("resume", name)
    pair.source.wait(name, "CONVERGED")
    assert pair.source.ask("cutover", name)["state"] == "CUT_OVER"
    disks.assert_equal(*volume)


@pytest.mark.parametrize("tracker", ["ebpf", "scan"])
def test_source_fails_from_the_start(
    pair: Pair, volume: tuple[str, str], faulty_device: Callable[..., FaultyDevice], tracker: str
) -> None:
    source = faulty_device(SIZE)
    content.fill(source.path, 1)
    words = pair.migrate(
        "--tracker", tracker, "--wait", "converged", volumes=[(source.path, volume[1])]
    )
    with source.failing("pread"):
        answer = pair.source.refuse(*words, reason="SOURCE_IO_ERROR")
    assert answer.error["values"]["errno"] == "EIO"
    assert source.path in answer.error["message"]
    disks.assert_writable(source.path)


@pytest.mark.parametrize("tracker", ["ebpf", "scan"])
def test_source_fails_later(
    pair: Pair, volume: tuple[str, str], faulty_device: Callable[..., FaultyDevice], tracker: str
) -> None:
    source = faulty_device(SIZE)
    content.fill(source.path, 1)
    name = pair.start("--tracker", tracker, *EASY, volumes=[(source.path, volume[1])])
    pair.source.wait(name, "CONVERGED")
    with source.failing("pread"):
        disks.soil(source.path, 2)
        shown = eventually(lambda: pair.source.show(name), lambda now: now["state"] == "FAILED")
    assert shown["error"]["reason"] == "SOURCE_IO_ERROR"
    assert_given_up(pair, name)
    disks.assert_writable(source.path)


def test_target_fails(
    pair: Pair, volume: tuple[str, str], faulty_device: Callable[..., FaultyDevice]
) -> None:
    target = faulty_device(SIZE)
    with target.failing("pwrite", "zero", "trim"):
        name, answer = paused(pair, (volume[0], target.path), reason="TARGET_IO_ERROR")
    assert answer.error["values"] == {"path": target.path, "errno": "EIO", "side": "target"}
    hand_over(pair, name, (volume[0], target.path))


def test_target_fails_in_the_cutover(
    pair: Pair, volume: tuple[str, str], faulty_device: Callable[..., FaultyDevice]
) -> None:
    target = faulty_device(SIZE)
    name = pair.start(*EASY, volumes=[(volume[0], target.path)])
    pair.source.wait(name, "CONVERGED")
    pair.source.ask("pause", name)
    with target.failing("pwrite", "zero", "trim"):
        disks.soil(volume[0], 3)
        pair.source.ask("resume", name)
        shown = eventually(lambda: pair.source.show(name), lambda now: bool(now["last_refusal"]))
        assert shown["last_refusal"]["reason"] == "TARGET_IO_ERROR"
    assert not disks.is_fenced(volume[0])
    hand_over(pair, name, (volume[0], target.path))


def test_agent_unreachable(nobody: str) -> None:
    done = agents.run("show", "x", "--agent", nobody)
    done_reason = done.error["reason"]
    assert (done.code, done_reason) == (1, "PEER_UNREACHABLE")
