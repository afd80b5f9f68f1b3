"""Real QEMUs and storage daemons with a disk, and guests that write to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.qemu.access import Access, Seat
from agent.qemu.monitor import Monitor, converse

PATIENCE_SECONDS = 60.0


@dataclass
class Qemu:
    """A process with the node `disk`; `guest` is its NBD export for writing, as a file."""

    directory: Path
    image: Path
    driver: str
    process: subprocess.Popen[bytes] | None = None
    server: dict[str, object] | None = None
    """Of a network disk; `image` is what the server has then."""
    own_node: bool = False
    """Whether it has the block device by a node of its own, as libvirt's QEMUs have."""
    options: dict[str, object] = field(default_factory=dict)
    """More options of the disk."""
    filters: tuple[str, ...] = ()
    """Drivers of what stands between the disk and a machine's device, the lowest first."""

    @property
    def source(self) -> str:
        """How an agent names the disk."""
        return f"{self.socket}/disk" if self.server else str(self.image)

    @property
    def socket(self) -> str:
        return str(self.directory / "qmp.sock")

    @property
    def nbd_socket(self) -> str:
        return str(self.directory / "guest.nbd")

    @property
    def access(self) -> Access:
        """What an agent is allowed here."""
        return Access(
            (str(self.directory / "qmp.sock"),),
            (self.nbd_socket,),
            self.directory / "run",
            "0123456789ab",
            PATIENCE_SECONDS,
        )

    def seat(self, name: str = "move-0") -> Seat:
        return Seat(self.access, name, self.directory / f"{name}.qemu")

    def ask(self, command: str, **arguments: object) -> Any:
        async def work(monitor: Monitor) -> Any:
            return await monitor.execute(command, **arguments)

        return converse(self.socket, work, PATIENCE_SECONDS)

    def bitmaps(self) -> list[str]:
        """Return the names of all dirty bitmaps of the disk."""
        nodes = self.ask("query-named-block-nodes")
        return [
            one["name"]
            for node in nodes
            if node["node-name"] == "disk"
            for one in node.get("dirty-bitmaps", ())
        ]

    def exports(self) -> list[str]:
        return [one["id"] for one in self.ask("query-block-exports")]

    def start(self, command: list[str]) -> None:
        Path(self.socket).unlink(missing_ok=True)
        wrapped = self._with_own_node(command) if self.own_node else command
        with (self.directory / "qemu.log").open("ab") as log:
            self.process = subprocess.Popen(wrapped, stdout=log, stderr=log)
        await_listener(self.socket, self.process)

    def start_daemon(self) -> None:
        """A storage daemon that shows the disk to a guest, which writes over NBD."""
        self.start(
            [
                "qemu-storage-daemon",
                "--chardev",
                f"socket,id=qmp,path={self.socket},server=on,wait=off",
                "--monitor",
                "chardev=qmp",
                "--blockdev",
                json.dumps(self._blockdev()),
                "--nbd-server",
                f"addr.type=unix,addr.path={self.nbd_socket}",
                "--export",
                "type=nbd,id=guest,node-name=disk,name=guest,writable=on",
            ]
        )

    @property
    def top(self) -> str:
        """The node that a machine's device has."""
        return f"filter{len(self.filters)}" if self.filters else "disk"

    def start_machine(self, *flags: str, device: str = "virtio-blk-pci") -> None:
        """A QEMU without a processor at work: its HMP writes, as a guest's disk would."""
        self.start(
            [
                "qemu-system-x86_64",
                *("-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-m", "32"),
                *("-qmp", f"unix:{self.socket},server=on,wait=off"),
                *("-blockdev", json.dumps(self._blockdev())),
                *self._filter_flags(),
                *flags,
                *("-device", f"{device},drive={self.top},id=drive,share-rw=on"),
            ]
        )

    def write(self, pattern: int, offset: int, length: int, node: str = "disk") -> None:
        """Write through a machine's block layer."""
        line = f'qemu-io {node} "write -P {pattern} {offset} {length}"'
        assert self.ask("human-monitor-command", command_line=line) == ""

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def quit(self) -> None:
        """End as after a power-down: bitmaps that are persistent are saved."""
        assert self.process is not None
        self.ask("quit")
        self.process.wait(PATIENCE_SECONDS)

    def _with_own_node(self, command: list[str]) -> list[str]:
        number, own = self.image.stat().st_rdev, self.directory / "dev"
        own.mkdir(exist_ok=True)
        steps = [
            f"mount -t tmpfs tmpfs {own}",
            f"mknod {own}/node b {os.major(number)} {os.minor(number)}",
            f"mount --bind {own}/node {self.image}",
            'exec "$@"',
        ]
        private = ["unshare", "--mount", "--propagation", "slave"]
        return [*private, "sh", "-ec", "; ".join(steps), "sh", *command]

    def _filter_flags(self) -> list[str]:
        words, below = ["-object", "throttle-group,id=limits,x-iops-total=100000"], "disk"
        for i, driver in enumerate(self.filters, 1):
            block = {"driver": driver, "node-name": f"filter{i}", "file": below}
            if driver == "throttle":
                block["throttle-group"] = "limits"
            words += ["-blockdev", json.dumps(block)]
            below = f"filter{i}"
        return words if self.filters else []

    def _blockdev(self) -> dict[str, object]:
        file: dict[str, object] = {"driver": "file", "filename": str(self.image)}
        if self.image.is_block_device():
            file["driver"] = "host_device"
        if self.server:
            file = {"driver": "nbd", "server": self.server}
        file["discard"] = "unmap"
        disk = {"driver": self.driver, "node-name": "disk", "discard": "unmap", "file": file}
        return disk | self.options


