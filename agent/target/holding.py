"""The devices that one session holds: what is written to them, and what was read back of them.

Owns the open devices from the claim to the release. Of another device in their place nothing is
known. Decides nothing about streams or states.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

from agent.device import boot_id, device_key, io_error
from agent.errors import FailedPrecondition, WarmsyncError
from agent.migration import Depth, Owner, Resize, Volume
from agent.nameplate import nameplate
from agent.peer import Proof
from agent.reader import read_digests
from agent.sender import Workshop
from agent.target.claim import claim, too_small
from agent.target.growth import Growth
from agent.target.ledger import Ledger
from agent.target.witness import Witness
from agent.writer import Writer
from native.blockio import BlockDevice

_log = logging.getLogger(__name__)

_CLAIM_SECONDS = 3.0
"""What an earlier connection had begun to read, such as a comparison, may still hold a device."""


class Holding:
    """One session's. `changing` is held while devices are claimed anew, or grown."""

    def __init__(
        self,
        ledger: Ledger,
        devices: list[BlockDevice],
        workshop: Workshop,
        allow_devices: tuple[str, ...],
        *,
        witness: Witness,
        growth: Growth,
    ) -> None:
        self._ledger = ledger
        self._allow_devices = allow_devices
        self._threads = workshop.threads
        self._pool = workshop.pool
        self.devices = devices
        self.witness = witness
        self.growth = growth
        self.sizes = [volume.size_bytes for volume in ledger.plan.volumes]
        self.changing = asyncio.Lock()
        self._is_given_back = False
        self._attach()

    def _attach(self) -> None:
        """Write to the devices that are open now. What is known of others says nothing of them."""
        if self.devices:
            self._recognise()
        self.proof: tuple[Proof, ...] | None = None
        """What was read back after the last generation; None if that is not known."""
        self.grown: asyncio.Future[tuple[Resize, ...]] | None = None
        """What their resize comes to, if it was asked for."""
        self.witness.attach(self.devices)
        self.writer = Writer(
            self.devices, self.sizes, self._threads, self._pool, self.witness.written
        )

    def _recognise(self) -> None:
        """Believe what was acknowledged only of devices that are known to be those before.

        Numbers tell on one boot, nameplates on another; other nameplates were refused at the claim.
        """
        ledger = self._ledger
        keys = tuple(device_key(device) for device in self.devices)
        nameplates = tuple(nameplate(device) for device in self.devices)
        if ledger.boot_id == boot_id():
            is_known = keys == ledger.keys
        else:
            is_known = all(nameplates) and nameplates == ledger.nameplates
        if ledger.keys and not is_known:
            _log.warning("not known to be the devices of before id=%s", ledger.id)
            self.witness.forget()
            ledger.generation = 0
        ledger.boot_id, ledger.keys, ledger.nameplates = boot_id(), keys, nameplates

    async def claim_again(self) -> None:
        """Open the devices anew: what was mended, or put in place again, is another device.

        Nothing may be under way on those that are open.
        """
        ledger = self._ledger
        for device in self.devices:
            device.close()
        self.devices = []
        undoing = self.growth if ledger.resizing else None
        try:
            devices = await asyncio.to_thread(
                claim,
                ledger.plan.volumes,
                self._allow_devices,
                undoing,
                ledger.nameplates,
                patience_seconds=_CLAIM_SECONDS,
            )
        except WarmsyncError as error:
            if error.reason == "TARGET_NOT_CLAIMED":
                raise
            raise FailedPrecondition(
                "TARGET_NOT_CLAIMED",
                f"the target's devices cannot be claimed again: {error}; then resume",
                **error.values,
                owner=Owner.SOURCE,  # what is claimed again was not released
            ) from error
        if self._is_given_back:  # the session ended meanwhile
            for device in devices:
                device.close()
            raise ledger.shut()
        self.devices = devices
        self._attach()
        if ledger.resizing:
            # The source compares; told again if the answer does not reach it.
            _log.warning("resized and not released, so to be compared id=%s", ledger.id)
            ledger.generation = 0
            self.witness.forget()
            ledger.note(resizes=())
            ledger.resizing = False
        # Before anything is read of them: entries of these are worth nothing for others.
        ledger.write_down()

    def check_sizes(self) -> None:
        """Raise FailedPrecondition if a device is smaller than what it receives."""
        for device, volume in zip(self.devices, self._ledger.plan.volumes, strict=True):
            if device.size_bytes() < volume.size_bytes:
                raise too_small(volume, device.size_bytes())

    def note_durable(self) -> None:
        """All that was written is durable; it is to be read back."""
        self.proof = None
        self.witness.note_durable()

    async def digests(self, volume: int) -> AsyncGenerator[tuple[int, bytes], None]:
        """Iterate (offset, chunk digests) over a volume, read from the device itself."""
        spec = self._ledger.plan.volumes[volume]
        try:
            device = await asyncio.get_running_loop().run_in_executor(
                self._threads, BlockDevice, spec.target
            )
        except OSError as error:
            raise io_error("target", error) from error
        is_own = bool(self.devices) and device_key(device) == self._ledger.keys[volume]
        steps = (
            self.witness.digests(volume, device)
            if is_own and self._ledger.plan.verify is not Depth.NONE
            else read_digests(device, spec.size_bytes, self._pool, self._threads)
        )
        try:
            if self.devices and not is_own:
                raise _replaced(spec)
            async for step in steps:
                yield step
        except OSError as error:
            raise io_error("target", error) from error
        finally:
            await steps.aclose()
            device.close()

    def give_back(self, *, keep: bool = False) -> None:
        """Close the devices; `keep` what was read back, for the next start."""
        self._is_given_back = True
        devices, self.devices = self.devices, []  # no stream may begin any more
        self.growth.close(devices)
        if not keep:
            self.witness.close()
            self.writer = Writer([], [], self._threads, self._pool)


def _replaced(volume: Volume) -> FailedPrecondition:
    return FailedPrecondition(
        "TARGET_NOT_CLAIMED",
        f"{volume.target} is another device than the one that is being written; give that its name "
        "again, then resume",
        target=volume.target,
    )
