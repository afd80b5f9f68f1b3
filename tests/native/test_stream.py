"""native.stream: what was marked arrives, byte for byte; strangers and liars get nothing."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from native.chunk import CHUNK_BYTES, digests
from native.frame import FrameError, gather
from native.stream import (
    TOKEN_BYTES,
    TOKEN_ID_BYTES,
    Connection,
    ConnectionLost,
    FramesMissing,
    Receiver,
    Sender,
    Stopped,
    Tokens,
    WrongGeneration,
)

BLOCK = 4096
SIZE = (6 << 20) + 512
TLS = pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
SECONDS = 60.0


@dataclass
class Line:
    """Both ends of a session, in this process."""

    sender: Sender
    receiver: Receiver
    source: Path
    target: Path
    devices: list[BlockDevice]
    connections: list[str]
    marks: DirtyBitmap

    def round(self, generation: int = 1) -> float:
        """Send what is marked, as both agents do; returns what the target's flush is said to be."""
        self.sender.send([(0, self.marks)], generation)
        with ThreadPoolExecutor(1) as threads:
            ended = threads.submit(self.sender.end, generation)
            self.receiver.wait()
            self.receiver.acknowledge(0.25)
            return ended.result(SECONDS)

    def is_equal(self) -> bool:
        return self.source.read_bytes() == self.target.read_bytes()


def noise(size: int = SIZE) -> bytes:
    """Bytes with zeros in them, short and long runs, and text that compresses."""
    data = bytearray(os.urandom(size))
    data[200_000:500_000] = bytes(300_000)
    data[1 << 20 : 1 << 21] = (b"all work and no play " * 60_000)[: 1 << 20]
    data[-5000:-100] = bytes(4900)
    return bytes(data)


def greeted(tokens: Tokens, token: bytes, *, tls: bool) -> tuple[Connection, Connection]:
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as threads:
        accepting = threads.submit(Connection.accept, theirs.detach(), tokens, tls=tls)
        opened = Connection.open(ours.detach(), token, tls=tls)
        return opened, accepting.result(SECONDS)


