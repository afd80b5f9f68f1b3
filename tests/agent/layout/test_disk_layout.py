"""What is on a disk, told from its bytes: real tables and file systems, and any damage to them."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import FailedPrecondition
from agent.layout import Layout, find_layout
from agent.layout.partitions import Scheme, find_table
from agent.layout.superblock import Kind, Read
from tests import devices, filesystems
from tests.devices import run
from tests.filesystems import LEAST_BYTES, MIB

DISK_BYTES = 32 * MIB


def reader(disk: bytes | bytearray) -> Read:
    def read(offset: int, length: int) -> bytes:
        assert offset >= 0
        assert offset + length <= len(disk), "read beyond the disk"
        return bytes(disk[offset : offset + length])

    return read


def layout_of(disk: bytes | bytearray, sector_bytes: int = 512) -> Layout:
    return find_layout(reader(disk), len(disk), sector_bytes)


def layout_or_none(disk: bytes | bytearray, sector_bytes: int = 512) -> Layout | None:
    """Return the layout, None if it is told that there is damage. Any other error is one."""
    try:
        return layout_of(disk, sector_bytes)
    except FailedPrecondition as error:
        if error.reason not in ("TABLE_DAMAGED", "FILE_SYSTEM_DAMAGED"):
            raise
        return None


@cache
def partitioned(scheme: str, ext: bool = True) -> bytes:
    """A disk with two partitions, the first of which in place is the second in number."""
    with devices.image_file(DISK_BYTES) as path:
        run("sfdisk", "--quiet", path, feed=filesystems.table(scheme, 512, DISK_BYTES))
        if ext:
            length = DISK_BYTES - 9 * MIB - 34 * 512
            run("mkfs.ext4", "-q", "-E", f"offset={9 * MIB}", path, str(length // 1024) + "k")
        return path.read_bytes()


@cache
def bare(kind: str) -> bytes:
    devices.require(kind)
    with devices.image_file(LEAST_BYTES[kind]) as path:
        run(*filesystems.MAKE[kind], path)
        with path.open("rb") as file:
            return file.read(2 * MIB)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_bare_file_system_says_how_large_it_is(kind: str) -> None:
    disk = bare(kind).ljust(LEAST_BYTES[kind] + 8 * MIB, b"\0")
    found = layout_of(disk)
    assert found.table.scheme is Scheme.NONE
    assert found.content.kind.value in kind
    assert found.content.size_bytes == LEAST_BYTES[kind]
    found.check_growable()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_file_system_that_is_cut_off_is_damaged(kind: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        layout_of(bare(kind))
    assert caught.value.reason == "FILE_SYSTEM_DAMAGED"


def test_one_beyond_32_bits() -> None:
    """ext4 of 2^33 blocks: the upper half of the count lies elsewhere in the superblock."""
    with devices.image_file(64 << 40) as path:
        run("mkfs.ext4", "-q", "-F", "-O", "64bit,^resize_inode", "-n", path)  # it is possible
    head = bytearray(bare("ext4"))
    head[1024 + 96] |= 0x80
    head[1024 + 100 + 1] &= ~0x04  # without its checksum, as this one is forged
    head[1024 + 0x150 : 1024 + 0x154] = (2).to_bytes(4, "little")
    low = int.from_bytes(head[1028:1032], "little")
    size = (low + (2 << 32)) * 1024

    def read(offset: int, length: int) -> bytes:
        return bytes(head[offset : offset + length]).ljust(length, b"\0")

    assert find_layout(read, 1 << 50, 512).content.size_bytes == size


@pytest.mark.parametrize("scheme", ["mbr", "gpt"])
def test_the_last_partition_is_the_one_that_ends_last(scheme: str) -> None:
    found = layout_of(partitioned(scheme))
    assert found.table.scheme is Scheme(scheme)
    assert found.table.last is not None
    assert found.table.last.number == 1
    assert found.content.start_bytes == 9 * MIB
    assert found.content.kind is Kind.EXT
    gpt_bytes = 33 * 512 if scheme == "gpt" else 0
    assert found.table.least_bytes == found.table.last.end_bytes + gpt_bytes


@pytest.mark.parametrize("scheme", ["mbr", "gpt"])
@pytest.mark.parametrize("size", [DISK_BYTES, DISK_BYTES + 512, 47 * MIB + 3 * 512, 64 * MIB])
def test_what_is_rewritten_is_what_sfdisk_takes_for_whole(scheme: str, size: int) -> None:
    table = layout_of(partitioned(scheme)).table.grown(size)
    with devices.image_file(size, partitioned(scheme)) as path:
        apply(path, table.patches(size))
        assert "No errors" in run("sfdisk", "--verify", path)
        found = json.loads(run("sfdisk", "--json", path))["partitiontable"]
        data = path.read_bytes()
    assert find_table(reader(data), size, 512).partitions == table.partitions
    last = found["partitions"][0]
    room = size - (33 * 512 if scheme == "gpt" else 0)
    old = DISK_BYTES - (34 * 512 if scheme == "gpt" else 0)
    assert (last["start"] + last["size"]) * 512 == max(old, room - room % MIB)
    if scheme == "gpt":
        assert found["lastlba"] == size // 512 - 34
        assert data.count(b"EFI PART") == 2


def apply(path: Path, patches: list[tuple[int, bytes]]) -> None:
    with path.open("rb+") as file:
        for offset, data in patches:
            file.seek(offset)
            file.write(data)


def test_an_mbr_ends_where_its_numbers_do() -> None:
    table = layout_of(partitioned("mbr")).table.grown(5 << 40)
    assert table.last is not None
    assert table.last.end_bytes == (0xFFFFFFFF * 512) // MIB * MIB
    patches = table.patches(5 << 40)
    boot = bytearray(partitioned("mbr"))
    boot[0:512] = patches[0][1]
    found = find_table(lambda at, n: bytes(boot[at : at + n]).ljust(n, b"\0"), 5 << 40, 512)
    assert found.partitions == table.partitions


def test_a_table_for_a_smaller_disk() -> None:
    table = layout_of(partitioned("gpt", ext=False)).table
    assert table.least_bytes == DISK_BYTES - 512
    with pytest.raises(ValueError, match="a table of"):
        table.patches(DISK_BYTES - 1024)


def test_a_table_and_a_file_system_that_both_claim_the_disk() -> None:
    disk = bytearray(bare("ext4").ljust(LEAST_BYTES["ext4"], b"\0"))
    disk[440:512] = partitioned("mbr")[440:512]
    found = layout_of(disk)
    with pytest.raises(FailedPrecondition) as caught:
        found.check_growable()
    assert caught.value.reason == "GROW_UNSUPPORTED"


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1024, 1536, 2048, 4096, 70000])
def test_tiny_disks(size: int) -> None:
    assert layout_of(bytes(size)).content.kind is Kind.UNKNOWN


def ranges(disk: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Where something is that is looked at."""
    yield from ((0, 512), (512, 1024), (1024, 2048), (1024 + 16384 - 512, 1024 + 16384))
    yield from ((65536, 69632), (len(disk) - 34 * 512, len(disk)), (9 * MIB + 1024, 9 * MIB + 2048))


