"""NBD exports on Unix sockets, read as devices, and the dirty bitmaps that QEMU shows with them."""

from collections.abc import Iterator, Sequence

from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice

MAX_CONNECTIONS: int
MAX_CONTEXTS: int

def version() -> str:
    """Return the version of libnbd."""

class NbdDevice(BlockDevice):
    """An export, read by whatever reads a BlockDevice (gather, digests, the tcp sender).

    Never writes. Pieces of one batch are under way at once; calls in several threads have a
    connection each (up to `connections`). A connection that breaks fails what was under way and is
    made anew by the next read; one of another size is ESTALE. A server that is silent for
    `patience_seconds` is ETIMEDOUT. `flush` does nothing, `fileno` and the fence are EBADF. `path`
    is what errors call it. Raises OSError with errno.
    """

    def __init__(
        self,
        path: str,
        *,
        socket_path: str,
        export: str,
        connections: int = 4,
        patience_seconds: float = 30.0,
    ) -> None: ...
    def redirect(self, *, socket_path: str, export: str) -> None:
        """Read from another place, with the same bytes, from now on; running reads end first."""
    def data_extents(
        self, start_bytes: int = 0, *, least_bytes: int = 0
    ) -> Iterator[tuple[int, int]] | None:
        """Iterate (offset, length) of what does not surely read as zeros (base:allocation)."""

def read_marks(
    socket_path: str,
    export: str,
    bitmaps: Sequence[str],
    into: DirtyBitmap,
    *,
    patience_seconds: float = 30.0,
) -> None:
    """Mark in `into` what any of these dirty bitmaps of an export has (qemu:dirty-bitmap:NAME).

    On an error some may be marked already. OSError: ENOENT where the export has no such bitmap,
    ESTALE where its size is not that of `into`.
    """
