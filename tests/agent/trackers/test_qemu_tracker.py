"""What is special about bitmaps in QEMU: the chain, what is left behind, other people's bitmaps."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from agent.disk import SourceDisk, open_source
from agent.errors import Unavailable, WarmsyncError
from agent.migration import Scheme, Volume
from native.bitmap import DirtyBitmap
from tests import devices, qemus
from tests.qemus import Qemu

SIZE = 8 << 20
MIB = 1 << 20


@pytest.fixture
def machine(resources: ExitStack) -> Qemu:
    devices.require("qemu", "qemu-system")
    pytest.importorskip("native.nbd", reason="built without libnbd")
    directory = resources.enter_context(devices.scratch_directory())
    qemu = resources.enter_context(qemus.disk(directory, SIZE))
    qemu.start_machine("-S")
    return qemu


@pytest.fixture
def open_disk(machine: Qemu, resources: ExitStack) -> Callable[[], SourceDisk]:
    """`open_disk()`: the disk as an agent has it, not yet tracked."""

    def make() -> SourceDisk:
        path = str(machine.image)
        opened = open_source(Volume(path, path), (path,), machine.seat())
        disk = SourceDisk(opened, Scheme.QEMU, 4096, Path("/nowhere"))
        resources.callback(disk.close)
        return disk

    return make


@pytest.fixture
def disk(open_disk: Callable[[], SourceDisk]) -> SourceDisk:
    disk = open_disk()
    disk.tracker.start()
    return disk


def take(disk: SourceDisk) -> list[int]:
    """Return which MiB of the disk are marked."""
    marks = DirtyBitmap(SIZE, 4096)
    assert not disk.tracker.take(marks).suspect
    return [at // MIB for at in range(0, SIZE, MIB) if marks.is_marked(at)]


def test_a_take_that_was_broken_off_loses_nothing(
    machine: Qemu, disk: SourceDisk, open_disk: Callable[[], SourceDisk]
) -> None:
    machine.write(1, 1 * MIB, MIB)
    # An agent that dies after the transaction has frozen one and read none.
    disk.tracker._rotate(machine.bitmaps()[0], 2)  # type: ignore[attr-defined]
    machine.write(1, 3 * MIB, MIB)
    disk.detach()
    assert len(machine.bitmaps()) == 2
    again = open_disk()
    again.tracker.resume()
    assert again.tracker.look() == 2 * MIB
    assert take(again) == [1, 3]
    assert len(machine.bitmaps()) == 1


def test_an_answer_that_is_lost_while_a_new_chain_begins_loses_nothing(
    machine: Qemu, open_disk: Callable[[], SourceDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next take finds a chain that is whole, and cannot know that there was another."""
    disk = open_disk()
    disk.start()
    disk.pending.clear()
    machine.ask("block-dirty-bitmap-remove", node="disk", name=machine.bitmaps()[0])
    machine.write(1, 3 * MIB, MIB)  # in no bitmap
    add = disk.tracker._add  # type: ignore[attr-defined]

    def add_unheard(number: int) -> None:
        add(number)
        raise Unavailable("QMP_UNREACHABLE", "no answer in 10 s")

    monkeypatch.setattr(disk.tracker, "_add", add_unheard)
    with pytest.raises(Unavailable):
        disk.take(flush=False, at_seconds=0.0)
    assert not disk.take(flush=False, at_seconds=1.0).suspect
    assert disk.pending.count_bytes() == SIZE


def test_bitmaps_of_others_stay(machine: Qemu, disk: SourceDisk) -> None:
    machine.ask("block-dirty-bitmap-add", node="disk", name="backup")
    machine.write(1, 0, MIB)
    assert take(disk) == [0]
    disk.close()
    assert machine.bitmaps() == ["backup"]
    assert machine.exports() == []


def test_what_an_earlier_agent_left_is_removed_at_the_start(
    machine: Qemu, open_disk: Callable[[], SourceDisk]
) -> None:
    stale = f"{machine.seat().prefix}b7"
    machine.ask("block-dirty-bitmap-add", node="disk", name=stale)
    open_disk().tracker.start()
    assert machine.bitmaps() == [f"{machine.seat().prefix}b1"]


def test_a_bitmap_that_another_job_uses_is_refused(
    machine: Qemu, open_disk: Callable[[], SourceDisk]
) -> None:
    name = f"{machine.seat().prefix}b1"
    disk = open_disk()
    machine.ask("block-dirty-bitmap-add", node="disk", name=name, disabled=True)
    machine.ask(
        "block-export-add",
        type="nbd",
        id="backup",
        node_name="disk",
        name="backup",
        bitmaps=[name],
    )
    with pytest.raises(WarmsyncError) as caught:
        disk.tracker.start()
    assert caught.value.reason == "QEMU_BITMAP_IN_USE"
    machine.ask("block-export-del", id="backup", mode="hard")


