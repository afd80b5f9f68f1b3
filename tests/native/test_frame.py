"""Frames: the layout, there and back against a Python twin, and refusal of all that is wrong."""

from __future__ import annotations

import errno
import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from native import chunk, frame
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from tests import content, devices
from tests.devices import FaultyDevice, LoopDevice
from tests.native import frames
from tests.native.frames import DATA, DISCARD, ZERO, Header, Piece, encode

MIB = 1 << 20
LABELS = {"volume": 7, "generation": 8, "sequence": 9}
gather = partial(frame.gather, volume=7, generation=8, sequence=9)
TARGET: Any = {"volume": 7, "generation": 8}


@pytest.fixture
def scratch() -> AlignedBuffer:
    return AlignedBuffer(MIB)


def flat(extents: list[tuple[int, int]]) -> array[int]:
    return array("Q", [number for extent in extents for number in extent])


def gathered(device: BlockDevice, extents: list[tuple[int, int]], min_zero: int = 65536) -> bytes:
    scratch = AlignedBuffer(max(1, sum(length for _, length in extents)))
    return gather(device, flat(extents), scratch, min_zero_bytes=min_zero)


def sparse(rng: random.Random, grains: int) -> bytes:
    """Grains that are zero, zero but for one byte, or random."""
    kinds = rng.choices(("zero", "zero", "one", "random"), k=grains)
    return b"".join(grain(rng, kind) for kind in kinds)


def grain(rng: random.Random, kind: str) -> bytes:
    data = bytearray(rng.randbytes(4096) if kind == "random" else 4096)
    if kind == "one":
        data[rng.choice((0, 4095, rng.randrange(4096)))] = 1
    return bytes(data)


def random_extents(rng: random.Random, size: int, unit: int) -> list[tuple[int, int]]:
    """Ascending extents on borders of `unit`; one may end with the volume."""
    borders = [*range(0, size, unit), size]
    cuts = sorted(rng.sample(borders, min(len(borders), rng.randrange(2, 40))))
    extents = [(a, b - a) for a, b in pairwise(cuts)]
    return [extent for extent in extents if rng.random() < 0.7] or extents[:1]


class TestLayout:
    def test_gather_writes_what_the_twin_writes(self, image_file: Callable[..., Path]) -> None:
        rng = random.Random(1)
        disk = sparse(rng, 200) + b"tail"
        extents = [(0, 299_520), (303_104, 4096), (311_296, len(disk) - 311_296)]
        with BlockDevice(str(image_file(len(disk), disk))) as device:
            for min_zero in (0, 1, 4096, 8192, 65536):
                pieces = frames.plan(disk, extents, min_zero)
                expected = encode(pieces, frames.payload_of(disk, pieces))
                assert gathered(device, extents, min_zero) == expected

    def test_inspect_and_extents_say_what_the_twin_put_in(self) -> None:
        pieces = [Piece(0, 3, DATA), Piece(512, 1 << 40, ZERO), Piece(1 << 50, 1, DISCARD)]
        data = encode(pieces, b"abc")
        assert frame.inspect(data) == (7, 8, 9, 3, 3)
        assert frame.extents(data) == [(p.offset, p.length, p.kind) for p in pieces]
        assert frame.inspect(memoryview(b"x" + data)[1:]).sequence == 9

    def test_zeros(self) -> None:
        data = frame.zeros(flat([(0, 1 << 40), (1 << 41, 5)]), **LABELS)
        assert data == encode([Piece(0, 1 << 40, ZERO), Piece(1 << 41, 5, ZERO)], b"")

    def test_constants(self) -> None:
        assert (frame.DATA, frame.ZERO, frame.DISCARD) == (DATA, ZERO, DISCARD)
        table = frame.MAX_EXTENTS * frames.EXTENT.size
        assert frames.HEADER.size + table + frame.MAX_PAYLOAD_BYTES == frame.MAX_FRAME_BYTES

    def test_a_table_has_a_limit(self) -> None:
        extents = [(2 * i, 1) for i in range(frame.MAX_EXTENTS + 1)]
        data = frame.zeros(flat(extents[1:]), **LABELS)
        assert frame.inspect(data).extent_count == frame.MAX_EXTENTS
        with pytest.raises(ValueError, match="4097 extents"):
            frame.zeros(flat(extents), **LABELS)


