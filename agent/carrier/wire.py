"""TransferRequest on the wire, without the copies that protobuf makes of a frame.

Owns the encoding of field `frame` by hand: a tag, a length and the frame's own bytes, so that a
frame is copied once when it is sent and not at all when it arrives. All else is protobuf's.
Measured on 1 MiB frames: protobuf takes three copies to send one and two to receive it.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError
from warmsync.v1 import peer_service_pb2 as pb

from agent.errors import DataLoss

_FIELD = pb.TransferRequest.DESCRIPTOR.fields_by_name["frame"].number
_TAG = bytes([_FIELD << 3 | 2])
"""Field number and wire type 2, length-delimited."""

_VARINT_BYTES = 5


def encode(request: pb.TransferRequest | bytes) -> bytes:
    """Return the wire form of a message; bytes stand for a message that holds one frame."""
    if isinstance(request, bytes):
        return b"".join((_TAG, _varint(len(request)), request))
    return request.SerializeToString()


def decode(data: bytes) -> pb.TransferRequest | memoryview:
    """Return the message, or a view of the frame if it holds nothing else. DataLoss."""
    if data[:1] == _TAG:
        length, start = _read_varint(data)
        if start + length == len(data):
            return memoryview(data)[start:]
    try:
        return pb.TransferRequest.FromString(data)
    except DecodeError as error:
        raise DataLoss(
            "BAD_MESSAGE",
            f"a message from the source is damaged ({error}); check the network and run the same "
            "version on both hosts",
        ) from error


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(data: bytes) -> tuple[int, int]:
    """Return the number behind the tag and where it ends; (-1, 0) if there is none."""
    number = 0
    for i, byte in enumerate(data[1 : 1 + _VARINT_BYTES]):
        number |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return number, i + 2
    return -1, 0
