"""Frames over TCP, in the clear or under TLS 1.3, on native threads.

The protocol is drawn in stream_impl.h. Every call that waits does so without the GIL.
"""

from collections.abc import Iterable, Sequence

from typing_extensions import Buffer

from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice, Unread
from native.frame import FrameError

TOKEN_BYTES: int
"""A token: a name (TOKEN_ID_BYTES, no secret) and a secret."""
TOKEN_ID_BYTES: int
MAX_CONNECTIONS: int
MAX_VOLUMES: int

def ring_works() -> bool:
    """Return whether this kernel, and what confines us, lets us have an io_uring."""

class ConnectionLost(ConnectionError):  # noqa: N818
    """A connection that could not be made, or has ended; errno is 0 for an orderly end."""

class WrongGeneration(FrameError):  # noqa: N818
    """A round of another generation than the open one has ended."""

class FramesMissing(FrameError):  # noqa: N818
    """A round has ended of which fewer frames have arrived than were sent."""

class Stopped(Exception):  # noqa: N818
    """The call was ended by `stop`."""

class Tokens:
    """One-time tokens of an agent. Thread-safe."""

    def __init__(self) -> None: ...
    def issue(self, good_for_seconds: float) -> bytes:
        """Return a new token of TOKEN_BYTES, good for one greeting within the time."""
    def revoke(self, token_id: bytes) -> None:
        """Forget a token, spent or not, by its first TOKEN_ID_BYTES; its user is a stranger then.

        None of that name is no error. ValueError if it is not as long.
        """
    def __len__(self) -> int:
        """Tokens handed out whose time is not over, spent or not."""

class Connection:
    """A connected socket on which a token was shown and taken.

    Both makers take the descriptor over, whatever comes of it, wait at most `timeout_seconds` in
    all, and raise ConnectionLost with the reason. `tls`: TLS 1.3 with the token as pre-shared key;
    `ktls` lets the kernel encrypt where it can.
    """

    @staticmethod
    def open(
        descriptor: int,
        token: bytes,
        *,
        tls: bool,
        ktls: bool = False,
        timeout_seconds: float = 5.0,
    ) -> Connection:
        """Greet the target."""
    @staticmethod
    def accept(
        descriptor: int,
        tokens: Tokens,
        *,
        tls: bool,
        ktls: bool = False,
        timeout_seconds: float = 5.0,
    ) -> Connection:
        """Let a source in that has a token, and spend the token."""
    @property
    def description(self) -> str:
        """How it is protected: "in the clear", "TLSv1.3 TLS_AES_128_GCM_SHA256"."""
    @property
    def token_id(self) -> bytes:
        """The name of the token that was shown."""
    def close(self) -> None:
        """Close it. Safe to call twice."""

class Sender:
    """The source's end of the connections of one session. One call at a time, but for the controls.

    `devices`, `digests` (or None) and `stale` (see native.frame.gather) are those of the volumes,
    by index; a volume is as large as its marks, and its device may be larger. Takes the connections
    over. Memory: about 1.3 MiB a connection, as much again with `compress`. `ring`: read scattered
    blocks many at once (io_uring) where the kernel can. A target that takes nothing for
    `patience_seconds`, or does not acknowledge for `ack_seconds`, is lost (0: never).
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        devices: Sequence[BlockDevice],
        digests: Sequence[Buffer | None],
        *,
        stale: Sequence[DirtyBitmap | None] | None = None,
        compress: bool = False,
        ring: bool = True,
        patience_seconds: int = 60,
        ack_seconds: int = 300,
    ) -> None: ...
    def tune(self, *, frame_bytes: int, gap_bytes: int, nice: int) -> None:
        """Set the payload of frames, the clean gaps that are sent too, the threads' niceness."""
    def send(self, jobs: Iterable[tuple[int, DirtyBitmap]], generation: int) -> list[Unread]:
        """Read and send all that is marked in (volume, marks), one thread a connection.

        Runs of 64 KiB or more of zeros travel as ZERO. The marks must not change meanwhile. Returns
        what was left out, as it could not be read: ranges of whole 4096 bytes, or of whole chunks
        where there are digests (whose entries stay as they were). OSError if the device fails as a
        whole or MAX_UNREAD of them do (what was sent until then is not known), ConnectionLost,
        Stopped.
        """
    def send_frame(self, frame: Buffer) -> None:
        """Send one frame that is ready. ConnectionLost, Stopped."""
    def end(self, generation: int) -> float:
        """End the round and wait until it is durable there: seconds of the target's flush."""
    def check(self) -> None:
        """Raise ConnectionLost if a connection is known to be lost. Does not wait."""
    def limit(self, bytes_per_second: int) -> None:
        """Send at most so much from now on, also within a call that runs; 0 is no limit."""
    def pause(self, paused: bool) -> None:
        """Stop reading and sending, or go on; acts within one slice of at most 256 KiB."""
    def stop(self) -> None:
        """End a call that runs before its next frame, and all to come. Any thread."""
    def cut(self) -> None:
        """End the connections at once: a call that runs fails. Any thread."""
    def counters(self) -> tuple[int, int, int]:
        """Return (bytes of the volumes sent, bytes on the wire, compressed frames). Any time."""
    def close(self) -> None:
        """Close the connections. RuntimeError while a call runs. Safe to call twice."""

class Receiver:
    """The target's end of the connections of one session: verifies and writes, a thread each.

    Holds the devices open until `join`. `sizes_bytes` bound what is written; extents are marked in
    `written` before they are. `generation` is the first that is taken. Memory: 1.2 MiB a
    connection, 2.2 MiB with compressed frames.
    """

    def __init__(
        self,
        devices: Sequence[BlockDevice],
        sizes_bytes: Sequence[int],
        *,
        connections: int,
        generation: int,
        written: Sequence[DirtyBitmap | None] | None = None,
        ring: bool = True,
    ) -> None: ...
    def add(self, connection: Connection, *, first: bool) -> None:
        """Start to receive on a connection; acknowledgements go out on the `first`."""
    def wait(self) -> None:
        """Return once a round has ended on all connections: all of it is written.

        Raises what ended the session: FrameError and its kinds, OSError with the device's name,
        ConnectionLost, Stopped.
        """
    def acknowledge(self, flush_seconds: float) -> None:
        """Tell the source that the round is durable; the next generation is open."""
    @property
    def generation(self) -> int:
        """The generation that is open."""
    @property
    def received_bytes(self) -> int:
        """Bytes of frames so far."""
    def stop(self) -> None:
        """Cut all connections, and end `wait`. Does not wait."""
    def join(self) -> None:
        """Stop, wait for what is being written, and give the devices back. Safe to call twice."""
