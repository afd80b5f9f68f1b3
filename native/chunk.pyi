"""Zero test and XXH3-128 digests of a buffer's chunks, with run-time CPU dispatch."""

from typing_extensions import Buffer

CHUNK_BYTES: int
DIGEST_BYTES: int
ZERO_DIGEST: bytes
"""What stands for a chunk of zeros in digest tables: 16 zero bytes, so that holes cost nothing."""

def is_zero(data: Buffer) -> bool:
    """Return whether every byte is 0 (True for an empty buffer)."""

def digests(data: Buffer, chunk_bytes: int = ...) -> bytes:
    """Return 16 bytes a chunk: XXH3-128 (canonical, big endian) or ZERO_DIGEST where it is zeros.

    The last chunk may be short. One pass over the data, without the GIL.
    Equal to `xxhash.xxh3_128_digest(chunk)` for each chunk that is not zero.
    """

def xxh3_128(data: Buffer) -> bytes:
    """Return the canonical XXH3-128 of the whole buffer, zero or not."""

def implementation() -> str:
    """Return the kernel in use: "avx512", "avx2" or "portable".

    WARMSYNC_CPU names one for tests; importing fails with RuntimeError, naming the choices, if it
    is unknown or this CPU lacks it.
    """
