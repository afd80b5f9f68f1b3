"""What an agent may ask of the QEMUs of its host, and the names of what it makes there."""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Access:
    """The configuration's patterns, where sockets are made, and who this agent is (12 letters)."""

    sockets: tuple[str, ...]
    nbd_sockets: tuple[str, ...]
    run_dir: Path
    agent: str
    patience_seconds: float = 10.0

    @property
    def prefix(self) -> str:
        """What all names begin with that this agent makes in a QEMU."""
        return f"warmsync-{self.agent}-"

    def volume_of(self, name: str) -> str:
        """Return the volume that something in a QEMU was made for; empty if it is not ours."""
        ours = name.startswith(self.prefix)
        return name.removeprefix(self.prefix).rpartition("-")[0] if ours else ""

    def find_sockets(self) -> list[str]:
        """Return the QMP sockets that are there now."""
        return _find(self.sockets)

    def find_nbd_sockets(self) -> list[str]:
        """Return where an NBD server may be that others have started."""
        return _find(self.nbd_sockets)

    def nbd_path(self, qmp_socket: str) -> str:
        """Return where our NBD server in a QEMU listens: the same for each agent's life."""
        return str(self.run_dir / f"{self.agent}-{_short(qmp_socket)}.nbd")

    def keeper_path(self, name: str) -> str:
        """Return the QMP socket of our own storage daemon for a volume."""
        return str(self.run_dir / f"{self.agent}-{_short(name)}.keeper")

    def find_keepers(self) -> list[str]:
        """Return the QMP sockets of all storage daemons of ours."""
        return [str(path) for path in self.run_dir.glob(f"{self.agent}-*.keeper")]


@dataclass(frozen=True, slots=True)
class Seat:
    """The place of one volume: its name, and the file that says after a restart what it was."""

    access: Access
    name: str
    note: Path

    @property
    def prefix(self) -> str:
        """What the names begin with of all that is made for this volume."""
        return f"{self.access.prefix}{self.name}-"

    def owns(self, name: str) -> bool:
        """Return whether something in a QEMU was made for this volume."""
        return self.access.volume_of(name) == self.name

    @property
    def export(self) -> str:
        """The export that is read, and its id."""
        return f"{self.prefix}data"


def _find(patterns: tuple[str, ...]) -> list[str]:
    found = {path for pattern in patterns for path in glob.glob(pattern)}
    return sorted(path for path in found if _is_socket(path))


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def _short(text: str) -> str:
    """A Unix socket's path has 107 bytes (unix(7)), names of migrations may have 63."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