def check(
    paths: tuple[str, str],
    disk: bytes,
    before: bytearray,
    extents: list[tuple[int, int]],
    min_zero: int,
) -> None:
    """Move extents from one to the other, and do the same with the twin."""
    with BlockDevice(paths[0]) as source, BlockDevice(paths[1], writable=True) as target:
        data = gathered(source, extents, min_zero)
        applied = frame.scatter(target, data, AlignedBuffer(MIB), size_bytes=len(disk), **TARGET)
    pieces = frames.plan(disk, extents, min_zero)
    payload = frames.payload_of(disk, pieces)
    assert frame.extents(data) == [(p.offset, p.length, p.kind) for p in pieces]
    assert applied == (len(payload), sum(p.length for p in pieces if p.kind == ZERO), 0)
    frames.apply(before, pieces, payload)
    assert content.read_all(paths[1]) == before
    assert all(before[o : o + n] == disk[o : o + n] for o, n in extents)


class TestThereAndBack:
    @settings(suppress_health_check=[HealthCheck.too_slow])
    @given(
        seed=st.integers(0, 2**32), grains=st.integers(1, 120), unit=st.sampled_from([512, 4096])
    )
    def test_files_of_any_size(self, seed: int, grains: int, unit: int) -> None:
        rng = random.Random(seed)
        disk = sparse(rng, grains)[: -rng.randrange(1, 4096)]
        before = bytearray(rng.randbytes(len(disk)))
        extents = random_extents(rng, len(disk), unit)
        min_zero = rng.choice((1, 4096, 16384, 65536))
        with (
            devices.image_file(len(disk), disk) as left,
            devices.image_file(len(disk), bytes(before)) as right,
        ):
            check((str(left), str(right)), disk, before, extents, min_zero)

    @pytest.mark.parametrize("sector_size", [512, 4096])
    def test_devices(self, loop_device: Callable[..., LoopDevice], sector_size: int) -> None:
        size = 800_768 if sector_size == 512 else 798_720
        left, right = loop_device(size, sector_size), loop_device(size, sector_size)
        for seed in range(25):
            rng = random.Random(seed)
            disk, before = sparse(rng, 196)[:size], bytearray(rng.randbytes(size))
            write_all(left.path, disk)
            write_all(right.path, bytes(before))
            extents = random_extents(rng, size, sector_size)
            check((left.path, right.path), disk, before, extents, rng.choice((1, 8192, 65536)))

    def test_a_volume_that_ends_within_a_block_of_its_larger_target(
        self, loop_device: Callable[..., LoopDevice], scratch: AlignedBuffer
    ) -> None:
        # 512-byte sectors at the source, 4096 at the target: what is behind the volume stays.
        size, disk = 3 * 4096 + 512, random.Random(5).randbytes(3 * 4096 + 512)
        target = loop_device(16384, 4096)
        write_all(target.path, b"\xee" * 16384)
        with BlockDevice(target.path, writable=True) as device:
            data = encode([Piece(0, size, DATA)], disk)
            frame.scatter(device, data, scratch, size_bytes=size, **TARGET)
            assert content.read_all(target.path) == disk + b"\xee" * 3584
            data = encode([Piece(8192, size - 8192, ZERO)], b"")
            frame.scatter(device, data, scratch, size_bytes=size, **TARGET)
        assert content.read_all(target.path) == disk[:8192] + bytes(4608) + b"\xee" * 3584

    def test_discard(self, loop_device: Callable[..., LoopDevice], scratch: AlignedBuffer) -> None:
        target = loop_device(MIB)
        write_all(target.path, b"\xee" * MIB)
        with BlockDevice(target.path, writable=True) as device:
            data = encode([Piece(4096, 8192, DISCARD)], b"")
            applied = frame.scatter(device, data, scratch, size_bytes=MIB, **TARGET)
        assert applied == (0, 0, 8192)
        expected = b"\xee" * 4096 + bytes(8192) + b"\xee" * (MIB - 12288)
        assert content.read_all(target.path) == expected


