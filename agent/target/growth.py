"""The target's part in a resize: what is on its devices is fitted to them after the proof.

Owns the thread that does it and where its files are. Says of each volume what came of it; whether
the target may still be released is for the session. Never writes unless it was asked to.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from agent import resize
from agent.config import ResizeConfig
from agent.errors import FailedPrecondition
from agent.layout.partitions import ALIGNMENT_BYTES
from agent.layout.superblock import SIZED, Kind
from agent.migration import Plan, Resize, Volume
from agent.resize.means import check_ahead
from native.blockio import BlockDevice

_log = logging.getLogger(__name__)

_KINDS = {"ext4": Kind.EXT, "xfs": Kind.XFS, "btrfs": Kind.BTRFS}


class Growth:
    """Grows the volumes of one session; its files lie in `directory`."""

    def __init__(self, directory: Path, plan: Plan, config: ResizeConfig) -> None:
        self._volumes = plan.volumes
        # In one suffix, which others take the place of.
        self._places = [directory / f"{plan.id}-{i}.x" for i in range(len(plan.volumes))]
        self._limits = resize.Limits(
            program_seconds=config.program_seconds,
            kinds=frozenset(_KINDS[name] for name in config.file_systems),
        )
        self._running: asyncio.Future[tuple[Resize, ...]] | None = None

    def check(self, devices: Sequence[BlockDevice], file_systems: Sequence[str]) -> None:
        """Refuse at the start what this host could not grow in the cutover.

        `file_systems` is what the source says of its volumes (`resize.foresee`), nothing where no
        resize was asked for. FailedPrecondition GROW_NOT_ALLOWED, GROW_UNAVAILABLE.
        """
        for volume, device, said in zip(self._volumes, devices, file_systems, strict=False):
            kind = _kind(said)
            has_room = device.size_bytes() - volume.size_bytes >= ALIGNMENT_BYTES
            if kind is not None and has_room:
                check_ahead(volume.target, kind, self._limits.kinds)

    def start(self, devices: Sequence[BlockDevice]) -> asyncio.Future[tuple[Resize, ...]]:
        """Grow what is on the devices, on a thread of its own that a stopping agent leaves behind.

        FailedPrecondition TABLE_NOT_MOVED, DataLoss GROW_NOT_UNDONE. The thread stays in the call
        to the end: its programs die with it.
        """
        self._running = _on_thread(lambda: self._grow(devices))
        return self._running

    def close(self, devices: Sequence[BlockDevice]) -> None:
        """Close devices once no thread is at it any more; at once, if none is."""
        if self._running is None or self._running.done():
            _close(devices)
        else:
            self._running.add_done_callback(lambda _: _close(devices))

    def undo(self, devices: Sequence[BlockDevice]) -> None:
        """Bring back what an agent that was killed had begun to overwrite. Blocking.

        Before anything else reads or writes the devices. DataLoss GROW_NOT_UNDONE.
        """
        for device, place in zip(devices, self._places, strict=True):
            resize.undo_left_behind(device, place)

    def _grow(self, devices: Sequence[BlockDevice]) -> tuple[Resize, ...]:
        every = zip(self._volumes, devices, self._places, strict=True)
        return tuple(self._fit(*one) for one in every)

    def _fit(self, volume: Volume, device: BlockDevice, place: Path) -> Resize:
        """FailedPrecondition TABLE_NOT_MOVED, DataLoss GROW_NOT_UNDONE."""
        begun, is_moved, data_bytes = time.monotonic(), False, volume.size_bytes
        if volume.cut_bytes:
            source_bytes = data_bytes + volume.cut_bytes
            is_moved = resize.move_table(device, data_bytes, source_bytes, place)
            data_bytes = device.size_bytes()  # what is on it may end before
        elif device.size_bytes() <= data_bytes:
            return Resize()
        done = self._grow_one(device, data_bytes, place)
        return replace(done, seconds=time.monotonic() - begun, table_moved=is_moved)

    def _grow_one(self, device: BlockDevice, data_bytes: int, place: Path) -> Resize:
        try:
            done = resize.grow(device, data_bytes, place, self._limits)
        except FailedPrecondition as error:
            _log.warning(
                'not resized device=%s reason=%s message="%s"', device.path, error.reason, error
            )
            return Resize(error=error)
        _log.info(
            "resized device=%s file_system=%s before_bytes=%s after_bytes=%s seconds=%.3f",
            device.path,
            done.kind,
            done.before_bytes,
            done.after_bytes,
            done.seconds,
        )
        return Resize(str(done.kind), done.before_bytes, done.after_bytes)


def _kind(said: str) -> Kind | None:
    return next((kind for kind in SIZED if kind == said), None)  # else of a newer source


def _close(devices: Sequence[BlockDevice]) -> None:
    for device in devices:
        device.close()


def _on_thread(work: Callable[[], tuple[Resize, ...]]) -> asyncio.Future[tuple[Resize, ...]]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[tuple[Resize, ...]] = loop.create_future()
    # Whoever waited may be gone; the session looks at it again.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def settle(result: tuple[Resize, ...] | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        elif result is not None:
            future.set_result(result)

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:
            failure = error
        with suppress(RuntimeError):  # the loop was closed: the agent ends
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="resize", daemon=True).start()
    return future
