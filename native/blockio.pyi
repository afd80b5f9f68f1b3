"""Direct I/O on block devices and regular files."""

from array import array
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

from typing_extensions import Buffer

MAX_UNREAD: int
"""Bad places that one round gets around; a device with more fails as a whole."""

class Unread(NamedTuple):
    """A range of a volume that could not be read, and why."""

    volume: int
    offset_bytes: int
    length_bytes: int
    errno: int

class BlockDevice:
    """An open block device or regular file, read and written with O_DIRECT.

    Each OSError carries errno, the path as filename, and says in strerror what was attempted
    (operation, offset, length). A short transfer is EIO. EINTR is retried. Buffers must be aligned
    to 4096 (AlignedBuffer) and offsets and lengths to the logical block size, except that in a
    file a transfer may end anywhere (the page it ends in is accessed through a second, buffered
    descriptor). Nothing moves beyond the end: EIO, so files never grow. Files on a file system
    without O_DIRECT are accessed buffered (`direct` is then False): for a file that is coherent on
    one host.

    exclusive: a block device is opened with O_EXCL (EBUSY if mounted, held by device mapper or md,
    swapped on or claimed by another); a file must not be open anywhere else (lease) nor locked, and
    is flock()ed. Who opens a file later without asking for the lock is not kept out.
    All calls that do I/O release the GIL and are thread-safe.
    Raises OSError(ENOTBLK) for anything that is neither a block device nor a regular file, and
    OSError(EROFS) for a read-only device, or a file that nobody may write, if `writable`.
    """

    def __init__(self, path: str, *, writable: bool = False, exclusive: bool = False) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def is_block_device(self) -> bool: ...
    @property
    def direct(self) -> bool: ...
    @property
    def writable(self) -> bool: ...
    @property
    def logical_block_size_bytes(self) -> int: ...
    @property
    def physical_block_size_bytes(self) -> int: ...
    @property
    def zero_methods(self) -> tuple[str, ...]:
        """What `zero` still tries, best first: "punch", "zeroout", "write".

        A method that the device refused (EOPNOTSUPP, ENOTTY, EINVAL...) is remembered as refused.
        """
    def size_bytes(self) -> int:
        """Ask the kernel now: devices and files can change size."""
    def fileno(self) -> int: ...
    def read(self, offset_bytes: int, buffer: Buffer) -> None:
        """Fill the whole buffer from `offset_bytes`."""
    def write(self, offset_bytes: int, buffer: Buffer) -> None: ...
    def read_batch(self, extents: array[int], buffer: Buffer) -> int:
        """Read array("Q") offset, length pairs one after the other into `buffer`; returns bytes."""
    def write_batch(self, extents: array[int], buffer: Buffer) -> int: ...
    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        """Make the range read as zeros: punch a hole, else BLKZEROOUT / ZERO_RANGE, else write."""
    def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """BLKDISCARD or punch a hole; OSError(EOPNOTSUPP) where that cannot be done."""
    def flush(self) -> None:
        """fsync: all that was written, here or through the page cache, is durable."""
    def data_extents(
        self, start_bytes: int = 0, *, least_bytes: int = 0
    ) -> Iterator[tuple[int, int]] | None:
        """Iterate ranges (offset, length) that may hold data; all else reads as zeros.

        A range of fewer than `least_bytes` is reported as that long: fewer questions to the file
        system, for some holes that are read.

        Files: SEEK_DATA and SEEK_HOLE. A loop device is asked through its backing file, if that is
        proven to be it (device and inode of LOOP_GET_STATUS64), with offset and size limit;
        a partition of one likewise. None where nothing is known.

        The device is flushed first, so the answer holds for all that was written to it before the
        call. What is written meanwhile, or lies in the page cache of a file system or partition on
        it, only a tracker that was started before can tell. ValueError from the iterator once the
        device is closed.
        """
    def is_read_only(self) -> bool:
        """BLKROGET; for a file: no write permission for anybody."""
    def set_read_only(self, read_only: bool) -> None:
        """The fence. BLKROSET; for a file remove write permission, or put back what was removed.

        Who has a file open already can go on writing it. What another object removed is not known
        here: then the owner gets write permission.
        """
    def close(self) -> None:
        """Close. A call still running in another thread ends first, and closes the device then."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...