def test_a_bitmap_that_is_gone_makes_the_disk_suspect(machine: Qemu, disk: SourceDisk) -> None:
    machine.ask("block-dirty-bitmap-remove", node="disk", name=machine.bitmaps()[0])
    assert disk.tracker.look() == SIZE
    marks = DirtyBitmap(SIZE, 4096)
    assert disk.tracker.take(marks).suspect
    assert marks.count_bytes() == SIZE
    machine.write(1, 5 * MIB, MIB)
    assert take(disk) == [5]


def test_a_bitmap_that_was_stopped_makes_the_disk_suspect(machine: Qemu, disk: SourceDisk) -> None:
    machine.ask("block-dirty-bitmap-disable", node="disk", name=machine.bitmaps()[0])
    machine.write(1, 5 * MIB, MIB)
    assert disk.tracker.take(DirtyBitmap(SIZE, 4096)).suspect


def test_a_resized_disk_is_noticed(machine: Qemu, disk: SourceDisk) -> None:
    machine.quit()
    subprocess.run(
        ["qemu-img", "resize", "-q", "-f", "qcow2", machine.image, str(2 * SIZE)], check=True
    )
    machine.start_machine("-S")
    with pytest.raises(WarmsyncError) as caught:
        disk.take(flush=True, at_seconds=1.0)
    assert caught.value.reason == "SOURCE_SIZE_CHANGED"


def test_a_raw_image_is_suspect_once_its_qemu_has_ended(resources: ExitStack) -> None:
    devices.require("qemu", "qemu-system")
    directory = resources.enter_context(devices.scratch_directory())
    qemu = resources.enter_context(qemus.disk(directory, SIZE, "raw"))
    qemu.start_machine("-S")
    path = str(qemu.image)
    opened = open_source(Volume(path, path), (path,), qemu.seat())
    disk = SourceDisk(opened, Scheme.QEMU, 4096, Path("/nowhere"))
    resources.callback(disk.close)
    disk.tracker.start()
    qemu.quit()
    assert disk.tracker.take(DirtyBitmap(SIZE, 4096)).suspect
    assert take(disk) == []


def test_an_old_qcow2_keeps_no_bitmaps(machine: Qemu, resources: ExitStack) -> None:
    machine.quit()
    old = ["qemu-img", "amend", "-f", "qcow2", "-o", "compat=0.10", str(machine.image)]
    subprocess.run(old, check=True)
    machine.start_machine("-S")
    path = str(machine.image)
    opened = open_source(Volume(path, path), (path,), machine.seat())
    disk = SourceDisk(opened, Scheme.QEMU, 4096, Path("/nowhere"))
    resources.callback(disk.close)
    disk.tracker.start()
    machine.write(1, 2 * MIB, MIB)
    assert take(disk) == [2]
    machine.quit()
    assert disk.tracker.take(DirtyBitmap(SIZE, 4096)).suspect


def test_a_qemu_that_ends_within_a_take(
    machine: Qemu, disk: SourceDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.write(1, 2 * MIB, MIB)
    rotate = disk.tracker._rotate  # type: ignore[attr-defined]

    def end(last: str, number: int) -> None:
        machine.quit()
        rotate(last, number)

    monkeypatch.setattr(disk.tracker, "_rotate", end)
    assert take(disk) == [2]
    assert take(disk) == []


def test_who_writes_without_answering_is_not_at_rest(machine: Qemu, disk: SourceDisk) -> None:
    Path(machine.socket).rename(f"{machine.socket}.away")
    with pytest.raises(WarmsyncError) as caught:
        disk.take(flush=True, at_seconds=1.0)
    assert caught.value.reason == "QEMU_GONE"
    Path(f"{machine.socket}.away").rename(machine.socket)
    assert take(disk) == []


def test_the_fence_keeps_other_qemus_out(machine: Qemu, disk: SourceDisk) -> None:
    machine.quit()
    disk.tracker.take(DirtyBitmap(SIZE, 4096))
    disk.fence()
    with suppress(AssertionError):  # it may end before it listens
        machine.start_machine("-S")
    assert machine.process is not None
    assert machine.process.wait(20) == 1
    assert "lock" in (machine.directory / "qemu.log").read_text()
    disk.unfence()
    machine.start_machine("-S")
    assert take(disk) == []
