"""The brake: a limit on the writes of a cgroup's processes to the source's disks.

Owns what limit stood there before, so that an operator's own comes back, and the journal by which
the next agent undoes what a killed one left. Decides no limit. All calls block: run them on a
thread. The kernel limits whole disks, so a partition's limit is its disk's.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from agent.cgroup import Cgroup, open_cgroup
from agent.device import boot_id, disk_range
from agent.errors import InvalidArgument
from agent.migration import GuestThrottle, Identity
from native.blockio import BlockDevice

_log = logging.getLogger(__name__)

_VANISHED = (errno.ENOENT, errno.ENODEV, errno.ENXIO)


@dataclass(frozen=True, slots=True)
class Held:
    """A disk's limit: `before` is not ours (0: none), `ours` are those that we may have set."""

    disk: str
    before: int
    ours: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """What the journal knows of one migration's brake. It ends with the boot, as limits do."""

    boot: str
    cgroup: Cgroup
    disks: tuple[Held, ...]

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a journal. ValueError, KeyError or TypeError if it is damaged."""
        found: dict[str, Any] = json.loads(path.read_text())
        disks = (Held(one["disk"], one["before"], tuple(one["ours"])) for one in found["disks"])
        return cls(found["boot"], Cgroup(**found["cgroup"]), tuple(disks))

    def save(self, path: Path) -> None:
        """Write it whole or not at all, and durable."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        with new.open("w") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def undo(self) -> None:
        """Put back what stood there before. Safe to repeat; OSError once all were tried."""
        failures: list[OSError] = []
        for held in self.disks:
            try:
                self._undo(held)
            except OSError as error:
                if error.errno not in _VANISHED:
                    failures.append(error)
        if failures:
            raise failures[0]

    def _undo(self, held: Held) -> None:
        found = self.cgroup.read(held.disk)
        if found == held.before:
            return
        if found in held.ours:
            self.cgroup.write(held.disk, held.before)
            return
        # Somebody else has decided since, and knows better.
        _log.warning(
            "another limit was set meanwhile and stays cgroup=%s disk=%s bytes_per_second=%d",
            self.cgroup.path,
            held.disk,
            found,
        )


class Brake:
    """A migration's hold on the writes of its guest; off until `limit` is called."""

    def __init__(self, cgroup: Cgroup, disks: list[str], journal: Path) -> None:
        self._cgroup = cgroup
        self._disks = disks
        self._journal = journal
        self._record: Record | None = None
        self._lock = threading.Lock()

    @property
    def identities(self) -> list[Identity]:
        """What no other migration may have: the limits that it would set."""
        cgroup = self._cgroup
        names = (f"writes of {cgroup.path} ({cgroup.inode}) to {disk}" for disk in self._disks)
        return [Identity(name, 0, 1) for name in names]

    def prove(self) -> None:
        """Set the limits that are there anyway. NotAllowed or FailedPrecondition if they cannot."""
        for disk in self._disks:
            self._cgroup.prove(disk)

    def limit(self, bytes_per_second: int) -> None:
        """Limit the writes to each disk, unless it is limited further already.

        OSError if that fails; what was done by then is in the journal, and `lift` undoes it.
        """
        with self._lock:
            self._undo_former()
            held = tuple(self._plan(disk, bytes_per_second) for disk in self._disks)
            record = Record(boot_id(), self._cgroup, held)
            record.save(self._journal)  # first: an agent that is killed now leaves a trace
            self._record = record
            for one in held:
                self._cgroup.write(one.disk, one.ours[-1])

    def lift(self) -> None:
        """Put back what stood there before. Safe to repeat; OSError if it is still on."""
        with self._lock:
            if self._record is not None:
                self._record.undo()
                self._journal.unlink(missing_ok=True)
                self._record = None

    def _undo_former(self) -> None:
        """Undo what a migration of this id could not: its limit must not pass for an operator's."""
        if self._record is None and self._journal.exists():
            Record.load(self._journal).undo()

    def _plan(self, disk: str, wanted: int) -> Held:
        found = self._cgroup.read(disk)
        known = {one.disk: one for one in self._record.disks} if self._record else {}
        held = known.get(disk, Held(disk, found, ()))
        if found not in held.ours:  # an operator's, perhaps new
            held = Held(disk, found, ())
        if held.before and held.before <= wanted:
            wanted = held.before
        # What stands there now counts as ours until the new limit is sure to have been written.
        return replace(held, ours=(found, wanted) if found in held.ours else (wanted,))


def find_brake(
    wanted: GuestThrottle, devices: list[BlockDevice], allowed: tuple[str, ...], journal: Path
) -> Brake:
    """Return the brake that a request asks for, off. The domain's errors; changes nothing."""
    disks = {_disk_of(device) for device in devices}
    return Brake(open_cgroup(wanted.cgroup, allowed), sorted(disks), journal)


def undo_left_behind(directory: Path) -> None:
    """Lift the brakes that an agent of this state directory left on when it was killed."""
    if not directory.is_dir():
        return
    for path in directory.glob("*.new"):  # its brake was not on yet
        path.unlink()
    for path in sorted(directory.glob("*.json")):
        try:
            record = Record.load(path)
            if record.boot == boot_id():
                record.undo()
                _log.warning(
                    "lifted a guest's limit that an earlier agent left behind id=%s cgroup=%s",
                    path.stem,
                    record.cgroup.path,
                )
            path.unlink()
        except OSError as error:
            _log.error('guest still throttled id=%s reason="%s"', path.stem, error)
        except (ValueError, KeyError, TypeError) as error:
            _log.error('journal of a throttled guest is damaged path=%s reason="%s"', path, error)
            path.rename(path.with_suffix(".damaged"))


def _disk_of(device: BlockDevice) -> str:
    if not device.is_block_device:
        raise InvalidArgument(
            "THROTTLE_UNSUITABLE",
            f"{device.path} is a file, and the kernel throttles writes to disks only; leave out "
            "--guest-cgroup, or move a block device",
            path=device.path,
        )
    disk = disk_range(os.fstat(device.fileno()).st_rdev)
    return f"{disk.major}:{disk.minor}"
