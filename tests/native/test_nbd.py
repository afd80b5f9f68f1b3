"""NBD exports as devices: what is read, what is at once, and what a server can do to us."""

from __future__ import annotations

import errno
import random
import socket
import subprocess
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from native.bitmap import DirtyBitmap
from native.buffer import AlignedBuffer
from native.frame import extents, gather
from native.scan import digest
from tests import devices

pytest.importorskip("native.nbd", reason="built without libnbd")
from native.nbd import NbdDevice, read_marks

SIZE = (4 << 20) + 8192
DATA = random.Random(1).randbytes(SIZE)


@contextmanager
def server(directory: Path, *words: str, name: str = "server") -> Iterator[str]:
    """Run nbdkit; yields its socket."""
    path = directory / f"{name}.sock"
    path.unlink(missing_ok=True)
    with subprocess.Popen(["nbdkit", "-f", "-U", str(path), *words]) as process:
        try:
            while not path.exists():
                assert process.poll() is None
                time.sleep(0.01)
            yield str(path)
        finally:
            process.kill()


@pytest.fixture
def directory(resources: ExitStack) -> Path:
    devices.require("nbdkit")
    return resources.enter_context(devices.scratch_directory())


@pytest.fixture
def image(directory: Path) -> Path:
    path = directory / "data"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def device(image: Path, directory: Path, resources: ExitStack) -> NbdDevice:
    path = resources.enter_context(server(directory, "file", str(image)))
    return resources.enter_context(NbdDevice("/disk", socket_path=path, export=""))


def read(device: NbdDevice, offset: int, length: int) -> bytes:
    buffer = AlignedBuffer(max(length, 4096))
    with memoryview(buffer) as view:
        device.read(offset, view[:length])
        return bytes(view[:length])


def open_at(path: str, patience_seconds: float = 30.0) -> NbdDevice:
    return NbdDevice("/disk", socket_path=path, export="", patience_seconds=patience_seconds)


def failure(call: Callable[[], object]) -> OSError:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is asserted by the caller
        call()
    assert caught.value.filename == "/disk"
    return caught.value


def test_it_reads_what_is_there(device: NbdDevice) -> None:
    assert device.size_bytes() == SIZE
    assert not device.is_block_device
    assert read(device, 0, SIZE) == DATA
    assert read(device, SIZE - 512, 512) == DATA[-512:]
    device.flush()


def test_scattered_blocks_come_in_order(device: NbdDevice) -> None:
    offsets = sorted(random.Random(2).sample(range(0, SIZE, 4096), 300))
    pairs = array("Q", [word for offset in offsets for word in (offset, 4096)])
    buffer = AlignedBuffer(300 * 4096)
    assert device.read_batch(pairs, buffer) == 300 * 4096
    assert bytes(buffer) == b"".join(DATA[offset : offset + 4096] for offset in offsets)


def test_frames_and_digests_read_it(device: NbdDevice, image: Path) -> None:
    from native.blockio import BlockDevice

    scratch = AlignedBuffer(1 << 20)
    pairs = array("Q", [8192, 4096, 65536, 131072])
    frame = gather(device, pairs, scratch, volume=0, generation=1, sequence=1)
    assert [entry[:2] for entry in extents(frame)] == [(8192, 4096), (65536, 131072)]
    with BlockDevice(str(image)) as file:
        assert digest(device, 0, SIZE, scratch) == digest(file, 0, SIZE, scratch)


