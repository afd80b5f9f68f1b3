"""The machine that an image is in: a storage daemon, and what its guest sees, as a file."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests import qemus
from tests.qemus import Qemu

FORMATS = ("qcow2", "raw")
_QUIT_SECONDS = 5.0
"""What a storage daemon may take to end that was told to."""


class Machine:
    """`image` is the source of a migration, `guest` is the disk that fio has; both are paths."""

    def __init__(self, qemu: Qemu) -> None:
        self._qemu = qemu
        self._up = ExitStack()

    @property
    def image(self) -> str:
        """Return the path of the image."""
        return str(self._qemu.image)

    @property
    def guest(self) -> str:
        """Return the path of what the guest sees, while the machine is up."""
        return str(self._qemu.directory / "guest")

    @property
    def is_up(self) -> bool:
        """Whether the image is open, and can be written through `guest`."""
        process = self._qemu.process
        return process is not None and process.poll() is None

    @property
    def settings(self) -> tuple[str, str]:
        """Return the sockets that an agent is to be allowed: QMP's and NBD's."""
        return self._qemu.socket, self._qemu.nbd_socket

    def start(self) -> None:
        """Open the image; nothing is done if it is open."""
        if not self.is_up:
            Path(self._qemu.nbd_socket).unlink(missing_ok=True)
            self._qemu.start_daemon()
            self._up.enter_context(qemus.guest_file(self._qemu))

    def exit(self) -> None:
        """End as after a power-down of the guest, whose bitmaps are saved where they can be."""
        self._up.close()
        self._qemu.quit()

    def kill(self) -> None:
        """End as in a crash of the host, whose marks are lost."""
        self._qemu.kill()
        self._up.close()

    def traces(self) -> list[str]:
        """Return what an agent has left in it: bitmaps and exports."""
        exports = [name for name in self._qemu.exports() if name != "guest"]
        return [*self._qemu.bitmaps(), *exports]

    def read_into(self, file: Path) -> None:
        """Write what a guest sees, or would see, to a file; nobody writes meanwhile."""
        if self.is_up:
            subprocess.run(["cp", "--sparse=never", self.guest, str(file)], check=True)
        else:
            qemus.convert(self._qemu, file)


@contextmanager
def machine(directory: Path, size_bytes: int, driver: str) -> Iterator[Machine]:
    """Make an image and start its machine; all of it is gone at the end."""
    with qemus.disk(directory, size_bytes, driver) as qemu:
        made = Machine(qemu)
        try:
            made.start()
            yield made
        except BaseException:
            made.kill()
            _end_keepers(made.image)  # of agents that were killed, or whatever went wrong
            raise
        made.kill()
        left = _end_keepers(made.image)
        assert not left, f"agents have left the storage daemons {left} on {made.image}"


def _end_keepers(image: str) -> list[int]:
    """End the storage daemons that are left on an image, if they do not by themselves."""
    deadline = time.monotonic() + _QUIT_SECONDS
    while (left := _find_keepers(image)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return left


def _find_keepers(image: str) -> list[int]:
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            words = line.read_bytes()
            if words.startswith(b"qemu-storage-daemon\0") and image.encode() in words:
                found.append(int(line.parent.name))
    return found
