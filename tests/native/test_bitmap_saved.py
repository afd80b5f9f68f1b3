"""dumps and loads: there and back, and nothing damaged comes in."""

from __future__ import annotations

import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from native.bitmap import DirtyBitmap
from tests.native.bitmap_twin import block_sets, geometries, marked

HEADER = struct.Struct("<8sIIQQ")


@given(st.data())
def test_what_was_saved_comes_back(data: st.DataObject) -> None:
    geometry = data.draw(geometries())
    blocks = data.draw(block_sets(geometry))
    loaded = DirtyBitmap.loads(geometry.bitmap(blocks).dumps())
    assert (loaded.size_bytes, loaded.block_size_bytes) == (
        geometry.size_bytes,
        geometry.block_bytes,
    )
    assert marked(loaded) == blocks


def saved() -> bytes:
    bitmap = DirtyBitmap(100 * 4096 - 7)
    bitmap.set_range(70 * 4096, 9 * 4096)
    return bitmap.dumps()


def seal(
    words: bytes,
    *,
    magic: bytes = b"WSBITMAP",
    version: int = 1,
    flags: int = 0,
    size_bytes: int = 100 * 4096,
    block_bytes: int = 4096,
) -> bytes:
    """A saved bitmap with a right checksum, whatever it says."""
    body = HEADER.pack(magic, version, flags, size_bytes, block_bytes) + words
    return body + xxhash.xxh3_128_digest(body)


def test_the_format_is_what_the_journal_of_another_version_will_find() -> None:
    words = (0).to_bytes(8, "little") + (0x1FF << 6).to_bytes(8, "little")
    assert saved() == seal(words, size_bytes=100 * 4096 - 7)


def test_every_flipped_byte_is_refused() -> None:
    good = saved()
    for i in range(len(good)):
        for flip in (0x01, 0x80, 0xFF):
            bad = bytearray(good)
            bad[i] ^= flip
            with pytest.raises(ValueError, match="saved bitmap"):
                DirtyBitmap.loads(bad)


def test_every_truncation_and_every_addition_is_refused() -> None:
    good = saved()
    for end in range(len(good)):
        with pytest.raises(ValueError, match="saved bitmap"):
            DirtyBitmap.loads(good[:end])
    for more in (b"\0", bytes(8), bytes(64), good):
        with pytest.raises(ValueError, match="saved bitmap"):
            DirtyBitmap.loads(good + more)


SEALED_BUT_WRONG = {
    "magic": seal(bytes(16), magic=b"WSBITMAQ"),
    "version": seal(bytes(16), version=2),
    "flags": seal(bytes(16), flags=1),
    "a word too few": seal(bytes(8)),
    "a word too many": seal(bytes(24)),
    "a byte too few": seal(bytes(15)),
    "no size": seal(bytes(16), size_bytes=0),
    "size beyond 63 bits": seal(bytes(16), size_bytes=1 << 63),
    "size of more words": seal(bytes(16), size_bytes=(1 << 63) - 1),
    "no block size": seal(bytes(16), block_bytes=0),
    "odd block size": seal(bytes(16), block_bytes=4095),
    "a mark past the end": seal(bytes(15) + b"\x10"),  # block 124 of 100
}


@pytest.mark.parametrize("what", SEALED_BUT_WRONG)
def test_a_right_checksum_does_not_excuse_the_rest(what: str) -> None:
    assert DirtyBitmap.loads(seal(bytes(16))).count() == 0
    with pytest.raises(ValueError, match=r"saved bitmap|must be"):
        DirtyBitmap.loads(SEALED_BUT_WRONG[what])
