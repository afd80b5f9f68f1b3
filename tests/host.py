"""What the machine that runs the tests offers; each lack has a reason to skip with."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

SCRATCH = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
"""Where big scratch files go: memory, if there is any."""
GUEST_KERNEL = Path(__file__).parents[1] / "build" / "guest-kernel"
"""Where `make setup` unpacks the kernel of guests."""
BLKIO = Path("/sys/fs/cgroup/blkio")
"""The v1 hierarchy that throttles disks."""


def _root() -> str | None:
    return None if os.geteuid() == 0 else "not root"


def _loop() -> str | None:
    if _root():
        return _root()
    if not Path("/dev/loop-control").exists():
        return "no /dev/loop-control"
    return _tool("losetup")


def _partitions() -> str | None:
    return _loop() or _tool("partx")


def _zram() -> str | None:
    if _root():
        return _root()
    return None if Path("/sys/class/zram-control").is_dir() else "no zram module"


def _bpf() -> str | None:
    if _root():
        return _root()
    return None if Path("/sys/kernel/btf/vmlinux").exists() else "kernel without BTF"


def _nbdkit() -> str | None:
    if _loop():
        return _loop()
    if not Path("/dev/fuse").exists():
        return "no /dev/fuse"
    return _tool("nbdkit") or _tool("nbdfuse") or _tool("fusermount3")


def _qemu() -> str | None:
    if not Path("/dev/fuse").exists():
        return "no /dev/fuse"
    tools = ("qemu-storage-daemon", "qemu-img", "nbdfuse", "fusermount3")
    return next((lack for lack in map(_tool, tools) if lack), None)


def _machine() -> str | None:
    return _tool("qemu-system-x86_64")


def _fio() -> str | None:
    return _tool("fio")


def _blkio() -> str | None:
    if _root():
        return _root()
    if (BLKIO / "blkio.throttle.write_bps_device").exists():
        return None
    return f"no v1 blkio hierarchy mounted at {BLKIO}"


def _guests() -> str | None:
    for tool in ("qemu-system-x86_64", "busybox", "cc", "sfdisk", "mkfs.ext4", "mkfs.xfs"):
        if _tool(tool):
            return _tool(tool)
    if b"/ld-linux" in Path(shutil.which("busybox") or "").read_bytes():
        return "busybox is not static (package busybox-static)"
    if not list(GUEST_KERNEL.glob("boot/vmlinuz-*")):
        return f"no kernel in {GUEST_KERNEL} (packaging/unpack-kernel)"
    return _loop()


def _direct() -> str | None:
    with tempfile.NamedTemporaryFile(dir=SCRATCH, prefix="warmsync-test-") as file:
        try:
            os.close(os.open(file.name, os.O_RDWR | os.O_DIRECT))
        except OSError as error:
            return f"no O_DIRECT on {SCRATCH}: {error.strerror}"
    return None


def _fuse() -> str | None:
    if _loop():
        return _loop()
    return None if Path("/dev/fuse").exists() else "no /dev/fuse"


def _file_system(kind: str, *tools: str) -> str | None:
    if _fuse():
        return _fuse()
    missing = [reason for reason in map(_tool, tools) if reason]
    if missing:
        return missing[0]
    known = Path("/proc/filesystems").read_text().split()
    return None if kind in known else f"the kernel has no {kind}"


def _ext4() -> str | None:
    return _file_system("ext4", "mkfs.ext4", "e2fsck", "resize2fs")


def _xfs() -> str | None:
    return _file_system("xfs", "mkfs.xfs", "xfs_repair", "xfs_growfs")


def _btrfs() -> str | None:
    return _file_system("btrfs", "mkfs.btrfs", "btrfs")


def _tool(name: str) -> str | None:
    return None if shutil.which(name) else f"no {name} installed"


_CHECKS = {
    "root": _root,
    "loop": _loop,
    "partitions": _partitions,
    "zram": _zram,
    "bpf": _bpf,
    "nbdkit": _nbdkit,
    "fio": _fio,
    "qemu": _qemu,
    "qemu-system": _machine,
    "blkio": _blkio,
    "fuse": _fuse,
    "ext4": _ext4,
    "xfs": _xfs,
    "btrfs": _btrfs,
    "guests": _guests,
    f"O_DIRECT on {SCRATCH}": _direct,
}


@cache
def lacks(capability: str) -> str | None:
    """Return why this host has no `capability` (a key of `report`), or None if it has."""
    return _CHECKS[capability]()


def report() -> str:
    """Return one line for the head of the test run."""
    words = [
        f"{name} {'yes' if lacks(name) is None else f'NO ({lacks(name)})'}" for name in _CHECKS
    ]
    return "host offers: " + ", ".join(words)
