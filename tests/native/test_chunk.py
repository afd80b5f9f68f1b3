"""Zero test and digests, against Python and the xxhash package, by every implementation."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from native import chunk

# Around each border in XXH3 (16, 128, 240, 256, 1024 bytes), the zero test's step, and a chunk.
LENGTHS = sorted(
    {*range(300), *(n + d for n in (512, 1024, 2048, 4096, 65536) for d in (-1, 0, 1)), 200_001}
)
ALIGNMENTS = (0, 1, 8, 33, 63)


def placed(content: bytes, alignment: int, around: int) -> memoryview:
    """The content at `alignment` past a multiple of 64, with bytes of `around` on both sides."""
    room = bytearray([around]) * (len(content) + 256)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    start = 64 + (alignment - address) % 64
    room[start : start + len(content)] = content
    return memoryview(room)[start : start + len(content)]


def positions(length: int) -> Iterator[int]:
    """First, last, and some between."""
    yield from {0, length - 1, length // 2, length - length % 8, length - length % 256} - {length}


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_zeros_are_zero_at_every_length_and_neighbours_do_not_count(alignment: int) -> None:
    for length in LENGTHS:
        assert chunk.is_zero(placed(bytes(length), alignment, around=0xFF))


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_one_byte_that_is_not_zero_is_seen_wherever_it_is(alignment: int) -> None:
    for length in LENGTHS[1:]:
        for position in positions(length):
            for value in (0x01, 0x80):
                content = bytearray(length)
                content[position] = value
                assert not chunk.is_zero(placed(bytes(content), alignment, around=0))


def test_each_single_byte_of_a_buffer_is_looked_at() -> None:
    content = bytearray(1111)
    for position in range(len(content)):
        content[position] = 1
        assert not chunk.is_zero(content)
        content[position] = 0


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_hashes_are_those_of_the_xxhash_package(alignment: int) -> None:
    content = random.Random(alignment).randbytes(LENGTHS[-1])
    for length in LENGTHS:
        view = placed(content[:length], alignment, around=0)
        assert chunk.xxh3_128(view) == xxhash.xxh3_128_digest(content[:length])


def twin(data: bytes, size: int) -> bytes:
    parts = (data[at : at + size] for at in range(0, len(data), size))
    return b"".join(xxhash.xxh3_128_digest(part) if any(part) else bytes(16) for part in parts)


@given(
    pieces=st.lists(
        st.one_of(st.binary(max_size=600), st.integers(0, 1500).map(bytes)), max_size=8
    ),
    chunk_bytes=st.integers(1, 2000),
)
def test_digests_are_those_of_each_chunk(pieces: list[bytes], chunk_bytes: int) -> None:
    data = b"".join(pieces)
    assert chunk.digests(data, chunk_bytes) == twin(data, chunk_bytes)


def test_digests_of_whole_chunks_zero_chunks_and_a_short_last_one() -> None:
    size = chunk.CHUNK_BYTES
    noise = random.Random(1).randbytes(size)
    for tail in (b"", b"\0", b"\1", bytes(size - 1), noise[:-1]):
        data = noise + bytes(size) + bytes(size - 1) + b"\1" + tail
        assert chunk.digests(data) == twin(data, size)
    assert chunk.digests(bytes(3 * size)) == 3 * chunk.ZERO_DIGEST
    assert chunk.digests(b"") == b""
    assert (size, chunk.DIGEST_BYTES, chunk.ZERO_DIGEST) == (65536, 16, bytes(16))


def test_any_contiguous_buffer_will_do_and_nothing_else() -> None:
    words = array("Q", [1, 2, 3])
    assert chunk.xxh3_128(words) == xxhash.xxh3_128_digest(words.tobytes())
    assert chunk.digests(words, 8) == twin(words.tobytes(), 8)
    for call in (chunk.is_zero, chunk.digests, chunk.xxh3_128):
        with pytest.raises(BufferError):
            call(memoryview(bytes(8))[::2])
        with pytest.raises(TypeError):
            call("text")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -1])
def test_a_chunk_of_nothing_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="chunk_bytes is"):
        chunk.digests(b"data", size)


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "WARMSYNC_CPU": name},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )


ASK = ("-c", "from native import chunk; print(chunk.implementation())")


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_every_implementation_passes_all_of_the_above(name: str) -> None:
    answer = run(name, *ASK)
    if answer.returncode != 0:
        assert f"WARMSYNC_CPU={name}: choose one of" in answer.stderr
        pytest.skip(f"this CPU has no {name}")
    assert answer.stdout.strip() == name
    tests = run(name, "-m", "pytest", "-q", "-k", "not implementation", __file__)
    assert tests.returncode == 0, tests.stdout + tests.stderr
    assert " passed" in tests.stdout


def test_an_unknown_implementation_is_refused_with_the_choices() -> None:
    for name in ("sse9", "AVX2", "x" * 1000):
        answer = run(name, *ASK)
        assert answer.returncode != 0
        assert "RuntimeError: WARMSYNC_CPU=" in answer.stderr
        assert "portable" in answer.stderr


def test_the_best_implementation_of_this_cpu_is_the_default() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    best = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "portable"
    assert run("", *ASK).stdout.strip() == best
