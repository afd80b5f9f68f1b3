"""Migrations to smaller disks: taken if all that is on the source provably ends before theirs."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import devices, filesystems
from tests.agent.resizing.disks import Disk, source_bytes
from tests.content import read_all
from tests.devices import LoopDevice, run
from tests.e2e import agents, disks
from tests.e2e.agents import ROOT, SECONDS, Agent, Pair, Shown
from tests.e2e.test_resize import DOOMED
from tests.filesystems import MIB
from tests.native.tracking import bpffs

ROOM_BYTES = 28 * MIB + 3 * 4096
"""Behind what is on a source."""
EASY = ("--resize", "--max-downtime", "20s")
Pairs = tuple[Disk, Disk]
Move = Callable[..., Pairs]


@pytest.fixture
def move(loop_device: Callable[..., LoopDevice]) -> Move:
    """A source whose content ends `ROOM_BYTES` before it, and a target of garbage that ends there.

    `spare_bytes` more of the target are left.
    """

    def build(
        kind: str = "ext4", scheme: str = "none", sector_size: int = 512, spare_bytes: int = 0
    ) -> Pairs:
        devices.require(kind)
        size = source_bytes(kind, scheme)
        source = Disk(
            loop_device(size + ROOM_BYTES, sector_size).path, size, sector_size, kind, scheme
        )
        source.garbage = False
        source.prepare()
        spoil(source.path, size)
        if scheme == "gpt":  # as a disk has it: at its very end
            relocate = ("--no-reread", "--no-tell-kernel", "--relocate", "gpt-bak-std")
            run("sfdisk", *relocate, source.path)
        path = loop_device(size + spare_bytes, sector_size).path
        disks.soil(path, 2)
        return source, Disk(path, size, sector_size, kind, scheme, source.start_bytes, source.files)

    return build


def spoil(path: str, offset: int) -> None:
    """Fill what lies behind the content with what was there before: not to be missed."""
    with Path(path).open("rb+") as file:
        file.seek(offset)
        file.write(os.urandom(ROOM_BYTES))
        os.fsync(file.fileno())


def start(pair: Pair, *pairs: Pairs, words: tuple[str, ...] = ()) -> str:
    volumes = [(source.path, target.path) for source, target in pairs]
    return pair.start(*EASY, *words, volumes=volumes)


def cut_over(pair: Pair, *pairs: Pairs, words: tuple[str, ...] = ()) -> Shown:
    name = start(pair, *pairs, words=words)
    pair.source.wait(name, "CONVERGED")
    return pair.source.ask("cutover", name)


def assert_same(source: Disk, target: Disk) -> None:
    """What both have is equal, but for the two copies of a GPT; the target is whole."""
    theirs, ours = read_all(source.path), read_all(target.path)
    sector, size = source.sector_size, len(ours)
    assert size < len(theirs)
    first, last = (2 * sector, size - 33 * sector) if target.scheme == "gpt" else (0, size)
    assert theirs[first:last] == ours[first:last]
    if target.scheme != "none":
        assert "No errors" in run("sfdisk", "--verify", "--no-tell-kernel", target.path)
    if target.scheme == "gpt":
        assert_verified_by_sgdisk(target.path)
    target.check(target.old_end_bytes)


def assert_verified_by_sgdisk(path: str) -> None:
    if shutil.which("sgdisk"):
        assert "No problems found" in run("sgdisk", "--verify", path)


def digest(path: str) -> str:
    return hashlib.sha256(read_all(path)).hexdigest()


@pytest.mark.parametrize(
    ("kind", "scheme", "sector_size"),
    [
        ("ext4", "none", 512),
        ("ext4", "none", 4096),
        ("ext4", "gpt", 512),
        ("ext4", "gpt", 4096),
        ("ext4", "mbr", 512),
        ("xfs", "none", 512),
        ("xfs", "gpt", 512),
        ("btrfs", "none", 512),
    ],
)
def test_what_ends_before_the_target_does(
    pair: Pair, move: Move, kind: str, scheme: str, sector_size: int
) -> None:
    source, target = move(kind, scheme, sector_size)
    before = digest(source.path)
    shown = cut_over(pair, (source, target))
    assert shown["state"] == "CUT_OVER"
    [volume] = shown["volumes"]
    assert (volume["size_bytes"], volume["cut_bytes"]) == (target.data_bytes, ROOM_BYTES)
    assert shown["bytes_total"] == target.data_bytes
    [resize] = shown["resizes"]
    assert resize["error"] is None
    assert resize["table_moved"] is (scheme == "gpt")
    assert resize["after_bytes"] == resize["before_bytes"]
    assert pair.target.show(shown["id"])["resizes"] == [resize]
    assert disks.is_free(target.path)
    assert disks.is_fenced(source.path)
    if scheme == "gpt":
        pair.source.refuse("verify", shown["id"], reason="TARGET_RESIZED")
    else:
        assert pair.source.ask("verify", shown["id"])["mismatched_bytes"] == 0
    assert_same(source, target)
    pair.source.ask("rollback", shown["id"])
    assert digest(source.path) == before
    assert not disks.is_fenced(source.path)


def test_a_file_system_that_was_shrunk_for_it(
    pair: Pair, loop_device: Callable[..., LoopDevice]
) -> None:
    size, smaller = 96 * MIB, 48 * MIB
    source = Disk(loop_device(size).path, size, 512, "ext4", "none", garbage=False)
    source.prepare()
    run("e2fsck", "-f", "-p", source.path)
    run("resize2fs", source.path, f"{smaller // 1024}K")
    target = Disk(
        loop_device(smaller).path, smaller, 512, "ext4", "none", files=source.files, garbage=False
    )
    shown = cut_over(pair, (source, target))
    assert shown["volumes"][0]["cut_bytes"] == size - smaller
    assert_same(source, target)


@pytest.mark.parametrize("scheme", ["none", "gpt"])
def test_what_ends_long_before_is_grown_to_the_end(pair: Pair, move: Move, scheme: str) -> None:
    spare = 16 * MIB
    source, target = move("ext4", scheme, 512, spare)
    shown = cut_over(pair, (source, target))
    assert shown["volumes"][0]["cut_bytes"] == ROOM_BYTES - spare
    [resize] = shown["resizes"]
    assert resize["error"] is None
    assert resize["file_system"] == "ext"
    assert resize["after_bytes"] >= resize["before_bytes"] + spare - 8 * MIB
    size = disks.size_of(target.path)
    target.check(size if scheme == "none" else size // MIB * MIB)
    if scheme == "gpt":
        assert resize["table_moved"]
        assert_verified_by_sgdisk(target.path)


def test_a_smaller_and_a_larger_one(
    pair: Pair, move: Move, loop_device: Callable[..., LoopDevice]
) -> None:
    smaller = move("ext4", "gpt")
    source, target = (loop_device(size).path for size in (8 * MIB, 9 * MIB))
    disks.scatter(source, 1)
    larger = (
        Disk(source, 8 * MIB, 512, "", "none"),
        Disk(target, 8 * MIB, 512, "", "none"),
    )
    shown = cut_over(pair, smaller, larger)
    assert [volume["cut_bytes"] for volume in shown["volumes"]] == [ROOM_BYTES, 0]
    assert [one["table_moved"] for one in shown["resizes"]] == [True, False]
    assert shown["resizes"][1]["error"]["reason"] == "GROW_UNSUPPORTED"
    assert_same(*smaller)
    disks.assert_equal(source, target)


def test_what_a_guest_writes_meanwhile_arrives(pair: Pair, move: Move) -> None:
    """Also to the last block that is copied; what it writes behind that is nobody's."""
    source, target = move()
    name = start(pair, (source, target))
    pair.source.wait(name, "CONVERGED")
    with filesystems.opened(source.path, "ext4") as directory:
        (directory / "later").write_bytes(os.urandom(MIB))
        source.files.update(filesystems.digests(directory))
    spoil(source.path, target.data_bytes)
    with Path(source.path).open("rb+") as file:
        file.seek(target.data_bytes - 4096)
        file.write(file.read(4096))
        file.seek(target.data_bytes - 4096)
        os.fsync(file.fileno())
    pair.source.wait(name, "CONVERGED")
    shown = pair.source.ask("cutover", name, "--force")
    assert shown["suspect_volumes"] == 0
    target.files = source.files
    assert_same(source, target)


