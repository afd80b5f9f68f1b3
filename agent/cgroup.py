"""Cgroups: found, checked, and the limit of their writes to a disk read and set.

Owns the kernel's two interfaces (io.max of v2, blkio.throttle.write_bps_device of v1) and what
may be wrong with a cgroup. Decides no limit and remembers none. All calls block.

The kernel limits whole disks. A limit stays with the disk's number until it is written again, also
when a loop device is detached meanwhile (seen on 6.18).
Format: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/blkio-controller.rst of the kernel.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from agent.config import is_allowed
from agent.errors import FailedPrecondition, NotAllowed, NotFound, WarmsyncError

V2_FILE = "io.max"
V1_FILE = "blkio.throttle.write_bps_device"


@dataclass(frozen=True, slots=True)
class Cgroup:
    """A cgroup that limits are written to; `inode` tells it from a later one of its name."""

    path: str
    inode: int
    file: str

    def read(self, disk: str) -> int:
        """Return the limit for writes to a disk ("MAJ:MIN") in bytes a second; 0 is none."""
        with self._opened(os.O_RDONLY) as descriptor:
            text = _read_all(descriptor)
        for line in text.splitlines():
            number, *words = line.split()
            if number == disk:
                return self._parse(words)
        return 0

    def write(self, disk: str, limit: int) -> None:
        """Set the limit for writes to a disk; 0 is none. What else is limited stays."""
        rate = str(limit) if self.file == V1_FILE else f"wbps={limit or 'max'}"
        with self._opened(os.O_WRONLY) as descriptor:
            put(descriptor, f"{disk} {rate}")

    def prove(self, disk: str) -> None:
        """Set the limit that is there anyway. NotAllowed or FailedPrecondition if it cannot be."""
        try:
            self.write(disk, self.read(disk))
        except OSError as error:
            raise _write_error(self.path, disk, error) from error

    def _parse(self, words: list[str]) -> int:
        if self.file == V1_FILE:
            return int(words[0])
        rate = dict(word.split("=", 1) for word in words)["wbps"]
        return 0 if rate == "max" else int(rate)

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if os.fstat(directory).st_ino != self.inode:
                raise FileNotFoundError(errno.ENOENT, "the cgroup is gone", self.path)
            descriptor = os.open(self.file, flags | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.close(directory)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def open_cgroup(path: str, allowed: tuple[str, ...]) -> Cgroup:
    """Return a cgroup that the configuration allows. The domain's errors; changes nothing."""
    check_allowed(path, os.path.realpath(path), allowed)
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _open_error(path, error) from error
    try:
        # What was opened, in case a link on the way was changed meanwhile.
        real = os.readlink(f"/proc/self/fd/{directory}")
        check_allowed(path, real, allowed)
        cgroup = Cgroup(real, os.fstat(directory).st_ino, _file_of(real, directory))
        _check_populated(cgroup, directory)
    finally:
        os.close(directory)
    return cgroup


def check_allowed(path: str, resolved: str, allowed: tuple[str, ...]) -> None:
    """Raise NotAllowed unless a pattern of the configuration matches the cgroup."""
    if not is_allowed(path, resolved, allowed):
        raise NotAllowed(
            "CGROUP_NOT_ALLOWED",
            f"{path} is not among the cgroups that this agent may throttle; "
            "start the agent with --allow-cgroup or add it to allow_cgroups in its configuration",
            path=path,
        )


def put(descriptor: int, text: str) -> None:
    """Give the kernel one line: it takes it whole, or says why not."""
    os.write(descriptor, text.encode())


def _read_all(descriptor: int) -> str:
    with open(descriptor, closefd=False) as file:
        return file.read()


def _file_of(path: str, directory: int) -> str:
    for name in (V2_FILE, V1_FILE):
        try:
            os.stat(name, dir_fd=directory)
        except OSError:
            continue
        return name
    raise FailedPrecondition(
        "CGROUP_UNSUITABLE",
        f"{path} has neither {V2_FILE} nor {V1_FILE}: name a directory of the v1 blkio hierarchy, "
        "or let the cgroup above it pass the v2 io controller on (IOAccounting=yes, or +io in "
        "its cgroup.subtree_control)",
        path=path,
    )


def _check_populated(cgroup: Cgroup, directory: int) -> None:
    """Raise FailedPrecondition for a cgroup in which nothing runs: no guest would be slowed."""
    # v2 limits what is below as well; v1 does not (blk-throttle.c, throtl_pd_init).
    name = "cgroup.procs" if cgroup.file == V1_FILE else "cgroup.events"
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        raise _open_error(cgroup.path, error) from error
    try:
        text = _read_all(descriptor)
    finally:
        os.close(descriptor)
    if not text.strip() or "populated 0" in text:
        raise FailedPrecondition(
            "CGROUP_EMPTY",
            f"nothing runs in cgroup {cgroup.path}; name the one that the VM's process is in (of "
            "v1 exactly that one: its limits do not reach the cgroups below)",
            path=cgroup.path,
        )


def _open_error(path: str, error: OSError) -> WarmsyncError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        message = f"cgroup {path} does not exist; see /proc/PID/cgroup of the VM's process"
        return NotFound("CGROUP_NOT_FOUND", message, path=path)
    return _not_writable(path, error)


def _write_error(path: str, disk: str, error: OSError) -> WarmsyncError:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _not_writable(path, error)
    return FailedPrecondition(
        "CGROUP_UNSUITABLE",
        f"the kernel takes no limit of cgroup {path} for disk {disk}: {error.strerror}; leave out "
        "--guest-cgroup",
        path=path,
        disk=disk,
    )


def _not_writable(path: str, error: OSError) -> NotAllowed:
    return NotAllowed(
        "CGROUP_NOT_WRITABLE",
        f"cgroup {path} cannot be throttled: {error.strerror}; run the agent as root, in a systemd "
        "unit with ProtectControlGroups=no",
        path=path,
    )
