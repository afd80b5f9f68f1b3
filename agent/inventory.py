"""The block devices of this host that the configuration allows.

Reads sysfs and opens nothing: listing must not spin up, claim or disturb a device.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from agent.config import is_allowed
from agent.device import known_users

_SECTOR_BYTES = 512
"""sysfs counts in these whatever the device's own sectors are (sysfs-block, `size`)."""


@dataclass(frozen=True, slots=True)
class BlockDeviceInfo:
    """A block device; `in_use_by` is empty if nothing is known to use it."""

    path: str
    size_bytes: int
    logical_block_size_bytes: int
    read_only: bool
    in_use_by: str


def list_devices(
    allowed: tuple[str, ...], sys_block: Path = Path("/sys/class/block")
) -> list[BlockDeviceInfo]:
    """Return the allowed devices that have a size, by path. A device that goes away is left out."""
    found = []
    aliases = _aliases()
    for entry in sorted(sys_block.iterdir()):
        real = f"/dev/{entry.name.replace('!', '/')}"  # sysfs writes ! for / (cciss!c0d0)
        names = [real, *aliases.get(real, [])]
        path = next((name for name in names if is_allowed(name, real, allowed)), None)
        if path is None:
            continue
        try:
            info = _describe(entry, path)
        except OSError:
            continue  # unplugged while we looked
        if info.size_bytes:
            found.append(info)
    return found


def _aliases() -> dict[str, list[str]]:
    """Return the links under /dev by what they lead to: patterns often name /dev/VG/LV."""
    found: dict[str, list[str]] = {}
    for place, directories, files in os.walk("/dev"):
        for name in sorted([*directories, *files]):
            path = os.path.join(place, name)
            if os.path.islink(path):
                found.setdefault(os.path.realpath(path), []).append(path)
    return found


def _describe(entry: Path, path: str) -> BlockDeviceInfo:
    # A partition has no queue of its own.
    disk = entry.resolve().parent if (entry / "partition").exists() else entry
    return BlockDeviceInfo(
        path=path,
        size_bytes=int((entry / "size").read_text()) * _SECTOR_BYTES,
        logical_block_size_bytes=int((disk / "queue/logical_block_size").read_text()),
        read_only=(entry / "ro").read_text().strip() == "1",
        in_use_by=", ".join(known_users(path)),
    )