def test_one_that_grows_past_the_end_is_not_cut_over(pair: Pair, move: Move) -> None:
    """Until it is shrunk again: the source is the owner all the time."""
    source, target = move()
    size = target.data_bytes
    name = start(pair, (source, target))
    pair.source.wait(name, "CONVERGED")
    run("e2fsck", "-f", "-p", source.path)
    run("resize2fs", source.path)
    answer = pair.source.refuse("cutover", name, "--force", reason="SOURCE_DOES_NOT_FIT")
    assert "ext4" in answer.error["message"]
    assert int(answer.error["values"]["needed_bytes"]) > size
    shown = pair.source.wait(name, "SYNCING", "CONVERGED")
    assert shown["owner"] == "source"
    assert shown["last_refusal"]["reason"] == "SOURCE_DOES_NOT_FIT"
    assert not disks.is_fenced(source.path)
    run("e2fsck", "-f", "-p", source.path)
    run("resize2fs", source.path, f"{size // 1024}K")
    pair.source.ask("cutover", name, "--force")
    assert_same(source, target)


def test_a_partition_that_grows_past_the_end_is_not_cut_over(pair: Pair, move: Move) -> None:
    source, target = move("ext4", "gpt")
    name = start(pair, (source, target))
    pair.source.wait(name, "CONVERGED")
    run("sfdisk", "--no-reread", "--no-tell-kernel", "-N", "1", source.path, feed=", +\n")
    answer = pair.source.refuse("cutover", name, "--force", reason="SOURCE_DOES_NOT_FIT")
    assert "partition 1 and the GPT's copy" in answer.error["message"]
    assert not disks.is_fenced(source.path)
    assert pair.source.ask("cancel", name)["state"] == "CANCELLED"


