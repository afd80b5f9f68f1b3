"""Reading, writing and zeroing real devices and files, seen through another descriptor."""

from __future__ import annotations

import errno
import os
import random
import resource
import threading
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from tests import content, devices
from tests.devices import FaultyDevice, LoopDevice

MIB = 1 << 20
ALL_METHODS = ("punch", "zeroout", "write")


def write(device: BlockDevice, offset: int, data: bytes) -> None:
    buffer = AlignedBuffer(len(data))
    memoryview(buffer)[:] = data
    device.write(offset, buffer)


def read(device: BlockDevice, offset: int, length: int) -> bytes:
    buffer = AlignedBuffer(length)
    device.read(offset, buffer)
    return bytes(buffer)


class TestGeometry:
    @pytest.mark.parametrize("sector_size", [512, 4096])
    def test_loop_device_and_partition(
        self, loop_device: Callable[..., LoopDevice], sector_size: int
    ) -> None:
        loop = loop_device(8 * MIB, sector_size, partitions=True)
        sizes = [8 * MIB, 3 * MIB, 4 * MIB - 63 * sector_size]
        for path, size in zip((loop.path, *loop.partitions), sizes, strict=True):
            with BlockDevice(path) as device:
                assert (device.path, device.size_bytes()) == (path, size)
                assert device.is_block_device
                assert device.direct
                assert not device.writable
                assert device.logical_block_size_bytes == sector_size
                assert device.physical_block_size_bytes >= sector_size

    def test_zram(self, zram_device: Callable[[int], str]) -> None:
        with BlockDevice(zram_device(4 * MIB), writable=True) as device:
            assert (device.size_bytes(), device.logical_block_size_bytes) == (4 * MIB, 4096)
            assert device.writable

    def test_file_size_is_asked_anew(self, image_file: Callable[..., Path]) -> None:
        path = image_file(1001)
        with BlockDevice(str(path)) as device:
            assert not device.is_block_device
            assert device.size_bytes() == 1001
            os.truncate(path, 5000)
            assert device.size_bytes() == 5000


