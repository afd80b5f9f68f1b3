"""Memory that outlives the agent: files of the state directory, mapped.

Owns their making and taking up again. What is in them is right after the death of the process, as
the page cache keeps it, and worth nothing after the death of the host: who takes them up again has
to know that it is the same boot.
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress
from pathlib import Path

from agent.errors import NotAllowed, ResourceExhausted, WarmsyncError
from native.bitmap import DirtyBitmap

_BITS_PER_WORD = 64
_WORD_BYTES = 8


class Store:
    """The files of one volume. `directory` None: plain memory, for those who need no more."""

    def __init__(self, directory: Path | None, prefix: str = "") -> None:
        self._directory = directory
        self._prefix = prefix

    @property
    def keeps(self) -> bool:
        """Whether what is made here are files."""
        return self._directory is not None

    def make(self, name: str, size_bytes: int) -> mmap.mmap:
        """Return zeroed memory. ResourceExhausted STATE_DIR_FULL, NotAllowed STATE_DIR_UNUSABLE;
        nothing is left then.
        """
        if self._directory is None:
            # Private, so that a page that is only read stays the shared zero page.
            return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        path = self._path(self._directory, name)
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with path.open("wb+") as file:
                # All of it now: a disk that is full later would kill the agent at a store to it.
                os.posix_fallocate(file.fileno(), 0, size_bytes)
                return mmap.mmap(file.fileno(), size_bytes)
        except OSError as error:
            with suppress(OSError):
                path.unlink()
            raise _not_made(path, size_bytes, error) from error

    def open(self, name: str, size_bytes: int) -> mmap.mmap:
        """Take memory up again. OSError, also if it has another size."""
        if self._directory is None:
            raise FileNotFoundError(2, "nothing was kept")
        path = self._path(self._directory, name)
        with path.open("rb+") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size_bytes:
                raise OSError(5, f"{path} has {found} bytes, not {size_bytes}")
            return mmap.mmap(file.fileno(), size_bytes)

    def make_bitmap(self, name: str, size_bytes: int, block_size_bytes: int) -> DirtyBitmap:
        """Return an empty bitmap of a volume of `size_bytes`."""
        if self._directory is None:
            return DirtyBitmap(size_bytes, block_size_bytes)
        words = self.make(name, _words_bytes(size_bytes, block_size_bytes))
        return DirtyBitmap(size_bytes, block_size_bytes, words=words)

    def open_bitmap(self, name: str, size_bytes: int, block_size_bytes: int) -> DirtyBitmap:
        """Take a bitmap up again. OSError."""
        words = self.open(name, _words_bytes(size_bytes, block_size_bytes))
        return DirtyBitmap(size_bytes, block_size_bytes, words=words)

    def drop(self, name: str) -> None:
        """Remove a file, if it is there, so that it cannot be taken up. STATE_DIR_UNUSABLE."""
        if self._directory is None:
            return
        path = self._path(self._directory, name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _not_made(path, 0, error) from error

    def remove(self, *, keep: str = "") -> None:
        """Remove the files, but the one that is to be kept; memory still mapped stays good."""
        if self._directory is not None:
            for path in self._directory.glob(f"{self._prefix}.*"):
                kept = keep and path.name == f"{self._prefix}.{keep}"
                if (
                    path.stem == self._prefix and not kept
                ):  # not those of an id that begins like ours
                    path.unlink(missing_ok=True)

    def _path(self, directory: Path, name: str) -> Path:
        return directory / f"{self._prefix}.{name}"


def _not_made(path: Path, size_bytes: int, error: OSError) -> WarmsyncError:
    """Return the domain's error; a file system that cannot reserve room counts as full."""
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR):
        message = f"state directory {path}: {error.strerror}; choose another with --state-dir"
        return NotAllowed("STATE_DIR_UNUSABLE", message, path=path)
    return ResourceExhausted(
        "STATE_DIR_FULL",
        f"the state directory has no room for {size_bytes} bytes ({error.strerror}); "
        "free space there, or choose another with --state-dir",
        path=path,
        size_bytes=size_bytes,
    )


def _words_bytes(size_bytes: int, block_size_bytes: int) -> int:
    blocks = -(-size_bytes // block_size_bytes)
    return -(-blocks // _BITS_PER_WORD) * _WORD_BYTES