@dataclass
class Ledger:
    """What both ends note of chunks while a round travels."""

    table: bytearray = field(default_factory=lambda: bytearray(-(-SIZE // CHUNK_BYTES) * 16))
    stale: DirtyBitmap = field(default_factory=lambda: DirtyBitmap(SIZE, CHUNK_BYTES))
    written: DirtyBitmap = field(default_factory=lambda: DirtyBitmap(SIZE, CHUNK_BYTES))


@contextmanager
def line(
    directory: Path,
    *,
    tls: bool = False,
    connections: int = 3,
    compress: bool = False,
    ring: bool = True,
    ack_seconds: int = 300,
    ledger: Ledger | None = None,
    size: int = SIZE,
) -> Iterator[Line]:
    source, target = directory / "source.img", directory / "target.img"
    source.write_bytes(noise(size))
    target.write_bytes(os.urandom(size))
    devices = [BlockDevice(str(source)), BlockDevice(str(target), writable=True)]
    tokens = Tokens()
    pairs = [greeted(tokens, tokens.issue(SECONDS), tls=tls) for _ in range(connections)]
    receiver = Receiver(
        [devices[1]],
        [size],
        connections=connections,
        generation=1,
        ring=ring,
        written=None if ledger is None else [ledger.written],
    )
    said = [one.description for pair in pairs for one in pair]
    for index, (_, accepted) in enumerate(pairs):
        receiver.add(accepted, first=index == 0)
    sender = Sender(
        [opened for opened, _ in pairs],
        [devices[0]],
        [None if ledger is None else ledger.table],
        stale=None if ledger is None else [ledger.stale],
        compress=compress,
        ring=ring,
        ack_seconds=ack_seconds,
    )
    try:
        yield Line(sender, receiver, source, target, devices, said, DirtyBitmap(size, BLOCK))
    finally:
        sender.stop()
        sender.cut()
        receiver.stop()
        receiver.join()
        with suppress(RuntimeError):
            sender.close()
        for device in devices:
            device.close()


def held() -> tuple[int, int]:
    """Return how many descriptors and threads this process has."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@TLS
@pytest.mark.parametrize("connections", [1, 4])
def test_all_arrives(tmp_path: Path, tls: bool, connections: int) -> None:
    with line(tmp_path, tls=tls, connections=connections) as one:
        one.marks.set_all()
        assert one.round() == pytest.approx(0.25)
        assert one.is_equal()
        done, wire, packed = one.sender.counters()
        assert done == SIZE
        assert wire < SIZE  # zeros do not travel
        assert packed == 0
        assert one.receiver.generation == 2


def test_how_it_travels_is_said(tmp_path: Path) -> None:
    with line(tmp_path, tls=True) as one:
        assert set(one.connections) == {"TLSv1.3 TLS_AES_128_GCM_SHA256"}
    with line(tmp_path) as one:
        assert set(one.connections) == {"in the clear"}


@given(data=st.data())
def test_only_what_is_marked_arrives(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    blocks = data.draw(st.sets(st.integers(0, SIZE // BLOCK), max_size=300))
    with line(tmp_path_factory.mktemp("line")) as one:
        before = one.target.read_bytes()
        for block in blocks:
            one.marks.set_range(block * BLOCK, min(BLOCK, SIZE - block * BLOCK))
        one.round()
        source, target = one.source.read_bytes(), one.target.read_bytes()
        for block in range(SIZE // BLOCK + 1):
            at = slice(block * BLOCK, (block + 1) * BLOCK)
            assert target[at] == (source if block in blocks else before)[at]


@pytest.mark.parametrize("ring", [True, False])
@pytest.mark.parametrize("compress", [True, False])
def test_both_ends_note_what_travels(tmp_path: Path, ring: bool, compress: bool) -> None:
    """The source digests of whole chunks, the target which it has written."""
    ledger = Ledger()
    ledger.stale.set_all()
    with line(tmp_path, ring=ring, compress=compress, ledger=ledger) as ends:
        parts = [
            (0, 2 * CHUNK_BYTES),
            (5 * CHUNK_BYTES + BLOCK, CHUNK_BYTES),
            (20 * CHUNK_BYTES, 40 * CHUNK_BYTES + BLOCK),
            (SIZE - 512, 512),
        ]
        for offset, length in parts:
            ends.marks.set_range(offset, length)
        ends.round()
        data = ends.source.read_bytes()
    chunks = range(-(-SIZE // CHUNK_BYTES))
    touched = {0, 1, 5, 6, *range(20, 61), chunks[-1]}
    whole = {0, 1, *range(20, 60), chunks[-1]}
    for index in chunks:
        at = index * CHUNK_BYTES
        own = digests(data[at : at + CHUNK_BYTES])
        entry = bytes(ledger.table[index * 16 : index * 16 + 16])
        assert entry == (own if index in whole else bytes(16)), index
        assert ledger.stale.is_marked(at) is (index not in whole), index
        assert ledger.written.is_marked(at) is (index in touched), index


def test_small_frames_and_large_blocks(tmp_path: Path) -> None:
    with line(tmp_path) as one:
        one.sender.tune(frame_bytes=65536, gap_bytes=0, nice=1)
        one.marks = DirtyBitmap(SIZE, 2 << 20)
        one.marks.set_all()
        one.round()
        assert one.is_equal()


def test_rounds_follow_each_other(tmp_path: Path) -> None:
    with line(tmp_path) as one:
        one.marks.set_all()
        one.round()
        one.marks.clear()
        with one.source.open("r+b") as file:
            file.seek(BLOCK * 7)
            file.write(os.urandom(BLOCK))
        one.round(2)  # an empty one
        assert not one.is_equal()
        one.marks.set_range(BLOCK * 7, BLOCK)
        one.round(3)
        assert one.is_equal()


def test_compressed_frames_arrive(tmp_path: Path) -> None:
    with line(tmp_path, compress=True) as one:
        one.source.write_bytes((b"all work and no play " * (SIZE // 20))[:SIZE])
        one.sender.limit(8 << 20)  # slow enough for compression to pay
        one.marks.set_all()
        one.round()
        assert one.is_equal()
        _, wire, packed = one.sender.counters()
        assert packed > 0
        assert wire < SIZE // 4


def test_compression_stops_where_nothing_is_gained(tmp_path: Path) -> None:
    with line(tmp_path, compress=True, connections=1) as one:
        one.source.write_bytes(os.urandom(SIZE))
        one.marks.set_all()
        one.round()
        assert one.is_equal()
        assert one.sender.counters()[2] == 0


def in_background(call: Callable[[], object]) -> Future[object]:
    threads = ThreadPoolExecutor(1)
    work = threads.submit(call)
    threads.shutdown(wait=False)
    return work


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_pause_holds_what_has_begun(tmp_path: Path) -> None:
    with line(tmp_path) as one:
        one.sender.pause(True)
        one.marks.set_all()
        work = in_background(one.round)
        time.sleep(0.05)
        assert one.sender.counters()[1] == 0
        one.sender.pause(False)
        work.result(SECONDS)
        assert one.is_equal()


def test_a_limit_that_is_lifted_lets_go(tmp_path: Path) -> None:
    """At 1 KiB/s the round would take hours."""
    with line(tmp_path) as one:
        one.sender.limit(1024)
        one.marks.set_all()
        work = in_background(one.round)
        time.sleep(0.05)
        assert not work.done()
        one.sender.limit(0)
        work.result(SECONDS)
        assert one.is_equal()


def test_a_stop_ends_a_round_between_frames(tmp_path: Path) -> None:
    with line(tmp_path) as one:
        one.sender.limit(1024)
        one.marks.set_all()
        work = in_background(lambda: one.sender.send([(0, one.marks)], 1))
        until(lambda: one.sender.counters()[1] > 0)
        one.sender.stop()
        with pytest.raises(Stopped):
            work.result(SECONDS)
        one.sender.check()  # no connection was cut
        with pytest.raises(Stopped):
            one.sender.send([(0, one.marks)], 1)


@TLS
def test_a_target_that_is_gone_is_noticed(tmp_path: Path, tls: bool) -> None:
    with line(tmp_path, tls=tls) as one:
        one.sender.check()
        one.receiver.stop()
        until(lambda: not still_there(one.sender))
        one.marks.set_all()
        with pytest.raises(ConnectionLost):
            one.round()


def still_there(sender: Sender) -> bool:
    try:
        sender.check()
    except ConnectionLost:
        return False
    return True


@TLS
def test_a_source_that_is_gone_is_noticed(tmp_path: Path, tls: bool) -> None:
    with line(tmp_path, tls=tls) as one:
        one.sender.cut()
        with pytest.raises(ConnectionLost):
            one.receiver.wait()


@TLS
def test_a_target_that_stops_reading_is_given_up(tmp_path: Path, tls: bool) -> None:
    """It greeted, and then took nothing more: stopped, or hung on its device."""
    with line(tmp_path, tls=tls):
        pass  # what is made once is there now
    before = held()
    source = tmp_path / "source.img"
    tokens = Tokens()
    opened, deaf = greeted(tokens, tokens.issue(SECONDS), tls=tls)
    with BlockDevice(str(source)) as device:
        marks = DirtyBitmap(SIZE, BLOCK)
        marks.set_all()
        sender = Sender([opened], [device], [None], patience_seconds=1)
        with pytest.raises(ConnectionLost, match="it took nothing for 1 s"):
            sender.send([(0, marks)], 1)
        sender.close()
    deaf.close()
    until(lambda: held() <= before)


@TLS
def test_a_round_that_is_never_acknowledged_ends(tmp_path: Path, tls: bool) -> None:
    with line(tmp_path, tls=tls, ack_seconds=1) as one:
        one.marks.set_all()
        one.sender.send([(0, one.marks)], 1)
        with pytest.raises(ConnectionLost, match="not durable there within 1 s"):
            one.sender.end(1)


@TLS
@pytest.mark.parametrize("cut_at", [10, 100, -10], ids=["header", "table", "payload"])
def test_a_source_that_vanishes_within_a_frame(tmp_path: Path, tls: bool, cut_at: int) -> None:
    """A truncated stream is an error, never an end; nothing of the frame is written."""
    with line(tmp_path, tls=tls):
        pass
    before = held()
    with line(tmp_path, tls=tls, connections=1) as one:
        untouched = one.target.read_bytes()
        one.sender.send_frame(frame(one.source)[:cut_at])
        one.sender.cut()
        with pytest.raises(ConnectionLost):
            one.receiver.wait()
        assert one.target.read_bytes() == untouched
    until(lambda: held() <= before)


def test_scattered_blocks_without_io_uring(tmp_path: Path) -> None:
    """Where a container's seccomp profile forbids it."""
    with line(tmp_path, ring=False) as one:
        for offset in range(0, SIZE, 5 * BLOCK):
            one.marks.set_range(offset, BLOCK)
        one.round()
        one.marks.clear()
        one.marks.set_all()
        one.round(2)
        assert one.is_equal()


@pytest.mark.parametrize("how", ["pause", "limit"])
def test_controls_act_within_a_slice_and_hold_no_acknowledgement(tmp_path: Path, how: str) -> None:
    """What counts as a tenth of a second is bytes here: a slice a connection may still go out."""
    # So much that it is not all sent before the control comes, however late that is.
    with line(tmp_path, connections=2, size=64 << 20) as one:
        one.marks.set_all()
        one.sender.limit(20 << 20)
        sending = in_background(lambda: one.sender.send([(0, one.marks)], 1))
        until(lambda: one.sender.counters()[1] > 1 << 20)
        if how == "pause":
            one.sender.pause(True)
        else:
            one.sender.limit(4096)
        time.sleep(0.1)
        at = one.sender.counters()[1]
        time.sleep(0.3)
        assert one.sender.counters()[1] - at <= 2 * (256 << 10)
        assert not sending.done()
        one.sender.limit(0)
        one.sender.pause(False)
        sending.result(SECONDS)
        # All is sent: the acknowledgement is waited for under any limit, and in a pause.
        one.sender.limit(1)
        one.sender.pause(True)
        ended = in_background(lambda: one.sender.end(1))
        one.receiver.wait()
        one.receiver.acknowledge(0.25)
        assert ended.result(SECONDS) == pytest.approx(0.25)
        assert one.is_equal()


def test_a_read_error_names_the_device(tmp_path: Path) -> None:
    with line(tmp_path) as one:
        one.marks.set_all()
        one.sender.pause(True)
        work = in_background(lambda: one.sender.send([(0, one.marks)], 1))
        time.sleep(0.05)
        with one.source.open("r+b") as file:
            file.truncate(SIZE // 2)
        one.sender.pause(False)
        with pytest.raises(OSError, match="read of") as caught:
            work.result(SECONDS)
        assert caught.value.filename == str(one.source)


def test_a_write_error_names_the_device(tmp_path: Path) -> None:
    with line(tmp_path) as one:
        one.marks.set_all()
        with one.target.open("r+b") as file:
            file.truncate(SIZE // 2)
        work = in_background(lambda: one.sender.send([(0, one.marks)], 1))
        with pytest.raises(OSError, match="of") as caught:
            one.receiver.wait()
        assert caught.value.filename == str(one.target)
        one.receiver.stop()
        with suppress(ConnectionLost):
            work.result(SECONDS)


def frame(
    source: Path, *, offset: int = 0, generation: int = 1, volume: int = 0, size: int = BLOCK
) -> bytes:
    from array import array

    with BlockDevice(str(source)) as device:
        extents = array("Q", [offset, size])
        scratch = AlignedBuffer(size)
        return gather(device, extents, scratch, volume=volume, generation=generation, sequence=1)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: bytes([f[0] ^ 1]) + f[1:], "magic"),
        (lambda f: f[:-1] + bytes([f[-1] ^ 1]), "checksum"),
        (lambda f: f[:8] + bytes([9]) + f[9:], "checksum"),
        (lambda f: f[:12] + b"\xff\xff\xff\x7f" + f[16:], "extent count"),
        (lambda f: f[:32] + b"\xff\xff\xff\x7f" + f[36:], "payload length"),
        (lambda f: f[:36] + b"\x02" + f[37:], "flags"),
        (lambda f: f[:36] + b"\x01" + f[37:40] + b"\xff" * 8 + f[48:], "packed length"),
        (lambda f: f[:36] + b"\x01" + f[37:40] + b"\x10" + bytes(7) + f[48:], "packed length"),
    ],
    ids=["magic", "payload", "volume", "count", "size", "flags", "packed too long", "packed badly"],
)
def test_a_damaged_frame_is_refused_whole(
    tmp_path: Path, spoil: Callable[[bytes], bytes], said: str
) -> None:
    with line(tmp_path) as one:
        before = one.target.read_bytes()
        one.sender.send_frame(spoil(frame(one.source)))
        with pytest.raises(FrameError, match=said):
            one.receiver.wait()
        assert one.target.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"generation": 2}, "generation is 2, not 1"), ({"volume": 1}, "volume is 1, more than 0")],
    ids=str,
)
def test_a_frame_of_elsewhere_is_refused(
    tmp_path: Path, changes: dict[str, int], said: str
) -> None:
    with line(tmp_path) as one:
        before = one.target.read_bytes()
        one.sender.send_frame(frame(one.source, **changes))
        with pytest.raises(FrameError, match=said):
            one.receiver.wait()
        assert one.target.read_bytes() == before