def test_a_guest_that_was_pulled_is_not_cut_over(pair: Pair, move: Move, tmp_path: Path) -> None:
    """What is in the journal is not known; a mount, as the next boot does, empties it."""
    source, target = move()
    name = start(pair, (source, target))
    pair.source.wait(name, "CONVERGED")
    pulled = tmp_path / "pulled"
    with filesystems.opened(source.path, "ext4") as directory:
        (directory / "later").write_bytes(b"more")
        run("sync", "-f", directory)
        source.files.update(filesystems.digests(directory))
        run("dd", f"if={source.path}", f"of={pulled}", "bs=1M", "iflag=direct")
    run("dd", f"if={pulled}", f"of={source.path}", "bs=1M", "conv=fsync")
    answer = pair.source.refuse("cutover", name, "--force", reason="SOURCE_DOES_NOT_FIT")
    assert "was not unmounted" in answer.error["message"]
    with filesystems.opened(source.path, "ext4"):
        pass
    pair.source.ask("cutover", name, "--force")
    target.files = source.files
    assert_same(source, target)


def test_a_cold_migration_stops_and_waits_for_a_person(pair: Pair, move: Move) -> None:
    """To try again and again would keep the VM off for nothing."""
    source, target = move()
    run("debugfs", "-w", "-R", "feature needs_recovery", source.path)
    name = start(pair, (source, target), words=("--cold",))
    shown = pair.source.wait(name, until=lambda now: now["cutover_step"] == "stopped")
    assert shown["last_refusal"]["reason"] == "SOURCE_DOES_NOT_FIT"
    assert shown["owner"] == "source"
    assert not disks.is_fenced(source.path)


def refused(pair: Pair, source: str, target: str, *words: str) -> agents.Answer:
    before = digest(source)
    command = pair.migrate(*EASY, *words, volumes=[(source, target)])
    answer = pair.source.refuse(*command, reason="SOURCE_DOES_NOT_FIT")
    assert pair.source.ask("list")["migrations"] == []
    assert pair.target.ask("list")["migrations"] == []
    assert digest(source) == before
    return answer


def test_what_is_not_known_is_not_begun(pair: Pair, loop_device: Callable[..., LoopDevice]) -> None:
    source, target = loop_device(8 * MIB).path, loop_device(7 * MIB).path
    disks.soil(source, 1)
    answer = refused(pair, source, target)
    assert "nothing that is known, whose end nobody can prove" in answer.error["message"]
    assert answer.error["values"]["needed_bytes"] == "0"
    assert answer.error["values"]["size_bytes"] == str(7 * MIB)
    run("mkswap", source)
    assert "is swap" in refused(pair, source, target).error["message"]


def test_what_ends_behind_the_target_is_not_begun(
    pair: Pair, move: Move, loop_device: Callable[..., LoopDevice]
) -> None:
    source, _ = move()
    small = loop_device(source.data_bytes - 512).path
    answer = refused(pair, source.path, small)
    assert f"ext4, which ends at {source.data_bytes}" in answer.error["message"]
    source, _ = move("ext4", "gpt")
    small = loop_device(source.data_bytes - 2048).path
    answer = refused(pair, source.path, small)
    assert "partition 1 and the GPT's copy" in answer.error["message"]


def test_a_gpt_that_the_target_cannot_have(
    pair: Pair, move: Move, loop_device: Callable[..., LoopDevice]
) -> None:
    source, _ = move("ext4", "gpt", 512)
    answer = refused(pair, source.path, loop_device(source.data_bytes + MIB, 4096).path)
    assert "sectors of 4096" in answer.error["message"]


def test_without_being_asked_it_is_refused(pair: Pair, move: Move) -> None:
    source, target = move()
    command = pair.migrate(volumes=[(source.path, target.path)])
    answer = pair.source.refuse(*command, reason="TARGET_TOO_SMALL")
    assert "--resize" in answer.error["message"]