def test_many_threads_share_it(device: NbdDevice) -> None:
    def check(seed: int) -> bool:
        rng = random.Random(seed)
        places = [rng.randrange(SIZE // 512) * 512 for _ in range(50)]
        return all(read(device, at, 512) == DATA[at : at + 512] for at in places)

    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(check, range(24)))


def test_nothing_is_read_beyond_the_end_or_written(device: NbdDevice) -> None:
    assert failure(lambda: read(device, SIZE - 512, 1024)).errno == errno.EIO
    assert failure(lambda: device.write(0, bytes(512))).errno == errno.EROFS
    assert read(device, 0, 512) == DATA[:512]


def test_holes_are_told(directory: Path) -> None:
    sparse = directory / "sparse"
    with sparse.open("wb") as file:
        file.truncate(SIZE)
        for at in (1 << 20, 3 << 20):
            file.seek(at)
            file.write(DATA[:4096])
    with (
        server(directory, "file", str(sparse)) as path,
        NbdDevice("/disk", socket_path=path, export="") as device,
    ):
        assert list(device.data_extents() or ()) == [(1 << 20, 4096), (3 << 20, 4096)]
        assert list(device.data_extents(2 << 20) or ()) == [(3 << 20, 4096)]
        wide = device.data_extents(least_bytes=2 << 20)
        assert list(wide or ()) == [(1 << 20, SIZE - (1 << 20))]


def test_an_error_says_where(image: Path, directory: Path) -> None:
    switch = directory / "fail"
    words = ("--filter=error", "file", str(image), "error-pread=EIO", "error-pread-rate=100%")
    with (
        server(directory, *words, f"error-file={switch}") as path,
        NbdDevice("/disk", socket_path=path, export="") as device,
    ):
        assert read(device, 0, 512) == DATA[:512]
        switch.touch()
        error = failure(lambda: read(device, 8192, 4096))
        assert error.errno == errno.EIO
        assert "offset 8192" in str(error)
        switch.unlink()
        assert read(device, 8192, 4096) == DATA[8192:12288]


def test_a_server_that_died_is_asked_anew(image: Path, directory: Path) -> None:
    with server(directory, "file", str(image)) as path:
        device = NbdDevice("/disk", socket_path=path, export="")
        assert read(device, 0, 512) == DATA[:512]
    with device:
        assert failure(lambda: read(device, 0, 512)).errno
        assert failure(lambda: read(device, 0, 512)).errno == errno.ECONNREFUSED
        with server(directory, "file", str(image)):
            assert read(device, 0, 512) == DATA[:512]


def test_another_disk_behind_the_name_is_not_read(image: Path, directory: Path) -> None:
    with server(directory, "file", str(image)) as path:
        device = NbdDevice("/disk", socket_path=path, export="", connections=1)
    with device, server(directory, "memory", "1M"):
        failure(lambda: read(device, 0, 512))
        assert failure(lambda: read(device, 0, 512)).errno == errno.ESTALE


def test_it_can_be_pointed_elsewhere(image: Path, directory: Path) -> None:
    other = directory / "other"
    other.write_bytes(DATA[::-1])
    with (
        server(directory, "file", str(image)) as one,
        server(directory, "file", str(other), name="two") as two,
        NbdDevice("/disk", socket_path=one, export="") as device,
    ):
        assert read(device, 0, 512) == DATA[:512]
        device.redirect(socket_path=two, export="")
        assert read(device, 0, 512) == DATA[::-1][:512]


def test_a_silent_server_is_given_up(image: Path, directory: Path) -> None:
    switch = directory / "go"
    words = ("--filter=delay", "file", str(image), "delay-read=60")
    assert not switch.exists()
    with (
        server(directory, *words) as path,
        NbdDevice("/disk", socket_path=path, export="", patience_seconds=2.0) as device,
    ):
        assert failure(lambda: read(device, 0, 512)).errno == errno.ETIMEDOUT


def test_who_does_not_greet_is_given_up(directory: Path) -> None:
    path = str(directory / "mute.sock")
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(path)
        mute.listen()
        error = failure(partial(open_at, path, patience_seconds=0.2))
        assert error.errno == errno.ETIMEDOUT


def test_what_cannot_be_opened() -> None:
    assert failure(partial(open_at, "/nowhere/socket")).errno == errno.ENOENT
    assert failure(partial(open_at, "/" + "x" * 200)).errno == errno.ENAMETOOLONG
    with pytest.raises(ValueError, match="connections"):
        NbdDevice("/disk", socket_path="/x", export="", connections=0)


def test_closed_while_it_is_read(device: NbdDevice) -> None:
    errors: list[BaseException] = []

    def loop() -> None:
        try:
            while True:
                assert read(device, 0, 65536) == DATA[:65536]
        except ValueError as error:  # closed
            errors.append(error)

    threads = [threading.Thread(target=loop) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    device.close()
    for thread in threads:
        thread.join()
    assert len(errors) == 4


def test_a_bitmap_that_is_not_there(device: NbdDevice, directory: Path) -> None:
    path = str(directory / "server.sock")
    marks = DirtyBitmap(SIZE, 4096)
    with pytest.raises(OSError, match="read bitmaps") as caught:
        read_marks(path, "", ["none"], marks)
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(ValueError, match="0 bitmaps"):
        read_marks(path, "", [], marks)