class TestTransfers:
    @pytest.mark.parametrize("sector_size", [512, 4096])
    def test_device_there_and_back(
        self, loop_device: Callable[..., LoopDevice], sector_size: int
    ) -> None:
        loop, data = loop_device(2 * MIB, sector_size), random.Random(1).randbytes(MIB)
        with BlockDevice(loop.path, writable=True) as device:
            write(device, sector_size, data)
            assert read(device, sector_size, MIB) == data
        expected = bytes(sector_size) + data + bytes(MIB - sector_size)
        assert content.read_all(loop.path) == expected

    @given(size=st.integers(1, 40_000), data=st.data())
    def test_file_of_any_size_to_its_last_byte(self, size: int, data: st.DataObject) -> None:
        rng = random.Random(size)
        model = bytearray(rng.randbytes(size))
        with (
            devices.image_file(size, bytes(model)) as path,
            BlockDevice(str(path), writable=True) as device,
        ):
            for _ in range(4):
                offset = data.draw(st.integers(0, (size - 1) // 512)) * 512
                ends = [*range(offset + 512, size, 512), size]
                end = data.draw(st.sampled_from(ends))
                fresh = rng.randbytes(end - offset)
                write(device, offset, fresh)
                model[offset:end] = fresh
                assert read(device, 0, size) == model
            device.flush()
            assert path.read_bytes() == model

    def test_batches(self, loop_device: Callable[..., LoopDevice]) -> None:
        loop = loop_device(MIB)
        content.fill(loop.path, seed=6)
        disk = bytearray(content.read_all(loop.path))
        extents = [(0, 512), (512, 4096), (8192, 1024), (MIB - 512, 512)]
        flat = array("Q", [number for extent in extents for number in extent])
        buffer = AlignedBuffer(8192)
        with BlockDevice(loop.path, writable=True) as device:
            assert device.read_batch(flat, buffer) == 6144
            assert bytes(buffer)[:6144] == b"".join(disk[o : o + n] for o, n in extents)
            fresh = random.Random(2).randbytes(8192)
            memoryview(buffer)[:] = fresh
            assert device.write_batch(flat, buffer) == 6144
            assert device.read_batch(array("Q"), buffer) == 0
        at = 0
        for offset, length in extents:
            disk[offset : offset + length] = fresh[at : at + length]
            at += length
        assert content.read_all(loop.path) == disk

    def test_batch_that_does_not_fit_its_buffer(self, image_file: Callable[..., Path]) -> None:
        with BlockDevice(str(image_file(MIB)), writable=True) as device:
            buffer = AlignedBuffer(4096)
            with pytest.raises(ValueError, match="4608 bytes of extents, but a buffer of 4096"):
                device.read_batch(array("Q", [0, 512, 512, 4096]), buffer)
            with pytest.raises(ValueError, match="no length of an extent"):
                device.write_batch(array("Q", [0, 2**64 - 512, 0, 1024]), buffer)
            with pytest.raises(ValueError, match="1 numbers"):
                device.read_batch(array("Q", [0]), buffer)

    @pytest.mark.parametrize(("offset", "length"), [(1, 4096), (512, 4096), (0, 512), (4096, 100)])
    def test_misaligned_ranges_name_the_block_size(
        self, loop_device: Callable[..., LoopDevice], offset: int, length: int
    ) -> None:
        with BlockDevice(loop_device(MIB, 4096).path, writable=True) as device:
            for call in (
                lambda: read(device, offset, length),
                lambda: write(device, offset, b"x" * length),
                lambda: device.zero(offset, length),
                lambda: device.discard(offset, length),
            ):
                with pytest.raises(OSError, match="logical block size 4096") as caught:
                    call()
                assert caught.value.errno == errno.EINVAL
            assert device.zero_methods == ALL_METHODS

    def test_misaligned_memory(self, loop_device: Callable[..., LoopDevice]) -> None:
        with BlockDevice(loop_device(MIB).path) as device:
            with pytest.raises(OSError, match="Invalid argument") as caught:
                device.read(0, memoryview(AlignedBuffer(8192))[1:513])
            assert caught.value.errno == errno.EINVAL

    @pytest.mark.parametrize("operation", ["read", "write", "zero", "discard"])
    @pytest.mark.parametrize("kind", ["file", "device"])
    def test_beyond_the_end(
        self,
        loop_device: Callable[..., LoopDevice],
        image_file: Callable[..., Path],
        operation: str,
        kind: str,
    ) -> None:
        path = str(image_file(MIB)) if kind == "file" else loop_device(MIB).path
        with BlockDevice(path, writable=True) as device:
            calls: dict[str, Callable[[int, int], object]] = {
                "read": lambda offset, length: read(device, offset, length),
                "write": lambda offset, length: write(device, offset, bytes(length)),
                "zero": device.zero,
                "discard": device.discard,
            }
            for offset, length, at in ((MIB - 4096, 8192, MIB), (2 * MIB, 4096, 2 * MIB)):
                with pytest.raises(OSError, match=f"{operation} of {length}.* {at}") as caught:
                    calls[operation](offset, length)
                assert (caught.value.errno, caught.value.filename) == (errno.EIO, path)
            assert device.size_bytes() == MIB

    def test_a_file_that_shrinks(self, image_file: Callable[..., Path]) -> None:
        path = image_file(MIB, b"x" * MIB)
        with BlockDevice(str(path), writable=True) as device:
            os.truncate(path, 5000)
            with pytest.raises(OSError, match="read of 8192 bytes at offset 0, failed at 5000"):
                read(device, 0, 8192)
            with pytest.raises(OSError, match="failed at 5000"):
                write(device, 0, bytes(8192))
            assert read(device, 0, 5000) == b"x" * 5000
        assert path.stat().st_size == 5000

    def test_a_short_read_is_a_failure(self) -> None:
        path = "/sys/kernel/uevent_seqnum"  # says that it has a page, and has a line
        with BlockDevice(path) as device, pytest.raises(OSError, match="failed at") as caught:
            read(device, 0, 4096)
        assert caught.value.errno == errno.EIO

    def test_a_short_write_is_a_failure(self, image_file: Callable[..., Path]) -> None:
        path = image_file(MIB, b"x" * MIB)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        with BlockDevice(str(path), writable=True) as device:
            # The kernel writes up to the limit, and says how much that was (setrlimit(2)).
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
            try:
                with pytest.raises(OSError, match="failed at 4096") as caught:
                    write(device, 0, b"y" * 8192)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == errno.EFBIG

    def test_a_stale_page_cache_is_not_read(self, loop_device: Callable[..., LoopDevice]) -> None:
        loop = loop_device(MIB)
        with Path(loop.path).open("rb", buffering=0) as buffered, BlockDevice(loop.path) as device:
            assert buffered.read(4096) == bytes(4096)
            with loop.backing.open("r+b") as behind:
                behind.write(b"new" * 1000)
            buffered.seek(0)
            assert buffered.read(3000) == bytes(3000)  # stale, as its cache is
            assert read(device, 0, 4096)[:3000] == b"new" * 1000

    def test_without_direct_io(self, bare_directory: Path) -> None:
        path = bare_directory / "file"
        path.write_bytes(b"x" * 10_001)
        with BlockDevice(str(path), writable=True) as device:
            assert not device.direct
            write(device, 512, b"y" * 9489)
            assert read(device, 0, 10_001) == b"x" * 512 + b"y" * 9489


class TestFaults:
    @pytest.mark.parametrize("operation", ["read", "write", "zero", "discard"])
    def test_errors_name_operation_and_place(
        self, faulty_device: Callable[..., FaultyDevice], operation: str
    ) -> None:
        faulty = faulty_device(4 * MIB)
        with BlockDevice(faulty.path, writable=True) as device:
            calls: dict[str, Callable[[], object]] = {
                "read": lambda: read(device, MIB, 4096),
                "write": lambda: write(device, MIB, bytes(4096)),
                "zero": lambda: device.zero(MIB, 4096),
                "discard": lambda: device.discard(MIB, 4096),
            }
            expected = f"{operation} of 4096 bytes at offset 1048576"
            with faulty.failing(), pytest.raises(OSError, match=expected) as caught:
                calls[operation]()
            assert (caught.value.errno, caught.value.filename) == (errno.EIO, faulty.path)
            calls[operation]()
            assert device.zero_methods == ALL_METHODS

    @pytest.mark.parametrize("writable", [True, False])
    def test_flush_reports_what_the_page_cache_could_not_write(
        self, faulty_device: Callable[..., FaultyDevice], writable: bool
    ) -> None:
        faulty = faulty_device(4 * MIB)
        with BlockDevice(faulty.path, writable=writable) as device:
            with Path(faulty.path).open("r+b", buffering=0) as other, faulty.failing("pwrite"):
                other.write(b"x" * 4096)
                with pytest.raises(OSError, match=r"\(flush\)") as caught:
                    device.flush()
                assert caught.value.errno == errno.EIO
            # The kernel tells it once. Of what we write, whoever asks next must hear it too.
            for again in (device.data_extents, device.flush):
                with pytest.raises(OSError, match=r"\(flush\)") if writable else ExitStack():
                    again()
        with BlockDevice(faulty.path, writable=writable) as device:
            device.flush()


class TestZero:
    def ranges(self, device: BlockDevice, path: str | Path, seed: int) -> None:
        """Zero random ranges of a device full of data; everything else stays."""
        size, unit = device.size_bytes(), device.logical_block_size_bytes
        model = bytearray(random.Random(seed).randbytes(size))
        for offset in range(0, size, MIB):
            write(device, offset, bytes(model[offset : offset + MIB]))
        rng = random.Random(seed)
        for _ in range(12):
            start = rng.randrange(-(-size // unit)) * unit
            end = min(size, start + rng.choice((unit, 8 * unit, 100 * unit, size)))
            device.zero(start, end - start)
            model[start:end] = bytes(end - start)
            assert read(device, start, end - start) == bytes(end - start)
        assert content.read_all(path) == model
        assert device.size_bytes() == size

    @pytest.mark.parametrize("sector_size", [512, 4096])
    def test_loop_device(self, loop_device: Callable[..., LoopDevice], sector_size: int) -> None:
        loop = loop_device(8 * MIB, sector_size, partitions=True)
        for seed, path in enumerate(loop.partitions):
            with BlockDevice(path, writable=True) as device:
                self.ranges(device, path, seed)
                assert device.zero_methods == ALL_METHODS

    def test_zram(self, zram_device: Callable[[int], str]) -> None:
        path = zram_device(2 * MIB)
        with BlockDevice(path, writable=True) as device:
            self.ranges(device, path, seed=3)

    @pytest.mark.parametrize("size", [MIB, MIB + 1, MIB + 512, MIB + 4095, 700])
    def test_file(self, image_file: Callable[..., Path], size: int) -> None:
        path = image_file(size)
        with BlockDevice(str(path), writable=True) as device:
            self.ranges(device, path, seed=size)
            assert device.zero_methods == ALL_METHODS

    def test_file_gives_its_space_back(self, image_file: Callable[..., Path]) -> None:
        path = image_file(MIB, b"x" * MIB)
        with BlockDevice(str(path), writable=True) as device:
            device.zero(0, MIB)
        assert path.stat().st_blocks == 0

    def test_a_file_system_that_refuses_everything(self, bare_directory: Path) -> None:
        path = bare_directory / "file"
        path.write_bytes(bytes(3 * MIB + 77))
        with BlockDevice(str(path), writable=True) as device:
            self.ranges(device, path, seed=4)
            assert device.zero_methods == ("write",)
            with pytest.raises(OSError, match="discard of 4096 bytes") as caught:
                device.discard(0, 4096)
            assert caught.value.errno == errno.EOPNOTSUPP

    def test_a_device_that_refuses_to_punch(self, bare_directory: Path) -> None:
        file = bare_directory / "file"
        file.write_bytes(bytes(2 * MIB))
        with devices.attached(file) as path, BlockDevice(path, writable=True) as device:
            self.ranges(device, path, seed=5)
            assert device.zero_methods == ("zeroout", "write")

    def test_discard(self, loop_device: Callable[..., LoopDevice]) -> None:
        loop = loop_device(MIB)
        with BlockDevice(loop.path, writable=True) as device:
            write(device, 0, b"x" * MIB)
            device.discard(4096, MIB - 4096)
            assert loop.backing.stat().st_blocks * 512 == 4096
            assert read(device, 0, 4096) == b"x" * 4096


class TestLife:
    def test_closed(self, image_file: Callable[..., Path]) -> None:
        device = BlockDevice(str(image_file(4096)))
        before = len(os.listdir("/proc/self/fd"))
        device.close()
        device.close()
        assert len(os.listdir("/proc/self/fd")) == before - 2
        for call in (device.size_bytes, device.flush, device.fileno, device.data_extents):
            with pytest.raises(ValueError, match="is closed"):
                call()

    def test_nothing_stays_open_after_a_refusal(
        self, loop_device: Callable[..., LoopDevice]
    ) -> None:
        loop = loop_device(MIB)
        devices.run("blockdev", "--setro", loop.path)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="read-only"):
            BlockDevice(loop.path, writable=True)
        assert len(os.listdir("/proc/self/fd")) == before

    def test_close_while_others_read(self, image_file: Callable[..., Path]) -> None:
        """A read that has begun ends well; a later one is refused; no other file is ever read."""
        path = image_file(MIB, b"x" * MIB)
        for _ in range(20):
            device = BlockDevice(str(path))
            started, outcomes = threading.Barrier(3), list[str]()
            threads = [
                threading.Thread(target=self.read_until_closed, args=(device, started, outcomes))
                for _ in range(2)
            ]
            for thread in threads:
                thread.start()
            started.wait()
            device.close()
            decoy = os.open("/dev/zero", os.O_RDONLY)
            for thread in threads:
                thread.join()
            os.close(decoy)
            assert outcomes == ["closed", "closed"]

    def read_until_closed(
        self, device: BlockDevice, started: threading.Barrier, outcomes: list[str]
    ) -> None:
        buffer = AlignedBuffer(MIB)
        started.wait()
        try:
            while True:
                device.read(0, buffer)
                if bytes(buffer) != b"x" * MIB:
                    outcomes.append("foreign")
                    return
        except ValueError:
            outcomes.append("closed")
        except OSError as error:
            outcomes.append(str(error))

    def test_path_with_a_null_character(self) -> None:
        with pytest.raises(ValueError, match="null character"):
            BlockDevice("/dev/loop0\0x")
