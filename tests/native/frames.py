"""A frame encoder and a model of what frames do, in plain Python: the twin of native.frame."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import xxhash

DATA, ZERO, DISCARD = 1, 2, 3
HEADER = struct.Struct("<4sHHIIQQIIQ16s")
EXTENT = struct.Struct("<QQII")
GRAIN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Piece:
    offset: int
    length: int
    kind: int
    reserved: int = 0


@dataclass(frozen=True, slots=True)
class Header:
    """Every field of a frame's header; the counts and the checksum are worked out if not given."""

    magic: bytes = b"WSF1"
    version: int = 1
    kind: int = 1
    volume: int = 7
    extent_count: int | None = None
    generation: int = 8
    sequence: int = 9
    payload_bytes: int | None = None
    flags: int = 0
    reserved: int = 0


def encode(pieces: list[Piece], payload: bytes, header: Header = Header()) -> bytes:
    """Return a frame with a right checksum, whatever else may be wrong with it."""
    count = len(pieces) if header.extent_count is None else header.extent_count
    length = len(payload) if header.payload_bytes is None else header.payload_bytes
    table = b"".join(EXTENT.pack(p.offset, p.length, p.kind, p.reserved) for p in pieces)

    def head(checksum: bytes) -> bytes:
        return HEADER.pack(
            header.magic,
            header.version,
            header.kind,
            header.volume,
            count,
            header.generation,
            header.sequence,
            length,
            header.flags,
            header.reserved,
            checksum,
        )

    checksum = xxhash.xxh3_128_digest(head(bytes(16)) + table + payload)
    return head(checksum) + table + payload


def plan(disk: bytes, extents: Iterable[tuple[int, int]], min_zero: int) -> list[Piece]:
    """Return the pieces that gather makes of the extents, grain by grain."""
    pieces: list[Piece] = []
    for offset, length in extents:
        for start, end, zero in _runs(disk, offset, offset + length):
            whole = (start, end) == (offset, offset + length)
            kind = ZERO if zero and (whole or end - start >= min_zero) else DATA
            _add(pieces, Piece(start, end - start, kind))
    return pieces


def payload_of(disk: bytes, pieces: list[Piece]) -> bytes:
    """Return the bytes of the DATA pieces."""
    return b"".join(disk[p.offset : p.offset + p.length] for p in pieces if p.kind == DATA)


def apply(disk: bytearray, pieces: list[Piece], payload: bytes) -> None:
    """Do to `disk` what scatter does to a device."""
    for piece in pieces:
        data, rest = payload[: piece.length], payload[piece.length :]
        end = piece.offset + piece.length
        disk[piece.offset : end] = data if piece.kind == DATA else bytes(piece.length)
        payload = rest if piece.kind == DATA else payload


def _runs(disk: bytes, start: int, end: int) -> list[tuple[int, int, bool]]:
    runs: list[tuple[int, int, bool]] = []
    while start < end:
        stop = min(end, start - start % GRAIN_BYTES + GRAIN_BYTES)
        zero = not any(disk[start:stop])
        if runs and runs[-1][2] == zero:
            runs[-1] = (runs[-1][0], stop, zero)
        else:
            runs.append((start, stop, zero))
        start = stop
    return runs


def _add(pieces: list[Piece], piece: Piece) -> None:
    if pieces and (pieces[-1].offset + pieces[-1].length, pieces[-1].kind) == (
        piece.offset,
        piece.kind,
    ):
        piece = Piece(pieces[-1].offset, pieces.pop().length + piece.length, piece.kind)
    pieces.append(piece)
