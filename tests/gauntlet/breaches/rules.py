"""How each rule of the design is broken, in an agent that runs.

Every `apply` replaces what keeps a rule by what a careless hand might have written. Where the rule
is kept in C or in the kernel, the effect is made here: what would not have been seen is dropped.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from agent import device as device_module
from agent import disk as disk_module
from agent import sender as sender_module
from agent import target as target_module
from agent.cutover import Cutover
from agent.disk import SourceDisk
from agent.errors import Unavailable, WarmsyncError
from agent.sender import Sender
from agent.target import TargetSession
from agent.writer import Writer
from native.bitmap import DirtyBitmap


@dataclass(frozen=True, slots=True)
class Breach:
    """`rule` is its number in the design, `how` what is done instead."""

    rule: int
    how: str
    apply: Callable[[], None]


def _empty(disk: SourceDisk) -> DirtyBitmap:
    return DirtyBitmap(disk.volume.size_bytes, disk.volume.block_size_bytes)


def _track_late() -> None:
    seed = Sender.send_seed

    async def send_seed(self: Sender, taken: Any) -> Any:
        report = await seed(self, taken)
        for disk in self.disks:
            disk.tracker.take(_empty(disk))
        return report

    _replace(Sender, "send_seed", send_seed)


def _read_then_clear() -> None:
    choose, settle = SourceDisk.choose, SourceDisk.settle
    sent: dict[SourceDisk, DirtyBitmap] = {}

    def choosing(self: SourceDisk, hold_bytes: int = 0) -> DirtyBitmap:
        chosen = choose(self, hold_bytes)
        sent[self] = _empty(self)
        sent[self].merge(chosen)
        return chosen

    def settling(self: SourceDisk) -> None:
        settle(self)
        if self in sent:
            marked = _empty(self)
            self.tracker.take(marked)
            marked.subtract(sent.pop(self))
            self.pending.merge(marked)

    _replace(SourceDisk, "choose", choosing)
    _replace(SourceDisk, "settle", settling)


def _settle_on(is_meant: Callable[[WarmsyncError], bool], *, go_on: bool = False) -> None:
    """What was chosen counts as held by the target, also where sending it ended so."""
    send = Sender._send

    async def sending(self: Sender, parts: Any, taken: Any, size: int, held: int) -> Any:
        try:
            return await send(self, parts, taken, size, held)
        except WarmsyncError as error:
            if not is_meant(error):
                raise
            for disk in self.disks:
                disk.settle()
            if not go_on:
                raise
            self.generation = self._sending
            return replace(sender_module._NOTHING, dirty_bytes=size, generation=self.generation)

    _replace(Sender, "_send", sending)


def _acknowledge_before_flush() -> None:
    async def flush(_: Writer) -> float:
        return 0.0

    _replace(Writer, "flush", flush)


def _leave_page_cache() -> None:
    take = SourceDisk.take

    def taking(self: SourceDisk, *, flush: bool, at_seconds: float) -> Any:
        return take(self, flush=flush and False, at_seconds=at_seconds)

    _replace(SourceDisk, "take", taking)
    _replace(SourceDisk, "flush", lambda _: None)


def _never_look_again() -> None:
    async def look(_: Cutover) -> None:
        return None

    _replace(Cutover, "_look", look)


def _read_through_page_cache() -> None:
    opened = device_module.open_device

    def open_device(path: str, allowed: tuple[str, ...], **how: Any) -> Any:
        device = opened(path, allowed, **how)
        flags = fcntl.fcntl(device.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(device.fileno(), fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return device

    _replace(disk_module, "open_device", open_device)


def _believe() -> None:
    resume = SourceDisk.resume

    def believing(self: SourceDisk, *, believed: bool) -> str:
        geometry = self.volume.size_bytes, self.volume.block_size_bytes
        kept = _empty(self)
        kept.merge(self._store.open_bitmap("pending", *geometry))
        kept.merge(self._store.open_bitmap("taken", *geometry))
        if resume(self, believed=believed):
            self.pending.clear()
            self.pending.merge(kept)
        return ""

    _replace(SourceDisk, "resume", believing)


def _skip_holes() -> None:
    _replace(sender_module, "plan_holes", lambda *_: iter(()))


def _forget_other_volumes() -> None:
    hurry, send = Sender.hurry, Sender.send_dirty
    hurried: set[Sender] = set()

    def hurrying(self: Sender) -> None:
        hurried.add(self)
        hurry(self)

    async def sending(self: Sender, taken: Any, hold_bytes: int = 0) -> Any:
        if self not in hurried:
            return await send(self, taken, hold_bytes)
        hurried.discard(self)
        for disk in self.disks[1:]:
            disk.pending.clear()
        return replace(await send(self, taken), dirty_bytes=taken.dirty_bytes)

    _replace(Sender, "hurry", hurrying)
    _replace(Sender, "send_dirty", sending)


def _share_target() -> None:
    opened = device_module.open_device

    def open_device(path: str, allowed: tuple[str, ...], **how: Any) -> Any:
        return opened(path, allowed, **{**how, "exclusive": False})

    _replace(target_module, "open_device", open_device)


def _leave_fence_down() -> None:
    def fence(self: SourceDisk) -> None:
        self._fenced = True

    _replace(SourceDisk, "fence", fence)


def _take_cut_for_end() -> None:
    _settle_on(lambda error: isinstance(error, Unavailable), go_on=True)
    end = TargetSession.end_stream

    def ending(self: TargetSession, error: WarmsyncError | None, stream: int) -> None:
        if stream == self._stream and self.state.name in ("SEEDING", "SYNCING"):
            self._generation += 1
        end(self, error, stream)

    _replace(TargetSession, "end_stream", ending)


def _replace(owner: Any, name: str, made: object) -> None:
    """Put something else in its place; a name that is gone would break nothing, unnoticed."""
    if not hasattr(owner, name):
        raise AttributeError(f"{owner} has no {name} any more: adapt the breach")
    setattr(owner, name, made)


def _is_source_error(error: WarmsyncError) -> bool:
    return error.reason == "SOURCE_IO_ERROR"


BREACHES = {
    "1": Breach(1, "writes during round 0 are not tracked", _track_late),
    "2": Breach(2, "blocks are read, then their marks are cleared", _read_then_clear),
    "3": Breach(3, "what could not be read counts as sent", lambda: _settle_on(_is_source_error)),
    "4": Breach(4, "generations are acknowledged without a flush", _acknowledge_before_flush),
    "5": Breach(
        5,
        "what was sent counts as held when the target is lost",
        lambda: _settle_on(lambda error: not _is_source_error(error)),
    ),
    "6a": Breach(6, "the page cache is not flushed before the takes", _leave_page_cache),
    "6b": Breach(6, "nobody looks for marks after the last round", _never_look_again),
    "7": Breach(7, "the source is read through the page cache", _read_through_page_cache),
    "8": Breach(8, "marks are believed after a reboot", _believe),
    "9": Breach(9, "holes are not zeroed on the target", _skip_holes),
    "10": Breach(10, "only the first volume has a last round", _forget_other_volumes),
    "11": Breach(11, "targets are opened without an exclusive claim", _share_target),
    "12": Breach(12, "the fence stays down", _leave_fence_down),
    "13": Breach(13, "a stream that is cut counts as a round that has ended", _take_cut_for_end),
}
"""By name: a rule that has two halves has two."""