def test_nothing_is_written_out_of_range(tmp_path: Path) -> None:
    with line(tmp_path) as one:
        large = tmp_path / "large.img"
        large.write_bytes(os.urandom(2 * SIZE))
        one.sender.send_frame(frame(large, offset=SIZE // BLOCK * BLOCK + BLOCK))
        with pytest.raises(FrameError, match="offset"):
            one.receiver.wait()
        assert one.target.stat().st_size == SIZE


def test_a_round_of_another_generation_is_refused(tmp_path: Path) -> None:
    with line(tmp_path) as one:
        work = in_background(lambda: one.sender.end(2))
        with pytest.raises(WrongGeneration):
            one.receiver.wait()
        one.receiver.stop()
        with pytest.raises(ConnectionLost):
            work.result(SECONDS)


def test_a_lost_frame_is_missed(tmp_path: Path) -> None:
    """A frame that the source counts and the target never saw."""
    with line(tmp_path, connections=1) as one:
        one.sender.send_frame(frame(one.source))
        one.sender.send_frame(end_of(generation=1, frames=2))
        with pytest.raises(FramesMissing, match="number of frames is 1, not 2"):
            one.receiver.wait()


def end_of(generation: int, frames: int) -> bytes:
    import struct

    import xxhash

    head = struct.pack("<4sHHIIQQIIQ", b"WSF1", 1, 2, 0, 0, generation, frames, 0, 0, 0)
    return head + xxhash.xxh3_128_digest(head + bytes(16))


# Greetings.


def refused(server: Callable[[int], Connection], client: Callable[[socket.socket], object]) -> str:
    """Let `client` talk to `server`; returns why the server refused. Nothing is left behind."""
    before = held()
    ours, theirs = socket.socketpair()
    with ThreadPoolExecutor(1) as threads:
        accepting = threads.submit(server, theirs.detach())
        with suppress(ConnectionLost, OSError):
            client(ours)
        with pytest.raises(ConnectionLost) as caught:
            accepting.result(SECONDS)
        ours.close()
    until(lambda: held() <= before)
    return str(caught.value.strerror)


def acceptor(tokens: Tokens, *, tls: bool, seconds: float = 5.0) -> Callable[[int], Connection]:
    return lambda fd: Connection.accept(fd, tokens, tls=tls, timeout_seconds=seconds)


def opener(token: bytes, *, tls: bool) -> Callable[[socket.socket], object]:
    return lambda raw: Connection.open(raw.detach(), token, tls=tls, timeout_seconds=2)


@TLS
def test_a_wrong_token(tls: bool) -> None:
    tokens = Tokens()
    tokens.issue(SECONDS)
    said = refused(acceptor(tokens, tls=tls), opener(os.urandom(TOKEN_BYTES), tls=tls))
    assert said == "it has no valid token"


@TLS
def test_a_wrong_secret_spends_the_token(tls: bool) -> None:
    tokens = Tokens()
    token = tokens.issue(SECONDS)
    forged = token[:TOKEN_ID_BYTES] + os.urandom(TOKEN_BYTES - TOKEN_ID_BYTES)
    refused(acceptor(tokens, tls=tls), opener(forged, tls=tls))
    said = refused(acceptor(tokens, tls=tls), opener(token, tls=tls))
    assert said == "its token has been used before"


@TLS
def test_a_revoked_token_is_nobodys(tls: bool) -> None:
    tokens = Tokens()
    first, second, third = (tokens.issue(SECONDS) for _ in range(3))
    tokens.revoke(second[:TOKEN_ID_BYTES])
    tokens.revoke(second[:TOKEN_ID_BYTES])
    assert len(tokens) == 2
    said = refused(acceptor(tokens, tls=tls), opener(second, tls=tls))
    assert said == "it has no valid token"
    for token in (first, third):
        for one in greeted(tokens, token, tls=tls):
            one.close()
    with pytest.raises(ValueError, match="a name of 3 bytes"):
        tokens.revoke(b"abc")


@TLS
def test_a_token_serves_once(tls: bool) -> None:
    tokens = Tokens()
    token = tokens.issue(SECONDS)
    first = greeted(tokens, token, tls=tls)
    assert first[0].token_id == first[1].token_id == token[:TOKEN_ID_BYTES]
    said = refused(acceptor(tokens, tls=tls), opener(token, tls=tls))
    assert said == "its token has been used before"
    for one in first:
        one.close()


@TLS
def test_an_expired_token(tls: bool) -> None:
    tokens = Tokens()
    token = tokens.issue(0.0)
    assert len(tokens) == 0
    said = refused(acceptor(tokens, tls=tls), opener(token, tls=tls))
    assert said == "its token has expired"


def test_tls_to_a_plain_port() -> None:
    tokens = Tokens()
    said = refused(acceptor(tokens, tls=False), opener(tokens.issue(SECONDS), tls=True))
    assert said == "it speaks TLS and this agent does not"


def test_plain_to_a_tls_port() -> None:
    tokens = Tokens()
    said = refused(acceptor(tokens, tls=True), opener(tokens.issue(SECONDS), tls=False))
    assert "no TLS could be agreed on" in said


def test_a_certificate_is_no_token() -> None:
    """TLS without our key, as any client with certificates speaks it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE

    def client(raw: socket.socket) -> None:
        with context.wrap_socket(raw):
            raise AssertionError("let in without a token")

    said = refused(acceptor(Tokens(), tls=True), client)
    assert said == "it has no valid token"


@TLS
def test_garbage(tls: bool) -> None:
    def client(raw: socket.socket) -> None:
        raw.sendall(os.urandom(4096))

    refused(acceptor(Tokens(), tls=tls), client)


@TLS
def test_silence_ends(tls: bool) -> None:
    gate = threading.Event()
    said = refused(acceptor(Tokens(), tls=tls, seconds=0.05), lambda raw: gate.wait(0.2))
    assert said.startswith("it did not greet in time")


@TLS
def test_who_hangs_up(tls: bool) -> None:
    refused(acceptor(Tokens(), tls=tls), lambda raw: raw.shutdown(socket.SHUT_RDWR))


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    with line(tmp_path, tls=True):
        pass  # what is made once is there now
    before = held()
    for tls in (False, True):
        with line(tmp_path, tls=tls) as one:
            one.marks.set_all()
            one.round()
    until(lambda: held() <= before)


def test_arguments_are_checked(tmp_path: Path) -> None:
    with line(tmp_path) as one:
        with pytest.raises(ValueError, match="frames of 5 bytes"):
            one.sender.tune(frame_bytes=5, gap_bytes=0, nice=0)
        with pytest.raises(ValueError, match="volume 1 of 1"):
            one.sender.send([(1, one.marks)], 1)
        with pytest.raises(ValueError, match="smaller"):
            one.sender.send([(0, DirtyBitmap(SIZE * 2, BLOCK))], 1)
        with pytest.raises(ValueError, match="connections"):
            Sender([], [one.devices[0]], [None])
        with pytest.raises(ValueError, match="connections"):
            Receiver([one.devices[1]], [SIZE], connections=0, generation=1)
    with pytest.raises(TypeError):
        Connection()
    with pytest.raises(ValueError, match="token of 3 bytes"):
        Connection.open(socket.socket().detach(), b"abc", tls=False)