def damaged(data: st.DataObject, seed: int, what: str) -> bytearray:
    """A disk that is spoilt in a few of the places that tell of its layout."""
    disk = bytearray(bare("ext4") if what == "ext4" else partitioned(what))
    rng = random.Random(seed)
    places = [place for place in ranges(disk) if place[1] <= len(disk)]
    for _ in range(data.draw(st.integers(1, 12))):
        low, high = data.draw(st.sampled_from(places))
        at = rng.randrange(low, high)
        width = rng.choice((1, 1, 2, 4, 8, 64))
        disk[at : at + width] = rng.choice((rng.randbytes(width), b"\xff" * width, bytes(width)))
    del disk[DISK_BYTES:]
    return disk


@given(data=st.data(), seed=st.integers(0, 1 << 30), what=st.sampled_from(["gpt", "mbr", "ext4"]))
@settings(max_examples=300)
def test_any_damage_is_told_or_does_no_harm(data: st.DataObject, seed: int, what: str) -> None:
    """Whatever stands there: the layout as it was, another that is whole, or the error for it."""
    disk = damaged(data, seed, what)
    sector_bytes = data.draw(st.sampled_from([512, 4096]))
    found = layout_or_none(disk, sector_bytes)
    if found is None:
        return
    for part in found.table.partitions:
        assert 0 < part.start_bytes <= part.end_bytes <= len(disk)
    if found.content.kind is not Kind.UNKNOWN:
        assert found.content.end_bytes <= len(disk)
    grown = found.table.grown(2 * DISK_BYTES)
    if grown.scheme is not Scheme.NONE:
        for offset, patch in grown.patches(2 * DISK_BYTES):
            assert offset >= 0
            assert offset + len(patch) <= 2 * DISK_BYTES


@given(st.binary(max_size=4096), st.integers(0, 100_000))
@settings(max_examples=200)
def test_any_bytes_at_all(data: bytes, size: int) -> None:
    layout_or_none(data.ljust(size, b"\0"))


def test_two_copies_that_differ() -> None:
    """Each is whole, but one was written and the other was not."""
    table = layout_of(partitioned("gpt")).table
    shorter = (replace(table.partitions[0], end_bytes=20 * MIB), *table.partitions[1:])
    disk = bytearray(partitioned("gpt"))
    for offset, data in replace(table, partitions=shorter).patches(DISK_BYTES):
        if offset < 9 * MIB:
            disk[offset : offset + len(data)] = data
    with pytest.raises(FailedPrecondition) as caught:
        find_table(reader(disk), DISK_BYTES, 512)
    assert "copies of the GPT differ" in str(caught.value)


def test_entries_among_the_partitions() -> None:
    """They would be written to, wherever they lie. Both copies are whole but for that."""
    disk = bytearray(partitioned("gpt"))
    entries = disk[1024 : 1024 + 128 * 128]
    place = 2 * MIB // 512
    disk[2 * MIB : 2 * MIB + len(entries)] = entries
    head = bytearray(disk[512:604])
    struct.pack_into("<Q", head, 72, place)
    head[16:20] = bytes(4)
    struct.pack_into("<I", head, 16, zlib.crc32(head))
    disk[512:604] = head
    with pytest.raises(FailedPrecondition, match="where partitions may be") as caught:
        find_table(reader(disk), DISK_BYTES, 512)
    assert caught.value.reason == "TABLE_DAMAGED"


@pytest.mark.parametrize(
    "at", [512 + 16, 512 + 72, 1024 + 33, -512 + 20, -512 + 40, -33 * 512 + 40]
)
def test_one_byte_of_a_gpt(at: int) -> None:
    disk = bytearray(partitioned("gpt"))
    disk[at] ^= 1
    with pytest.raises(FailedPrecondition) as caught:
        layout_of(disk)
    assert caught.value.reason == "TABLE_DAMAGED"