@pytest.mark.parametrize("carrier", ["tcp", "grpc"])
def test_image_files_are_scanned(pair: Pair, carrier: str) -> None:
    """Their sizes are no round ones; there are holes on both sides of the end."""
    with ExitStack() as stack:
        source = stack.enter_context(devices.image_file(64 * MIB))
        target = stack.enter_context(devices.image_file(64 * MIB + 1000))
        with devices.attached(source) as loop:
            files = filesystems.make(loop, "ext4")
        os.truncate(source, 200 * MIB + 777)
        with source.open("rb+") as file:
            file.seek(150 * MIB)
            file.write(os.urandom(MIB))
        name = pair.start(*EASY, "--carrier", carrier, volumes=[(source, target)])
        pair.source.wait(name, "CONVERGED")
        shown = pair.source.ask("cutover", name)
        assert (shown["tracker"], shown["carrier"]) == ("scan", carrier)
        assert shown["volumes"][0]["size_bytes"] == 64 * MIB + 512
        assert read_all(source)[: 64 * MIB] == read_all(target)[: 64 * MIB]
        run("e2fsck", "-f", "-n", target)
        with devices.attached(target) as loop, filesystems.opened(loop, "ext4", "ro") as directory:
            assert filesystems.digests(directory) == files
        pair.tidy()


class Hosts:
    """Agents that can be started anew in the middle of a test."""

    def __init__(self, directory: Path, pins: Path, stack: ExitStack) -> None:
        self._directory, self._pins, self._stack = directory, pins, stack
        self.pair = Pair(self.start("source"), self.start("target"))

    def start(self, name: str, listen: str = "", command: tuple[str, ...] = ()) -> Agent:
        running = agents.agent(
            name, self._directory, self._pins / name, listen=listen, command=command
        )
        return self._stack.enter_context(running)

    def kill(self, name: str) -> Agent:
        dead: Agent = getattr(self.pair, name)
        dead.ends_well = False
        dead.stop(signal.SIGKILL)
        return dead

    def start_again(self, name: str, command: tuple[str, ...] = ()) -> None:
        agent = self.start(name, getattr(self.pair, name).address, command)
        setattr(self.pair, name, agent)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    devices.require("root", "loop", "bpf")
    with bpffs() as pins, ExitStack() as stack:
        yield Hosts(tmp_path, pins, stack)


def test_both_agents_are_killed_and_go_on(hosts: Hosts, move: Move) -> None:
    source, target = move("ext4", "gpt")
    name = start(hosts.pair, (source, target))
    hosts.pair.source.wait(name, "CONVERGED")
    for end in ("source", "target"):
        hosts.kill(end)
        hosts.start_again(end)
        hosts.pair.source.wait(name, "CONVERGED", "SYNCING")
    shown = hosts.pair.source.wait(name, "CONVERGED")
    assert shown["suspect_volumes"] == 0
    assert shown["volumes"][0]["cut_bytes"] == ROOM_BYTES
    agents.eventually(  # not while it is on its way back
        lambda: hosts.pair.source.run("cutover", name, "--force").code, lambda code: code == 0
    )
    assert_same(source, target)
    hosts.pair.tidy()


def test_a_source_that_changed_its_size_meanwhile(
    hosts: Hosts, move: Move, loop_device: Callable[..., LoopDevice]
) -> None:
    source, target = move()
    name = start(hosts.pair, (source, target))
    hosts.pair.source.wait(name, "CONVERGED")
    hosts.kill("source")
    backing = run("losetup", "--noheadings", "--output", "BACK-FILE", source.path)
    os.truncate(backing, source.data_bytes + ROOM_BYTES + 4096)
    run("losetup", "--set-capacity", source.path)
    hosts.start_again("source")
    shown = agents.eventually(
        lambda: hosts.pair.source.show(name), lambda now: now["state"] == "FAILED"
    )
    assert "had" in shown["error"]["message"]
    assert not disks.is_fenced(source.path)


@pytest.mark.parametrize("piece", [1, 2])
def test_a_target_killed_while_it_moves_the_table(
    hosts: Hosts, tmp_path: Path, move: Move, piece: int
) -> None:
    source, target = move("ext4", "gpt")
    (tmp_path / "sitecustomize.py").write_text(DOOMED.format(piece=piece))
    hosts.kill("target")
    hosts.start_again("target", command=("env", f"PYTHONPATH={tmp_path}:{ROOT}"))
    pair = hosts.pair
    name = start(pair, (source, target))
    pair.source.wait(name, "CONVERGED")
    with pair.source.start("cutover", name) as cutover:
        pair.target.ends_well = False
        assert pair.target.process.wait(SECONDS) == -signal.SIGKILL
        hosts.start_again("target")
        pair.source.wait(
            name, until=lambda now: now["state"] == "CONVERGED" and now["suspect_volumes"] > 0
        )
        assert cutover.wait(SECONDS) == 1
    assert not disks.is_fenced(source.path)
    [resize] = pair.source.ask("cutover", name)["resizes"]
    assert resize["table_moved"]
    assert_same(source, target)
    pair.tidy()