class TestDigests:
    def test_gather_fills_the_table_with_what_it_read(
        self, image_file: Callable[..., Path], scratch: AlignedBuffer
    ) -> None:
        rng = random.Random(3)
        disk = rng.randbytes(65536) + bytes(131072) + rng.randbytes(65536) + b"end"
        table = bytearray(b"?" * 16 * 5)
        extents = flat([(65536, 65536), (196608, 65539)])
        with BlockDevice(str(image_file(len(disk), disk))) as device:
            gather(device, extents, scratch, digests=table)
        assert table[:16] == b"?" * 16
        assert table[16:32] == chunk.ZERO_DIGEST
        assert table[32:48] == b"?" * 16
        assert table[48:64] == xxhash.xxh3_128_digest(disk[196608:262144])
        assert table[64:] == xxhash.xxh3_128_digest(b"end")

    @pytest.mark.parametrize(
        ("extent", "entries", "message"),
        [
            ((4096, 65536), 2, "4096 to 69632 are not borders"),
            ((0, 4096), 2, "0 to 4096 are not borders"),
            ((65536, 65536), 1, "beyond a digest table of 16"),
        ],
    )
    def test_only_whole_chunks_that_the_table_has(
        self,
        image_file: Callable[..., Path],
        scratch: AlignedBuffer,
        extent: tuple[int, int],
        entries: int,
        message: str,
    ) -> None:
        table = bytearray(16 * entries)
        with BlockDevice(str(image_file(131072))) as device:
            with pytest.raises(ValueError, match=message):
                gather(device, flat([extent]), scratch, digests=table)
            with pytest.raises((BufferError, TypeError)):
                gather(device, flat([extent]), scratch, digests=bytes(table))
        assert not any(table)

    def test_a_read_that_fails_leaves_the_table_alone(
        self, faulty_device: Callable[..., FaultyDevice], scratch: AlignedBuffer
    ) -> None:
        faulty, table = faulty_device(4 * MIB), bytearray(b"?" * 1024)
        with (
            BlockDevice(faulty.path) as device,
            faulty.failing("pread"),
            pytest.raises(OSError, match="at offset 131072") as caught,
        ):
            gather(device, flat([(131072, 65536)]), scratch, digests=table)
        assert caught.value.errno == errno.EIO
        assert caught.value.filename == faulty.path
        assert table == b"?" * 1024


class TestArguments:
    @pytest.mark.parametrize(
        ("extents", "message"),
        [
            ([(4096, 4096), (0, 4096)], "extent 1: offset is 0, before the end"),
            ([(0, 8192), (4096, 4096)], "extent 1: offset is 4096, before the end"),
            ([(0, 0)], "extent 0: length is 0"),
            ([(0, 2**63 - 1)], "no length of an extent"),
            ([(2**64 - 4096, 8192)], "extent 0: offset is 18446744073709547520, beyond"),
            ([(0, 2 * MIB)], "2097152 bytes of extents"),
        ],
    )
    def test_extents_that_are_none(
        self,
        image_file: Callable[..., Path],
        scratch: AlignedBuffer,
        extents: list[tuple[int, int]],
        message: str,
    ) -> None:
        device = BlockDevice(str(image_file(4 * MIB)))
        with device, pytest.raises(ValueError, match=message):
            gather(device, flat(extents), scratch)

    def test_scratch_that_is_too_small(self, image_file: Callable[..., Path]) -> None:
        with BlockDevice(str(image_file(MIB, b"x" * MIB)), writable=True) as device:
            with pytest.raises(ValueError, match="the scratch 4096"):
                gather(device, flat([(0, 8192)]), AlignedBuffer(4096))
            data = gathered(device, [(0, 8192)])
            with pytest.raises(ValueError, match="a scratch of 4096"):
                frame.scatter(device, data, AlignedBuffer(4096), size_bytes=MIB, **TARGET)

    def test_odd_number_of_numbers(
        self, image_file: Callable[..., Path], scratch: AlignedBuffer
    ) -> None:
        device = BlockDevice(str(image_file(MIB)))
        with device, pytest.raises(ValueError, match="3 numbers"):
            gather(device, array("Q", [0, 512, 1024]), scratch)


