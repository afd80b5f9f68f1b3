"""An image at rest: its QEMU has ended, and our own storage daemon shows it, read-only.

Owns that process. It shares the image: a VM that is started again must not find it locked, and that
somebody has written to it shows in its stamp.
"""

from __future__ import annotations

import json
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from agent.errors import FailedPrecondition, Unavailable, WarmsyncError
from agent.qemu.access import Access, Seat
from agent.qemu.export import await_no_server, forget_server
from agent.qemu.image import Image
from agent.qemu.monitor import Monitor, converse, gone
from agent.qemu.node import Node, get_node

NODE = "image"
_START_SECONDS = 10.0
_TOOL_SECONDS = 30.0
"""What qemu-img may take: with storage that never answers, it never ends."""
_KILLED_SECONDS = 1.0
_MAGIC = b"QFI\xfb"
"""What a qcow2 image begins with (docs/interop/qcow2.txt)."""


class Keeper:
    """A storage daemon of ours on an image. `serial` tells one start from another."""

    _serials = 0

    def __init__(self, seat: Seat, image: Image, driver: str) -> None:
        Keeper._serials += 1
        self.serial = Keeper._serials
        self.socket = seat.access.keeper_path(seat.name)
        self._access = seat.access
        self._patience_seconds = seat.access.patience_seconds
        self._image = image
        self._stamp = image.stamp()
        dismiss(seat.access, self.socket)
        seat.access.run_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        self._process = _start(self.socket, image.path, driver)
        try:
            self._await()
        except WarmsyncError:
            raise
        except BaseException:
            self.stop()
            raise

    @property
    def is_current(self) -> bool:
        """Whether the image is as it was when the daemon opened it."""
        return self._process.poll() is None and self._image.stamp() == self._stamp

    def node(self) -> Node:
        """Return the disk with its bitmaps. QEMU_GONE if the daemon has ended."""

        async def ask(monitor: Monitor) -> Node:
            node = await get_node(monitor, NODE)
            if node is None:
                raise gone(self.socket)
            return node

        return converse(self.socket, ask, self._patience_seconds)

    def _answers(self) -> bool:
        """Whether it listens: its socket is there a moment before that."""
        try:
            self.node()
        except FailedPrecondition as error:
            if error.reason != "QEMU_GONE":
                raise
            return False
        return True

    def stop(self) -> None:
        """End the daemon. Safe to call twice."""
        self._process.terminate()
        try:
            self._process.communicate(timeout=self._patience_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._forget()

    def _forget(self) -> None:
        Path(self.socket).unlink(missing_ok=True)
        forget_server(self._access, self.socket)

    def _await(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        try:
            while not self._answers():
                time.sleep(0.01)
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise gone(self.socket)
        except WarmsyncError as error:
            self._process.kill()
            said = self._process.communicate()[1].strip().splitlines()
            self._forget()
            if isinstance(error, Unavailable):  # it did not answer in time: another may
                raise
            raise FailedPrecondition(
                "IMAGE_UNUSABLE",
                f"{self._image.path} cannot be opened now that its QEMU has ended: "
                f"{said[-1] if said else error}; start its VM again",
                path=self._image.path,
            ) from error


def dismiss(access: Access, socket: str) -> None:
    """End the daemon that an agent before this one has left behind, if it has."""

    async def ask(monitor: Monitor) -> None:
        await monitor.execute("quit")

    if Path(socket).exists():
        with suppress(WarmsyncError):  # ended meanwhile, or at once
            converse(socket, ask, access.patience_seconds)
        await_no_server(access, socket)
        Path(socket).unlink(missing_ok=True)
    forget_server(access, socket)


def remove_bitmaps(path: str, names: list[str]) -> list[str]:
    """Remove bitmaps from an image at rest; return those that stay, as somebody has it open.

    IMAGE_UNUSABLE, as `list_bitmaps`.
    """
    left = []
    for name in names:
        command = ["qemu-img", "bitmap", "--remove", "-f", "qcow2", path, name]
        done = _run(path, command)
        if done.returncode != 0:
            left.append(name)
    return left


def list_bitmaps(path: str, prefix: str) -> list[str]:
    """Return the bitmaps in a qcow2 image with this prefix; none where no such image is any more.

    IMAGE_UNUSABLE where qemu-img cannot be run, does not end or cannot look: it is open elsewhere.
    """
    command = ["qemu-img", "info", "--output=json", "-f", "qcow2", path]
    done = _run(path, command)
    if done.returncode != 0:
        if not _is_qcow2(path):
            return []
        said = done.stderr.strip().splitlines()
        raise FailedPrecondition(
            "IMAGE_UNUSABLE",
            f"{path} cannot be looked into: {said[0] if said else command[0]}; end what has it "
            "open",
            path=path,
        )
    data = json.loads(done.stdout).get("format-specific", {}).get("data", {})
    names = [one["name"] for one in data.get("bitmaps", ())]
    return [name for name in names if name.startswith(prefix)]


def _is_qcow2(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except FileNotFoundError:
        return False


def _run(path: str, command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise _unusable(path, command[0], error) from error
    try:
        said, failed = process.communicate(timeout=_TOOL_SECONDS)
    except subprocess.TimeoutExpired as error:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # the kernel may hold it: not waited for then
            process.communicate(timeout=_KILLED_SECONDS)
        raise FailedPrecondition(
            "IMAGE_UNUSABLE",
            f"{path} has not answered {command[0]} for {_TOOL_SECONDS:g} s; see to its storage",
            path=path,
        ) from error
    return subprocess.CompletedProcess(command, process.returncode, said, failed)


def _start(socket: str, path: str, driver: str) -> subprocess.Popen[str]:
    kind = "host_device" if Path(path).is_block_device() else "file"
    file = {"driver": kind, "filename": path, "read-only": True, "force-share": True}
    block: dict[str, object] = {"driver": driver, "file": file}
    if driver == kind:
        block = file
    block |= {"node-name": NODE, "read-only": True, "force-share": True}
    command = ["qemu-storage-daemon", "--blockdev", json.dumps(block)]
    command += ["--chardev", f"socket,id=qmp,path={socket},server=on,wait=off"]
    command += ["--monitor", "chardev=qmp"]
    try:
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise _unusable(path, command[0], error) from error


def _unusable(path: str, program: str, error: OSError) -> FailedPrecondition:
    return FailedPrecondition(
        "IMAGE_UNUSABLE",
        f"{path} cannot be opened now that its QEMU has ended: {program}: {error.strerror}; "
        "install it (qemu-utils), or start the VM again",
        path=path,
    )
