"""How far what is on a disk reaches: only what is proved to end somewhere may be cut behind it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.layout.partitions import Scheme
from agent.layout.reach import Reach, find_reach
from agent.layout.superblock import _crc32c
from tests import devices, filesystems
from tests.agent.layout.test_disk_layout import DISK_BYTES, bare, damaged, partitioned, reader
from tests.devices import LoopDevice, run
from tests.filesystems import LEAST_BYTES, MIB

ROOM_BYTES = 24 * MIB
"""Behind what is on a disk."""


def reach_of(disk: bytes | bytearray, sector_bytes: int = 512, *, settled: bool = True) -> Reach:
    return find_reach(reader(disk), len(disk), sector_bytes, settled=settled)


def reach_on(path: str | Path, *, settled: bool = True) -> Reach:
    with Path(path).open("rb") as file:
        size = file.seek(0, 2)

        def read(offset: int, length: int) -> bytes:
            assert offset + length <= size, "read beyond the disk"
            file.seek(offset)
            return file.read(length)

        return find_reach(read, size, 512, settled=settled)


@contextmanager
def image(kind: str) -> Iterator[Path]:
    """An image with a file system that ends before it."""
    devices.require(kind)
    with devices.image_file(LEAST_BYTES[kind]) as path:
        run(*filesystems.MAKE[kind], path)
        with path.open("rb+") as file:
            file.truncate(LEAST_BYTES[kind] + ROOM_BYTES)
        yield path


@pytest.fixture
def copied_while_mounted(
    loop_device: Callable[..., LoopDevice], tmp_path: Path
) -> Callable[[str], tuple[Path, Path]]:
    """Return a disk as it is under a running guest that was pulled, and as it was shut down."""

    def build(kind: str) -> tuple[Path, Path]:
        pulled, ended = tmp_path / "pulled", tmp_path / "ended"
        with image(kind) as path, devices.attached(path) as loop:
            with filesystems.opened(loop, kind) as directory:
                filesystems.write_files(directory)
                run("sync", "-f", directory)
                run("cp", "--sparse=always", path, pulled)
            run("cp", "--sparse=always", path, ended)
        return pulled, ended

    return build


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_bare_file_system_ends_where_it_says(kind: str) -> None:
    with image(kind) as path:
        found = reach_on(path)
    assert found.end_bytes == LEAST_BYTES[kind]
    assert found.what.lower() == kind
    assert found.scheme is Scheme.NONE


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_journal_that_is_not_empty_is_in_the_way_once_the_guest_is_off(
    copied_while_mounted: Callable[[str], tuple[Path, Path]], kind: str
) -> None:
    """A resize may be in it. That of btrfs holds no such thing."""
    pulled, ended = copied_while_mounted(kind)
    end = LEAST_BYTES[kind]
    assert reach_on(pulled, settled=False).end_bytes == end
    assert reach_on(pulled, settled=True).end_bytes == (end if kind == "btrfs" else None)
    assert reach_on(ended, settled=True).end_bytes == end


def test_a_log_that_was_used_up_once_and_again() -> None:
    """Its last record is somewhere in the middle, among those of the turn before."""
    with image("xfs") as path, devices.attached(path) as loop:
        with filesystems.opened(loop, "xfs") as directory:
            for turn in range(12):
                for number in range(2000):
                    name = directory / f"{turn % 3}-{number:0>200}"
                    name.unlink() if name.exists() else name.touch()
                run("sync", "-f", directory)
            pulled = path.with_suffix(".pulled")
            run("cp", "--sparse=always", path, pulled)
        assert reach_on(path).end_bytes == LEAST_BYTES["xfs"]
        assert reach_on(pulled).end_bytes is None
        pulled.unlink()


def test_a_last_record_that_is_no_unmount() -> None:
    """It may be one with a single operation, the middle of a long change."""
    with image("xfs") as path:
        disk = bytearray(path.read_bytes())
    records = [at for at in range(0, len(disk), 512) if disk[at : at + 4] == b"\xfe\xed\xba\xbe"]
    assert len(records) == 1
    assert reach_of(disk).end_bytes is not None
    disk[records[0] + 512 + 9] &= ~0x20
    assert reach_of(disk).end_bytes is None
    assert reach_of(disk, settled=False).end_bytes is not None


@pytest.mark.parametrize("scheme", ["gpt", "mbr"])
def test_a_table_ends_behind_its_last_partition(scheme: str) -> None:
    disk = bytearray(partitioned(scheme))
    found = reach_of(disk)
    assert found.scheme is Scheme(scheme)
    assert found.what.startswith("partition 1")
    assert found.end_bytes == DISK_BYTES - (512 if scheme == "gpt" else 0)


def test_what_is_in_a_partition_of_a_gpt_does_not_matter() -> None:
    assert reach_of(partitioned("gpt", ext=False)).end_bytes == DISK_BYTES - 512


def test_an_mbr_in_sectors_of_a_size_that_nobody_knows() -> None:
    """What a partition holds shows how long the sectors are that its numbers count."""
    assert reach_of(partitioned("mbr", ext=False)).end_bytes is None
    with devices.image_file(DISK_BYTES) as path:
        with devices.attached(path, 4096) as loop:
            table = filesystems.table("mbr", 4096, DISK_BYTES)
            run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", loop, feed=table)
        run("mkfs.ext4", "-q", "-E", f"offset={9 * MIB}", path, "20m")
        disk = path.read_bytes()
    assert reach_of(disk, 4096).end_bytes == DISK_BYTES
    assert reach_of(disk, 512).end_bytes is None


MARKS = {
    "swap": (4086, b"SWAPSPACE2", "swap"),
    "lvm": (512, b"LABELONE", "an LVM volume"),
    "luks": (0, b"LUKS\xba\xbe", "an encrypted volume"),
    "md": (4096, b"\xfc\x4e\x2b\xa9", "a member of a RAID"),
    "nothing": (0, b"", "nothing that is known"),
}


@pytest.mark.parametrize("mark", list(MARKS))
def test_what_says_of_no_end_is_in_the_way(mark: str) -> None:
    at, data, name = MARKS[mark]
    disk = bytearray(DISK_BYTES)
    disk[at : at + len(data)] = data
    assert reach_of(disk) == Reach(f"{name}, whose end nobody can prove", None)


@pytest.mark.parametrize("scheme", ["gpt", "mbr", "ext4"])
@pytest.mark.parametrize(
    ("at", "data"),
    [
        (-65536, b"\xfc\x4e\x2b\xa9"),  # md 0.90
        (-8192, b"\xfc\x4e\x2b\xa9"),  # md 1.0
        (-1024, b"Intel Raid ISM Cfg Sig. "),
        (-512, b"\xde\x11\xde\x11"),
        (-512, b"PRIVHEAD"),
        (-4096 + 60, b"\x83\x74\x02\x6b"),  # DRBD 8
    ],
)
def test_what_is_known_by_the_end_of_the_disk_is_in_the_way(
    scheme: str, at: int, data: bytes
) -> None:
    """From the front such a disk looks like what is on it."""
    disk = bytearray(bare("ext4") if scheme == "ext4" else partitioned(scheme))
    disk = disk.ljust(LEAST_BYTES["ext4"] + ROOM_BYTES, b"\0")
    if scheme == "gpt":  # its copy stays where it was: the disk has grown
        assert reach_of(disk).end_bytes is not None
    disk[at : at + len(data) or None] = data
    found = reach_of(disk)
    assert found.end_bytes is None
    assert "RAID" in found.what


@pytest.mark.parametrize(("at", "data"), [(450, b"\x05"), (450, b"\0")], ids=["logical", "untyped"])
def test_partitions_that_an_mbr_does_not_bound_are_in_the_way(at: int, data: bytes) -> None:
    """Linux holds no logical partition to its extended one, and uses entries of type 0."""
    disk = bytearray(partitioned("mbr"))
    assert reach_of(disk).end_bytes is not None
    disk[at : at + 1] = data
    found = reach_of(disk)
    assert found.end_bytes is None
    assert "logical partitions or entries without a type" in found.what


@pytest.mark.parametrize(
    ("at", "data"),
    [(508, b"\xda\xbe"), (0, b"\x0b\xe5\xa9\x41"), (512, b"WEV\x82")],
    ids=["sun", "sgi", "bsd"],
)
def test_a_label_of_another_system_is_in_the_way(at: int, data: bytes) -> None:
    """A file system leaves room for it; the other partitions would be cut."""
    disk = bytearray(bare("ext4").ljust(LEAST_BYTES["ext4"] + ROOM_BYTES, b"\0"))
    assert reach_of(disk).end_bytes is not None
    disk[at : at + len(data)] = data
    assert reach_of(disk).end_bytes is None


def test_an_xfs_with_a_realtime_section_behind_its_blocks_is_in_the_way() -> None:
    disk = bytearray(bare("xfs").ljust(LEAST_BYTES["xfs"] + ROOM_BYTES, b"\0"))
    assert reach_of(disk, settled=False).end_bytes is not None
    disk[288:296] = (LEAST_BYTES["xfs"] // 4096).to_bytes(8, "big")
    disk[224:228] = bytes(4)
    disk[224:228] = _crc32c(bytes(disk[:512])).to_bytes(4, "little")
    found = reach_of(disk, settled=False)
    assert found.end_bytes is None
    assert "damaged" not in found.what


@pytest.mark.parametrize("scheme", ["gpt", "mbr"])
def test_what_else_claims_the_disk_is_in_the_way(scheme: str) -> None:
    disk = bytearray(partitioned(scheme))
    disk[65600:65608] = b"_BHRfS_M"
    found = reach_of(disk)
    assert found.end_bytes is None
    assert "btrfs that both claim the disk" in found.what


@pytest.mark.parametrize("scheme", ["gpt", "mbr"])
def test_a_file_system_larger_than_its_partition_is_in_the_way(scheme: str) -> None:
    disk = bytearray(partitioned(scheme))
    disk[9 * MIB : 9 * MIB + 2 * MIB] = bare("ext4")
    found = reach_of(disk)
    assert found.end_bytes is None
    assert "damaged: it says that it ends at" in found.what


def test_a_table_without_partitions() -> None:
    with devices.image_file(DISK_BYTES) as path:
        run("sfdisk", "--quiet", path, feed="label: gpt\n")
        assert reach_on(path) == Reach("a partition table without partitions", None)


@given(data=st.data(), seed=st.integers(0, 1 << 30), what=st.sampled_from(["gpt", "mbr", "ext4"]))
@settings(max_examples=200)
def test_any_damage_is_in_the_way_or_does_no_harm(
    data: st.DataObject, seed: int, what: str
) -> None:
    disk = damaged(data, seed, what)
    found = reach_of(disk, data.draw(st.sampled_from([512, 4096])))
    assert found.end_bytes is None or 0 < found.end_bytes <= len(disk)


@given(st.binary(max_size=4096), st.integers(0, 100_000), st.booleans())
@settings(max_examples=200)
def test_any_bytes_at_all(data: bytes, size: int, settled: bool) -> None:
    reach_of(data.ljust(size, b"\0"), settled=settled)


@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=60)
def test_any_superblock_of_xfs(xfs_head: bytes, seed: int) -> None:
    """Wherever it says that its log is, and however long."""
    rng = random.Random(seed)
    disk = bytearray(xfs_head.ljust(8 * MIB, b"\0"))
    disk[8:16] = (1024).to_bytes(8, "big")
    disk[100:102] = b"\x00\x04"  # an older one, without a checksum
    for _ in range(rng.randint(1, 4)):
        at = rng.choice((48, 84, 96, 124)) + rng.randrange(4)
        disk[at] = rng.choice((0, 255, rng.randrange(256)))
    reach_of(disk)


@pytest.fixture(scope="module")
def xfs_head() -> bytes:
    return bare("xfs")