@contextmanager
def disk(directory: Path, size_bytes: int, driver: str = "qcow2") -> Iterator[Qemu]:
    """Make an image; whatever is started with it ends with the block."""
    directory.mkdir(parents=True, exist_ok=True)
    image = directory / f"disk.{driver}"
    create(image, size_bytes, driver)
    qemu = Qemu(directory, image, driver)
    try:
        yield qemu
    finally:
        qemu.kill()


@contextmanager
def disk_on(directory: Path, device: str, size_bytes: int, driver: str) -> Iterator[Qemu]:
    """Make an image on a block device, with room for what its format needs."""
    directory.mkdir(parents=True, exist_ok=True)
    if driver != "raw":
        create(Path(device), size_bytes, driver)
    qemu = Qemu(directory, Path(device), driver)
    try:
        yield qemu
    finally:
        qemu.kill()


@contextmanager
def network_disk(directory: Path, size_bytes: int, driver: str, server: str) -> Iterator[Qemu]:
    """Make an image that a QEMU has over NBD only: nbdkit (a Unix socket) or qemu-nbd (TCP)."""
    with disk(directory, size_bytes, driver) as qemu:
        if driver != "raw":  # which cannot grow there
            os.truncate(qemu.image, 2 * size_bytes)
        path, port = str(directory / "storage.nbd"), _free_port()
        commands = {
            "nbdkit": ["nbdkit", "--foreground", "--unix", path, "file", str(qemu.image)],
            "qemu-nbd": [
                *("qemu-nbd", "--bind=127.0.0.1", f"--port={port}", "--persistent", "--shared=0"),
                *("--format=raw", "--discard=unmap", f"--pid-file={path}", str(qemu.image)),
            ],
        }
        qemu.server = {"type": "unix", "path": path}
        if server == "qemu-nbd":
            qemu.server = {"type": "inet", "host": "127.0.0.1", "port": str(port)}
        with subprocess.Popen(commands[server], stdout=subprocess.DEVNULL) as process:
            try:
                await_path(path, process)
                yield qemu
            finally:
                qemu.kill()
                process.terminate()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def create(image: Path, size_bytes: int, driver: str) -> None:
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", driver, str(image), str(size_bytes)], check=True
    )


@contextmanager
def guest_file(qemu: Qemu) -> Iterator[Path]:
    """The guest's view of a storage daemon's disk, as a file (nbdfuse)."""
    assert qemu.process is not None
    await_path(qemu.nbd_socket, qemu.process)
    path = qemu.directory / "guest"
    path.touch()
    log = (qemu.directory / "nbdfuse.log").open("ab")
    uri = f"nbd+unix:///guest?socket={qemu.nbd_socket}"
    with log, subprocess.Popen(["nbdfuse", str(path), uri], stdout=log, stderr=log) as process:
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while path.stat().st_size == 0:
                assert process.poll() is None, (qemu.directory / "nbdfuse.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield path
        finally:
            subprocess.run(["fusermount3", "-u", "-z", str(path)], check=False, capture_output=True)
            process.terminate()
            process.wait(PATIENCE_SECONDS)


@contextmanager
def dead_storage(qemu: Qemu) -> Iterator[Callable[[], None]]:
    """Put the image of a QEMU that has ended on storage that answers nothing until told to.

    Nor does it say what the path leads to: who looks is held, the test too, but not for ever.
    """
    aside = qemu.image.with_name("aside")
    qemu.image.rename(aside)
    qemu.image.touch()
    command = ["nbdfuse", str(qemu.image), "--command", "nbdkit", "-s", "file", str(aside)]
    with subprocess.Popen(command) as process:

        def revive() -> None:
            process.send_signal(signal.SIGCONT)

        limit = threading.Timer(PATIENCE_SECONDS, revive)
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while qemu.image.stat().st_size == 0:
                assert process.poll() is None, "it has ended"
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGSTOP)
            limit.start()
            yield revive
        finally:
            limit.cancel()
            revive()
            subprocess.run(["fusermount3", "-u", "-z", str(qemu.image)], check=True)
            process.wait(PATIENCE_SECONDS)
            aside.replace(qemu.image)


def convert(qemu: Qemu, target: Path) -> None:
    """Write the guest-visible content of an image that nobody writes to, to a raw file."""
    command = ["qemu-img", "convert", "-U", "-f", qemu.driver, "-O", "raw"]
    command += [str(qemu.image), str(target)]
    subprocess.run(command, check=True)


def assert_same(qemu: Qemu, target: str | Path) -> None:
    """The raw target holds what a guest sees in the image, while nobody writes."""
    command = ["qemu-img", "compare", "-U", "-f", qemu.driver, "-F", "raw"]
    done = subprocess.run(
        [*command, str(qemu.image), str(target)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def await_status(qemu: Qemu, wanted: str) -> None:
    """Wait for a run state (QMP `query-status`)."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (status := qemu.ask("query-status")["status"]) != wanted:
        assert time.monotonic() < deadline, status
        time.sleep(0.02)


def await_listener(path: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until somebody listens at a socket: it is there a moment before that."""
    await_path(path, process)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX) as client:
            if client.connect_ex(path) == 0:
                return
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline, f"nobody listens at {path}"
        time.sleep(0.01)


def await_path(path: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not Path(path).exists():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.01)
