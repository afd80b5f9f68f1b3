"""Aligned buffers and their pool."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from native.buffer import AlignedBuffer, BufferPool, Lease


@pytest.mark.parametrize("size", [1, 511, 4096, 4097, 1 << 20])
def test_a_buffer_is_aligned_zeroed_writable_and_of_its_size(size: int) -> None:
    buffer = AlignedBuffer(size)
    view = memoryview(buffer)
    assert buffer.address % 4096 == 0
    assert (len(buffer), buffer.size_bytes, view.nbytes, view.format) == (size, size, size, "B")
    assert bytes(view) == bytes(size)
    view[size - 1] = 7
    assert bytes(buffer)[-1] == 7


def test_memory_that_was_used_before_is_zeroed_again() -> None:
    for _ in range(100):
        buffer = AlignedBuffer(8192)
        assert bytes(buffer) == bytes(8192)
        memoryview(buffer)[:] = b"\xff" * 8192
        del buffer


def test_a_view_keeps_the_memory() -> None:
    view = memoryview(AlignedBuffer(4096))
    gc.collect()
    view[0] = 1
    assert bytes(view[:2]) == b"\1\0"


@pytest.mark.parametrize("size", [0, -1])
def test_a_buffer_of_nothing_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        AlignedBuffer(size)
    with pytest.raises(ValueError, match="at least 1"):
        BufferPool(size, 1)
    with pytest.raises(ValueError, match="at least 1"):
        BufferPool(4096, size)


@pytest.mark.parametrize("size", [1 << 62, 1 << 63, 1 << 70])
def test_too_much_is_a_memory_error(size: int) -> None:
    with pytest.raises(MemoryError):
        AlignedBuffer(size)


def test_a_buffer_given_back_is_lent_again() -> None:
    pool = BufferPool(4096, 2)
    with pool.lease() as first, pool.lease() as second:
        assert pool.outstanding == 2
        assert len({first.address, second.address}) == 2
        addresses = {first.address, second.address}
    assert pool.outstanding == 0
    with pool.lease() as third:
        assert third.address in addresses
        assert pool.outstanding == 1


def test_a_buffer_comes_back_when_the_block_fails() -> None:
    pool = BufferPool(4096, 1)
    with pytest.raises(OSError, match="disk"), pool.lease():
        raise OSError("disk")
    assert pool.outstanding == 0


def test_a_lease_that_was_never_entered_is_given_back() -> None:
    pool = BufferPool(4096, 1)
    lease = pool.lease()
    assert pool.outstanding == 1
    del lease
    gc.collect()
    assert pool.outstanding == 0


def test_a_lease_ends_once() -> None:
    pool = BufferPool(4096, 1)
    lease = pool.lease()
    with lease:
        pass
    with pytest.raises(RuntimeError, match="has ended"):
        lease.__enter__()
    lease.__exit__(None, None, None)
    assert pool.outstanding == 0
    with pytest.raises(TypeError):
        Lease()


def test_memory_that_somebody_still_sees_is_not_lent_again() -> None:
    pool = BufferPool(4096, 1)
    with pool.lease() as buffer:
        view = memoryview(buffer)
    assert pool.outstanding == 0
    with pool.lease() as other:
        memoryview(other)[0] = 9
        assert other.address != buffer.address
    assert view[0] == 0


def test_who_waits_gets_the_buffer_that_comes_back() -> None:
    pool, about_to_wait = BufferPool(4096, 1), threading.Event()

    def borrow() -> int:
        about_to_wait.set()
        with pool.lease() as buffer:
            return buffer.address

    with ThreadPoolExecutor(1) as threads:
        with pool.lease() as buffer:
            waiting = threads.submit(borrow)
            about_to_wait.wait()
            address = buffer.address
        assert waiting.result() == address


def test_never_more_are_out_than_the_pool_has() -> None:
    pool, seen, out, lock = BufferPool(4096, 3), set[int](), set[int](), threading.Lock()

    def borrow(mark: int) -> None:
        for _ in range(200):
            with pool.lease() as buffer:
                with lock:
                    assert buffer.address not in out
                    out.add(buffer.address)
                    assert len(out) <= 3
                    seen.add(buffer.address)
                view = memoryview(buffer)
                view[:] = bytes([mark]) * 4096
                assert bytes(view) == bytes([mark]) * 4096
                view.release()
                with lock:
                    out.remove(buffer.address)

    with ThreadPoolExecutor(8) as threads:
        for job in [threads.submit(borrow, mark) for mark in range(8)]:
            job.result()
    assert pool.outstanding == 0
    assert len(seen) <= 3


def test_closing_wakes_all_who_wait_and_refuses_who_comes() -> None:
    pool, about_to_wait = BufferPool(4096, 1), threading.Semaphore(0)

    def borrow() -> None:
        about_to_wait.release()
        with pool.lease():
            pass

    with ThreadPoolExecutor(3) as threads, pool.lease() as buffer:
        waiting = [threads.submit(borrow) for _ in range(3)]
        for _ in waiting:
            about_to_wait.acquire()
        pool.close()
        for each in waiting:
            with pytest.raises(RuntimeError, match="pool is closed"):
                each.result()
        memoryview(buffer)[0] = 1  # what is out stays usable
    assert pool.outstanding == 0
    with pytest.raises(RuntimeError, match="pool is closed"):
        pool.lease()
    pool.close()
