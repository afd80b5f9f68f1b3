"""The claim on a session's target devices, all or none.

Owns the checks before the first byte: allowed, large enough, not its own source, nobody else's.
Blocking throughout. Never writes, but to undo a resize that the end of an agent cut off.
"""

from __future__ import annotations

import time

from agent.device import identities, open_device
from agent.errors import FailedPrecondition, InvalidArgument
from agent.migration import Owner, Volume
from agent.nameplate import nameplate
from agent.peer import SessionRequest
from agent.target.growth import Growth
from native.blockio import BlockDevice

_UNDO_SECONDS = 10.0
_CLAIM_RETRY_SECONDS = 0.1


def open_targets(
    request: SessionRequest, allowed: tuple[str, ...], own_boot_id: str
) -> list[BlockDevice]:
    """Check and claim the target devices of a session, all or none. The domain's errors.

    Blocking. A source with this host's boot id shares the devices with it.
    """
    if request.boot_id == own_boot_id:
        for volume in request.volumes:
            _check_distinct(volume, request)
    return open_devices(request.volumes, allowed)


def open_devices(volumes: tuple[Volume, ...], allowed: tuple[str, ...]) -> list[BlockDevice]:
    """Claim the target devices of a session, all or none. The domain's errors; blocking."""
    devices: list[BlockDevice] = []
    try:
        for volume in volumes:
            device = open_device(volume.target, allowed, writable=True, exclusive=True)
            devices.append(device)
            if device.size_bytes() < volume.size_bytes:
                raise too_small(volume, device.size_bytes())
    except BaseException:
        for device in devices:
            device.close()
        raise
    return devices


def claim(
    volumes: tuple[Volume, ...],
    allowed: tuple[str, ...],
    undoing: Growth | None,
    nameplates: tuple[str, ...] = (),
    *,
    patience_seconds: float = 0.0,
) -> list[BlockDevice]:
    """Claim devices as `open_devices`, and first undo a resize that the end of an agent cut off.

    `patience_seconds`: how long one that is in use is tried again.
    FailedPrecondition TARGET_NOT_CLAIMED if one had another of `nameplates` when it was known.
    """
    deadline = time.monotonic() + (_UNDO_SECONDS if undoing else patience_seconds)
    while True:
        try:
            devices = open_devices(volumes, allowed)
            break
        except FailedPrecondition as error:
            # The programs of an agent that was killed hold the claim for as long as they die.
            if error.reason != "DEVICE_IN_USE" or time.monotonic() >= deadline:
                raise
            time.sleep(_CLAIM_RETRY_SECONDS)
    try:
        for volume, device, known in zip(volumes, devices, nameplates, strict=False):
            _check_same(volume, device, known)
        if undoing is not None:
            undoing.undo(devices)
    except BaseException:
        for device in devices:
            device.close()
        raise
    return devices


def _check_same(volume: Volume, device: BlockDevice, known: str) -> None:
    """Whatever stands on another disk, nobody has asked for it to be overwritten."""
    found = nameplate(device)
    if known and found != known:
        raise FailedPrecondition(
            "TARGET_NOT_CLAIMED",
            f"{volume.target} is another disk than the one that was being written ({known}, now "
            f"{found or 'unknown'}); give that its name again and resume, or cancel and start a "
            "new migration",
            target=volume.target,
            expected=known,
            found=found,
            owner=Owner.SOURCE,  # what is claimed again was not released
        )


def _check_distinct(volume: Volume, request: SessionRequest) -> None:
    try:
        own = identities(volume.target)
    except OSError:
        return  # opening it says what is wrong with it
    for source, known in zip(request.volumes, request.source_identities, strict=True):
        if any(one.overlaps(other) for one in own for other in known):
            raise _same_device(volume, source)


def _same_device(volume: Volume, source: Volume) -> InvalidArgument:
    return InvalidArgument(
        "SAME_DEVICE",
        f"target {volume.target} shares its bytes with source {source.source}; "
        "name a device that no source lies on",
        source=source.source,
        target=volume.target,
    )


def too_small(volume: Volume, size_bytes: int) -> FailedPrecondition:
    """Return the error of a target with fewer bytes than its source."""
    return FailedPrecondition(
        "TARGET_TOO_SMALL",
        f"target {volume.target} has {size_bytes} bytes, source {volume.source} has "
        f"{volume.size_bytes}; name one at least as large, or use --resize if nothing is behind "
        "that",
        target=volume.target,
        size_bytes=size_bytes,
        needed_bytes=volume.size_bytes,
    )
