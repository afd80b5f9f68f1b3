"""Chooses a tracker by its scheme, and says why."""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Sequence
from pathlib import Path

from agent.errors import FailedPrecondition
from agent.migration import Scheme
from agent.store import Store
from agent.tracker import Tracker
from agent.tracker.scan import ScanTracker
from native.bitmap import fit_block_size
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from native.chunk import CHUNK_BYTES

_QCOW2 = b"QFI\xfb"
"""What an image begins with (docs/interop/qcow2.rst of QEMU)."""
_START_BYTES = 4096


def settle_scheme(scheme: Scheme, sources: Sequence[str]) -> tuple[Scheme, str]:
    """Return the scheme to open the sources for, and why if it is not the one asked for.

    `auto` is qemu where a source is named SOCKET/NODE: nothing else lies in a socket.
    """
    for source in sources if scheme is Scheme.AUTO else ():
        socket = os.path.dirname(source)
        if _is_socket(socket):
            return Scheme.QEMU, f"{source} names a disk of the QEMU at {socket}"
    return scheme, ""


def choose_scheme(scheme: Scheme, devices: list[BlockDevice]) -> tuple[Scheme, str]:
    """Return the scheme to use for all devices of a migration, and why if it was `auto`.

    `auto` is ebpf if every device is a block device and this host can load the programs. The
    reason says also where the bytes of an image are moved, and not what its guest sees.
    """
    if scheme is Scheme.AUTO:
        chosen, reason = _choose(devices)
        return chosen, reason + _remark(devices)
    if scheme is Scheme.EBPF:
        obstacle = ebpf_obstacle()
        if obstacle:
            raise FailedPrecondition(
                "TRACKER_UNAVAILABLE",
                f"tracker ebpf cannot be used here: {obstacle}; "
                "run `warmsync doctor` for the mend, or use --tracker scan",
                tracker=scheme,
            )
    return scheme, ""


def _choose(devices: list[BlockDevice]) -> tuple[Scheme, str]:
    files = [device.path for device in devices if not device.is_block_device]
    if files:
        return Scheme.SCAN, f"{files[0]} is a file, whose writes the block layer does not show"
    obstacle = ebpf_obstacle()
    if obstacle:
        return Scheme.SCAN, f"ebpf cannot be used here: {obstacle}"
    return Scheme.EBPF, "block devices, and this kernel can run the eBPF programs"


def _remark(devices: list[BlockDevice]) -> str:
    images = [device.path for device in devices if _is_qcow2(device)]
    if not images:
        return ""
    return f"; {images[0]} is moved as the qcow2 image that it is: --tracker qemu moves its content"


def _is_qcow2(device: BlockDevice) -> bool:
    start = AlignedBuffer(_START_BYTES)
    try:
        device.read(0, start)
    except OSError:  # shorter; or it cannot be read, which the rounds will tell
        return False
    return bytes(memoryview(start)[: len(_QCOW2)]) == _QCOW2


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False


def ebpf_obstacle() -> str:
    """Return why the ebpf tracker cannot work on this host; empty if it can."""
    global _ebpf_works  # noqa: PLW0603
    if not _ebpf_works:
        obstacle = _try_ebpf()
        _ebpf_works = not obstacle
        return obstacle
    return ""


_ebpf_works = False
"""Asking loads the programs, which takes 50 ms of a start. What has worked once works as long as
the kernel runs; an attach that fails all the same says so."""


def _try_ebpf() -> str:
    if os.geteuid() != 0:
        return "the agent does not run as root"
    try:
        from native.ebpf import check
    except ImportError as error:
        return f"this build has no eBPF support ({error})"
    return check() or ""


def fit_block(scheme: Scheme, size_bytes: int, block_size_bytes: int) -> int:
    """Return the block size to track with: scan marks whole chunks, bitmaps are bounded."""
    least = max(block_size_bytes, CHUNK_BYTES) if scheme is Scheme.SCAN else block_size_bytes
    return fit_block_size(size_bytes, least)


def make_tracker(
    scheme: Scheme,
    device: BlockDevice,
    block_size_bytes: int,
    pin_dir: Path,
    store: Store,
    *,
    size_bytes: int,
) -> Tracker:
    """Return a tracker of a device's first `size_bytes`, not yet started."""
    if scheme is Scheme.SCAN:
        return ScanTracker(device, store, size_bytes)
    if scheme is Scheme.QEMU:
        from agent.qemu.device import QemuDevice
        from agent.tracker.qemu import QemuTracker

        if not isinstance(device, QemuDevice):
            raise TypeError(f"{device.path} was not opened as a disk of a QEMU")
        return QemuTracker(device, block_size_bytes)
    from agent.tracker.ebpf import EbpfTracker

    return EbpfTracker(device, block_size_bytes, pin_dir, size_bytes)


def remove_stale(directory: Path, wanted: Container[str] = ()) -> list[str]:
    """Remove pins that nobody will take up again (not `wanted`); return their names.

    With the last pin of a program gone, the kernel detaches it.
    """
    if not directory.is_dir():
        return []
    found = sorted(path for path in directory.iterdir() if path.is_dir())
    stale = [path for path in found if path.name not in wanted]
    if stale:
        from native.ebpf import remove

        for pin_dir in stale:
            remove(str(pin_dir))
    return [path.name for path in stale]
