"""A target smaller than its source: what is copied then, and who asks when whether that is all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agent import resize
from agent.config import ResizeConfig
from agent.disk import OpenSource, SourceDisk, open_source
from agent.errors import FailedPrecondition, NotAllowed, NotFound, WarmsyncError
from agent.migration import Owner, Plan, Resize, Scheme, Volume
from agent.peer import DiskSize
from agent.shrinkage import check_fits, fit, measure
from agent.source import cutover as cutover_module
from agent.state import State
from agent.target.growth import Growth
from native.blockio import BlockDevice
from tests import devices, filesystems
from tests.agent.ends import FakeCarrier, FakePeer, Source, source, until
from tests.agent.rpc_helpers import run
from tests.agent.source.test_cutover import refusal, releases, seeded
from tests.filesystems import LEAST_BYTES, MIB

SIZE = LEAST_BYTES["ext4"] + 8 * MIB
DOES_NOT_FIT = FailedPrecondition("SOURCE_DOES_NOT_FIT", "no")


class Peer(FakePeer):
    """One whose host has a disk of a size."""

    def __init__(self, *sizes: DiskSize) -> None:
        super().__init__(FakeCarrier([]))
        self.sizes = list(sizes)

    async def measure(self, targets: Sequence[str]) -> list[DiskSize]:
        self.calls.append(f"measure {', '.join(targets)}")
        return self.sizes


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[OpenSource]:
    """An ext4 that ends 8 MiB before its disk does."""
    devices.require("ext4")
    image = tmp_path / "source.img"
    image.touch()
    with image.open("rb+") as file:
        file.truncate(LEAST_BYTES["ext4"])
        devices.run(*filesystems.MAKE["ext4"], image)
        file.truncate(SIZE)
    found = open_source(Volume(str(image), "/target"), (str(image),))
    yield found
    found.device.close()


def fitted(opened: OpenSource, size: DiskSize) -> Volume:
    [found] = asyncio.run(fit([opened], Peer(size)))
    assert found.device is opened.device
    return found.volume


@pytest.mark.parametrize("more", [0, 1, MIB])
def test_a_target_as_large_is_not_cut(opened: OpenSource, more: int) -> None:
    assert fitted(opened, DiskSize(SIZE + more, 512)) == opened.volume


def test_only_whole_sectors_of_the_source_are_copied(opened: OpenSource) -> None:
    sector = opened.device.logical_block_size_bytes
    volume = fitted(opened, DiskSize(SIZE - MIB - 1, 512))
    assert volume.size_bytes == SIZE - MIB - sector
    assert volume.cut_bytes == MIB + sector


def test_what_ends_with_the_target_fits_and_a_byte_less_does_not(opened: OpenSource) -> None:
    end = LEAST_BYTES["ext4"]
    assert fitted(opened, DiskSize(end, 512)).cut_bytes == 8 * MIB
    with pytest.raises(FailedPrecondition) as caught:
        fitted(opened, DiskSize(end - 1, 512))
    assert caught.value.reason == "SOURCE_DOES_NOT_FIT"
    assert caught.value.values["needed_bytes"] == str(end)
    assert int(caught.value.values["size_bytes"]) < end


def test_what_would_end_the_target_like_a_raid_is_in_the_way(opened: OpenSource) -> None:
    """A mark that is left of what the disk was once, in its middle: at the end it would count."""
    room = LEAST_BYTES["ext4"] + 4 * MIB
    assert fitted(opened, DiskSize(room, 512)).size_bytes == room
    with open(opened.volume.source, "rb+") as file:
        file.seek(room - 8192)
        file.write(b"\xfc\x4e\x2b\xa9")
    with pytest.raises(FailedPrecondition, match="RAID") as caught:
        fitted(opened, DiskSize(room, 512))
    assert caught.value.reason == "SOURCE_DOES_NOT_FIT"


def test_disks_are_measured_only_where_that_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "target.img"
    path.write_bytes(bytes(12345))
    [found] = measure([str(path)], (str(path),))
    assert found.size_bytes == 12345
    with pytest.raises(NotAllowed):
        measure([str(path)], ())
    with pytest.raises(NotFound):
        measure([str(tmp_path / "none")], (f"{tmp_path}/*",))


def cut_disk(opened: OpenSource, directory: Path) -> SourceDisk:
    [found] = asyncio.run(fit([opened], Peer(DiskSize(SIZE - MIB, 512))))
    return SourceDisk(found, Scheme.SCAN, 65536, directory)


def test_a_source_is_as_large_as_it_was(opened: OpenSource, tmp_path: Path) -> None:
    disk = cut_disk(opened, tmp_path)
    disk.check_size()
    check_fits(disk)
    path = Path(opened.volume.source)
    again = open_source(disk.volume, (str(path),))
    assert (again.volume.size_bytes, again.volume.cut_bytes) == (SIZE - MIB, MIB)
    again.device.close()
    with path.open("rb+") as file:
        file.truncate(SIZE + 4096)
    for ask in (disk.check_size, lambda: open_source(disk.volume, (str(path),))):
        with pytest.raises(FailedPrecondition) as caught:
            ask()
        assert caught.value.reason == "SOURCE_SIZE_CHANGED"
        assert caught.value.values["expected_bytes"] == str(SIZE)


def test_of_a_source_that_is_copied_whole_nothing_is_asked(
    opened: OpenSource, tmp_path: Path
) -> None:
    disk = SourceDisk(opened, Scheme.SCAN, 65536, tmp_path)
    Path(opened.volume.source).write_bytes(bytes(SIZE))  # nothing that is known
    check_fits(disk)


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    with source(tmp_path, monkeypatch) as made:
        yield made


def answers(monkeypatch: pytest.MonkeyPatch, answer: Callable[[SourceDisk], None]) -> None:
    monkeypatch.setattr(cutover_module, "check_fits", answer)


def test_it_is_looked_at_again_when_nothing_can_write_any_more(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, list[str]]] = []
    answers(monkeypatch, lambda _: seen.append((end.is_fenced(), releases(end))))

    async def main() -> None:
        await (await seeded(end)).run()
        assert seen == [(True, [])]

    run(main)


def test_what_does_not_fit_any_more_lifts_the_fence(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: SourceDisk) -> None:
        raise DOES_NOT_FIT

    answers(monkeypatch, refuse)

    async def main() -> None:
        cutover = await seeded(end)
        assert await refusal(cutover) is DOES_NOT_FIT
        assert not end.is_fenced()
        assert releases(end) == []
        assert (cutover.fencing, cutover.releasing) == (False, False)

    run(main)


def test_syncing_goes_on_and_the_cutover_can_be_asked_for_again(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[WarmsyncError] = [DOES_NOT_FIT]

    def answer(_: SourceDisk) -> None:
        if errors:
            raise errors.pop()

    answers(monkeypatch, answer)

    async def main() -> None:
        migration = end.migration()
        migration.start()
        await until(migration.bell, lambda: migration.state is State.CONVERGED)
        with pytest.raises(FailedPrecondition):
            await migration.cut_over(force=False)
        await until(migration.bell, lambda: migration.state in (State.SYNCING, State.CONVERGED))
        assert migration.snapshot().refusal is DOES_NOT_FIT
        assert migration.owner is Owner.SOURCE
        await migration.cut_over(force=True)
        assert migration.state is State.CUT_OVER
        await migration.finish()

    run(main)


def test_a_table_that_could_not_be_moved_pauses_and_releases_nothing(end: Source) -> None:
    async def main() -> None:
        end.plan = replace(end.plan, resize=True)
        migration = end.migration()
        end.peer.errors["resize"] = [FailedPrecondition("TABLE_NOT_MOVED", "no")]
        migration.start()
        await until(migration.bell, lambda: migration.state is State.CONVERGED)
        with pytest.raises(FailedPrecondition):
            await migration.cut_over(force=False)
        await until(migration.bell, lambda: migration.state is State.PAUSED)
        assert not end.is_fenced()
        assert releases(end) == []
        await migration.cancel()

    run(main)


def test_a_table_that_cannot_be_moved_is_no_resize_that_came_to_nothing(tmp_path: Path) -> None:
    """What is left of a GPT whose second copy was cut off does not boot."""
    path = tmp_path / "target.img"
    path.write_bytes(bytes(16 * MIB))
    devices.run("sfdisk", "--quiet", path, feed="label: gpt\nsize=4M\n")
    with path.open("rb+") as file:
        file.truncate(8 * MIB)
        file.seek(512 + 16)
        file.write(b"!")
    before = path.read_bytes()
    plan = Plan("web1", "", (Volume("/source", str(path), 8 * MIB, 4096, 8 * MIB),))
    growth = Growth(tmp_path / "resize", plan, ResizeConfig())

    async def main() -> None:
        with BlockDevice(str(path), writable=True, exclusive=True) as device:
            with pytest.raises(FailedPrecondition) as caught:
                await growth.start([device])
            assert caught.value.reason == "TABLE_NOT_MOVED"

    run(main)
    assert path.read_bytes() == before
    assert list((tmp_path / "resize").iterdir()) == []


def test_without_a_cut_no_table_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "target.img"
    path.write_bytes(bytes(MIB))
    monkeypatch.delattr(resize, "move_table")
    plan = Plan("web1", "", (Volume("/source", str(path), MIB, 4096),))
    growth = Growth(tmp_path / "resize", plan, ResizeConfig())

    async def main() -> None:
        with BlockDevice(str(path), writable=True, exclusive=True) as device:
            assert await growth.start([device]) == (Resize(),)

    run(main)
