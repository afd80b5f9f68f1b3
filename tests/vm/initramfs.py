"""What a guest boots: Debian's cloud kernel, and an initramfs of busybox, `init` and `program.c`.

Both are made here from what is on the host; nothing of it is installed, and nobody need be root.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import devices, host

HERE = Path(__file__).parent
APPLETS = ("acpid", "insmod", "killall", "mount", "poweroff", "sh", "sleep", "stty", "umount")
DIRECTORIES = ("bin", "data", "dev", "etc/acpi/PWRF", "log", "proc", "sys", "var/log", "var/run")
# busybox's acpid runs this when the button is pressed; init sees the program end, and goes on.
BUTTON = b"#!/bin/sh\nkillall -TERM program\n"
# Which of the kernel's modules are loaded: always, and for a file system.
MODULES = {"always": ("button", "evdev"), "xfs": ("xfs",)}

FILE, DIRECTORY, LINK = 0o100755, 0o040755, 0o120777


@dataclass(frozen=True, slots=True)
class Boot:
    """What QEMU is given with -kernel and -initrd."""

    kernel: Path
    initramfs: Path


def build(directory: Path) -> Boot:
    """Make an initramfs in a directory. The host must offer "guests"."""
    program = directory / "program"
    flags = ("-static", "-O2", "-Wall", "-Wextra", "-Werror")
    devices.run("cc", *flags, "-o", program, HERE / "program.c")
    archive = directory / "initramfs"
    archive.write_bytes(b"".join(_archive(program)))
    return Boot(next(host.GUEST_KERNEL.glob("boot/vmlinuz-*")), archive)


def _archive(program: Path) -> Iterator[bytes]:
    """Yield a cpio archive (format "newc", as the kernel's buffer-format.rst has it)."""
    for name in _with_parents(DIRECTORIES):
        yield _entry(name, DIRECTORY)
    busybox = shutil.which("busybox")
    assert busybox is not None
    yield _entry("bin/busybox", FILE, Path(busybox).read_bytes())
    for applet in APPLETS:
        yield _entry(f"bin/{applet}", LINK, b"busybox")
    yield _entry("bin/program", FILE, program.read_bytes())
    yield _entry("init", FILE, (HERE / "init").read_bytes())
    yield _entry("etc/acpi/PWRF/00000080", FILE, BUTTON)
    for use, names in MODULES.items():
        for name in _with_parents([f"modules/{use}"]):
            yield _entry(name, DIRECTORY)
        for number, file in enumerate(_modules(names)):
            yield _entry(f"modules/{use}/{number}-{file.name}", FILE, file.read_bytes())
    yield _entry("TRAILER!!!", 0)


def _with_parents(names: tuple[str, ...] | list[str]) -> list[str]:
    parents = {str(parent) for name in names for parent in Path(name).parents} - {"."}
    return sorted({*names, *parents})


def _entry(name: str, mode: int, data: bytes = b"") -> bytes:
    # inode, mode, uid, gid, links, time, size, 4 x device, length of the name, checksum
    numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % number for number in numbers)
    return _padded(head + name.encode() + b"\0") + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _modules(names: tuple[str, ...]) -> list[Path]:
    """Return the files of modules, each after those that it needs."""
    found: list[Path] = []
    for name in names:
        (file,) = host.GUEST_KERNEL.glob(f"lib/modules/*/kernel/**/{name}.ko")
        needs = re.search(rb"\0depends=([^\0]*)\0", file.read_bytes())
        assert needs is not None, file
        below = _modules(tuple(word for word in needs[1].decode().split(",") if word))
        found += [path for path in [*below, file] if path not in found]
    return found