class Target:
    """A file full of a pattern, and the proof that nothing touched it."""

    size = 65536

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pattern = bytes(range(256)) * 256
        path.write_bytes(self.pattern)
        self.device = BlockDevice(str(path), writable=True)
        self.scratch = AlignedBuffer(MIB)

    def scatter(self, data: bytes) -> frame.Applied:
        return frame.scatter(self.device, data, self.scratch, size_bytes=self.size, **TARGET)

    def refuses(self, data: bytes, message: str = " is ") -> None:
        with pytest.raises(frame.FrameError, match=message):
            self.scatter(data)
        assert self.path.read_bytes() == self.pattern


@pytest.fixture(scope="class")
def target() -> Iterator[Target]:
    with devices.image_file(Target.size) as path:
        made = Target(path)
        yield made
        made.device.close()


GOOD = [Piece(0, 1024, DATA), Piece(4096, 4096, ZERO), Piece(8192, 512, DATA)]
PAYLOAD = random.Random(11).randbytes(1536)
HUGE = 2**64 - 512


def with_piece(index: int, **changes: int) -> list[Piece]:
    pieces = list(GOOD)
    pieces[index] = replace(pieces[index], **changes)
    return pieces


class TestRefusal:
    """Each frame here has a right checksum but for the last tests: the field itself is checked."""

    def test_the_good_frame_is_good(self) -> None:
        with devices.image_file(Target.size) as path:
            target = Target(path)
            assert target.scatter(encode(GOOD, PAYLOAD)) == (1536, 4096, 0)
            assert path.read_bytes() != target.pattern
            target.device.close()

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            (Header(magic=b"WSF2"), "magic is 0x32465357, not 0x31465357"),
            (Header(version=2), "version is 2, not 1"),
            (Header(kind=2), "kind is 2, not 1"),
            (Header(volume=6), "volume is 6, not 7"),
            (Header(generation=9), "generation is 9, not 8"),
            (Header(flags=1), "flags is 1, not 0"),
            (Header(reserved=1), "packed length is 1, not 0"),
            (Header(extent_count=2), "frame length is 1672, not 1648"),
            (Header(extent_count=4), "frame length is 1672, not 1696"),
            (Header(extent_count=4097), "extent count is 4097, more than 4096"),
            (Header(extent_count=2**32 - 1), "extent count is 4294967295, more than"),
            (Header(payload_bytes=1535), "frame length is 1672, not 1671"),
            (Header(payload_bytes=MIB + 1), "payload length is 1048577, more than"),
        ],
    )
    def test_header(self, target: Target, header: Header, message: str) -> None:
        target.refuses(encode(GOOD, PAYLOAD, header), message)

    @pytest.mark.parametrize(
        ("pieces", "message"),
        [
            (with_piece(0, kind=0), "extent 0: kind is 0"),
            (with_piece(2, kind=4), "extent 2: kind is 4"),
            (with_piece(1, reserved=1), "extent 1: reserved is 1"),
            (with_piece(1, length=0), "extent 1: length is 0"),
            (with_piece(1, length=8192), "extent 2: offset is 8192, before the end"),
            (with_piece(1, offset=512), "extent 1: offset is 512, before the end"),
            (with_piece(1, offset=HUGE), f"extent 1: offset is {HUGE}, beyond"),
            (with_piece(1, length=HUGE), f"extent 1: length is {HUGE}, more than"),
            (with_piece(2, offset=65536), "extent 2: length is 512, more than there are"),
            (with_piece(2, offset=66048), "extent 2: offset is 66048, beyond 65536"),
            (
                with_piece(1, offset=4097, length=512),
                "extent 1: offset is 4097, no multiple of 512",
            ),
            (with_piece(1, length=100), "extent 1: length is 100, no multiple of 512"),
            (with_piece(0, length=1536), "payload length is 1536, not that of all data, 2048"),
            (with_piece(0, kind=ZERO), "payload length is 1536, not that of all data, 512"),
            (with_piece(1, kind=DATA), "payload length is 1536, not that of all data, 5632"),
            (with_piece(2, length=2**62), "payload length is 1536, not that of all data"),
        ],
    )
    def test_table(self, target: Target, pieces: list[Piece], message: str) -> None:
        target.refuses(encode(pieces, PAYLOAD), message)

    def test_every_flip_of_a_byte_is_refused(self, target: Target) -> None:
        good = encode(GOOD, PAYLOAD)
        for position in range(len(good)):
            bad = bytearray(good)
            bad[position] ^= 1 << position % 8
            target.refuses(bytes(bad))

    def test_every_truncation_and_extension_is_refused(self, target: Target) -> None:
        good = encode(GOOD, PAYLOAD)
        for length in range(len(good)):
            target.refuses(good[:length], "frame length")
        target.refuses(good + b"\0", "frame length")

    def test_checksum(self, target: Target) -> None:
        good = bytearray(encode(GOOD, PAYLOAD))
        good[-1] ^= 128
        target.refuses(bytes(good), "checksum is 0x")

    def test_a_volume_larger_than_its_target_now_is(self, target: Target) -> None:
        data = encode([Piece(0, 512, ZERO)], b"")
        with pytest.raises(OSError, match="failed at 65536") as caught:
            frame.scatter(target.device, data, target.scratch, size_bytes=65537, **TARGET)
        assert caught.value.errno == errno.EIO
        assert target.path.read_bytes() == target.pattern

    @given(data=st.data())
    def test_random_mutations(self, target: Target, data: st.DataObject) -> None:
        good = encode(GOOD, PAYLOAD)
        bad = bytearray(good)
        for _ in range(data.draw(st.integers(1, 4))):
            start = data.draw(st.integers(0, len(bad)))
            end = data.draw(st.integers(start, min(len(bad), start + 64)))
            bad[start:end] = data.draw(st.binary(max_size=64))
        if bad != good:
            target.refuses(bytes(bad))

    @given(
        noise=st.binary(max_size=300),
        pieces=st.lists(
            st.builds(
                Piece,
                st.integers(0, 2**64 - 1),
                st.integers(0, 2**64 - 1),
                st.integers(0, 4),
                st.integers(0, 1),
            ),
            min_size=1,
            max_size=4,
        ),
    )
    def test_random_bytes_and_random_tables_with_right_checksums(
        self, target: Target, noise: bytes, pieces: list[Piece]
    ) -> None:
        assume(any(p.length == 0 or p.offset + p.length > target.size for p in pieces))
        target.refuses(noise)
        target.refuses(encode(pieces, noise))


class TestFaults:
    def test_a_write_that_fails_names_the_place(
        self, faulty_device: Callable[..., FaultyDevice], scratch: AlignedBuffer
    ) -> None:
        faulty = faulty_device(4 * MIB)
        data = encode([Piece(MIB, 4096, DATA)], b"x" * 4096)
        with (
            BlockDevice(faulty.path, writable=True) as device,
            faulty.failing("pwrite"),
            pytest.raises(OSError, match="write of 4096 bytes at offset 1048576") as caught,
        ):
            frame.scatter(device, data, scratch, size_bytes=4 * MIB, **TARGET)
        assert caught.value.errno == errno.EIO
        assert caught.value.filename == faulty.path


def write_all(path: str, data: bytes) -> None:
    with content.Disk(path, writable=True) as disk:
        for offset in range(0, len(data), content.STEP_BYTES):
            disk.write(offset, data[offset : offset + content.STEP_BYTES])
