"""Page-aligned memory for direct I/O, pooled."""

from types import TracebackType

from typing_extensions import Buffer

class AlignedBuffer(Buffer):
    """`size_bytes` of zeroed, writable memory at an address that is a multiple of 4096.

    Exports the buffer protocol (bytes). Raises ValueError for a size below 1, MemoryError.
    """

    def __init__(self, size_bytes: int) -> None: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Lease:
    """A buffer on loan, given back at the end of the `with` block, or when the lease is dropped.

    If a view of the buffer is then still alive, its memory is not lent again.
    """

    def __enter__(self) -> AlignedBuffer: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...

class BufferPool:
    """At most `count` buffers of `size_bytes`, made when first needed and used again.

    Thread-safe. `lease()` waits (without the GIL) while all are out; RuntimeError once closed,
    also for those who wait. Raises ValueError for a size or count below 1.
    """

    def __init__(self, size_bytes: int, count: int) -> None: ...
    @property
    def outstanding(self) -> int:
        """Return how many buffers are on loan."""
    def lease(self) -> Lease: ...
    def close(self) -> None:
        """Free the buffers, wake all who wait. What is on loan is freed when it comes back."""
