"""How each rule of the design is broken, in an agent that runs.

Every one replaces what keeps a rule by what a careless hand might have written. Where the rule
is kept in C or in the kernel, the effect is made here: what would not have been seen is dropped.
Never imported by an agent that is not to be broken; see `preload`.
"""

from __future__ import annotations

import fcntl
import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from agent import device as device_module
from agent import disk as disk_module
from agent import sender as sender_module
from agent.disk import SourceDisk
from agent.errors import Unavailable, WarmsyncError
from agent.sender import Sender
from agent.source import cutover as cutover_module
from agent.source.cutover import Cutover
from agent.target import claim as claim_module
from agent.target.intake import Intake
from agent.writer import Writer
from native.bitmap import DirtyBitmap


def _empty(disk: SourceDisk) -> DirtyBitmap:
    return DirtyBitmap(disk.volume.size_bytes, disk.volume.block_size_bytes)


def track_late() -> None:
    seed = Sender.send_seed

    async def send_seed(self: Sender, taken: Any) -> Any:
        report = await seed(self, taken)
        for disk in self.disks:
            disk.tracker.take(_empty(disk))
        return report

    _replace(Sender, "send_seed", send_seed)


def read_then_clear() -> None:
    choose, settle = SourceDisk.choose, SourceDisk.settle
    sent: dict[SourceDisk, DirtyBitmap] = {}

    def choosing(self: SourceDisk, hold_bytes: int = 0) -> DirtyBitmap:
        chosen = choose(self, hold_bytes)
        sent[self] = _empty(self)
        sent[self].merge(chosen)
        return chosen

    def settling(self: SourceDisk, unread: Any = ()) -> int:
        kept = settle(self, unread)
        if self in sent:
            marked = _empty(self)
            self.tracker.take(marked)
            marked.subtract(sent.pop(self))
            self.pending.merge(marked)
        return kept

    _replace(SourceDisk, "choose", choosing)
    _replace(SourceDisk, "settle", settling)


def _settle_on(is_meant: Callable[[WarmsyncError], bool], *, agree: bool = False) -> None:
    """What was chosen counts as held by the target, also where sending it ended so."""
    send = Sender._send

    async def sending(
        self: Sender, parts: Any, taken: Any, size_bytes: int, held_bytes: int
    ) -> Any:
        try:
            return await send(self, parts, taken, size_bytes, held_bytes)
        except WarmsyncError as error:
            if is_meant(error):
                for disk in self.disks:
                    disk.settle()
                if agree:
                    self.generation = self._sending
            raise

    _replace(Sender, "_send", sending)


def forget_unread() -> None:
    """Rule 3: bad sectors, and a device that fails as a whole."""
    settle = SourceDisk.settle

    def settling(self: SourceDisk, unread: Any = ()) -> int:
        return settle(self, unread and ())

    _replace(SourceDisk, "settle", settling)
    _settle_on(_is_source_error)


def trust_unflushed() -> None:
    """Rule 5."""
    _settle_on(lambda error: not _is_source_error(error))


def acknowledge_before_flush() -> None:
    async def flush(self: Writer) -> float:
        del self
        return 0.0

    _replace(Writer, "flush", flush)


def leave_page_cache() -> None:
    take = SourceDisk.take

    def taking(self: SourceDisk, *, flush: bool, at_seconds: float) -> Any:
        return take(self, flush=flush and False, at_seconds=at_seconds)

    _replace(SourceDisk, "take", taking)
    _replace(SourceDisk, "flush", lambda self: None)


def never_look_again() -> None:
    async def look(self: Cutover) -> None:
        del self

    _replace(Cutover, "_look", look)


def read_through_page_cache() -> None:
    opened = device_module.open_device

    def open_device(path: str, allowed: tuple[str, ...], **how: Any) -> Any:
        device = opened(path, allowed, **how)
        flags = fcntl.fcntl(device.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(device.fileno(), fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return device

    _replace(disk_module, "open_device", open_device)


def believe() -> None:
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


def skip_holes() -> None:
    _replace(sender_module, "plan_holes", lambda volume, holes: iter(()))


def forget_other_volumes() -> None:
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


def share_target() -> None:
    opened = device_module.open_device

    def open_device(path: str, allowed: tuple[str, ...], **how: Any) -> Any:
        return opened(path, allowed, **{**how, "exclusive": False})

    _replace(claim_module, "open_device", open_device)


def leave_fence_down() -> None:
    def fence(self: SourceDisk) -> None:
        self._fenced = True

    _replace(SourceDisk, "fence", fence)


def take_cut_for_end() -> None:
    """Rule 13: both ends hold the round for complete, and count it."""
    _settle_on(lambda error: isinstance(error, Unavailable), agree=True)
    end, cut = Intake.end_stream, Intake.cut_streams

    def count(self: Intake) -> None:
        self._ledger.generation += self.streaming
        self.streaming = False

    def ending(self: Intake, error: WarmsyncError | None, stream: int) -> None:
        if stream == self.stream:
            count(self)
        end(self, error, stream)

    async def cutting(self: Intake) -> None:
        count(self)
        await cut(self)

    _replace(Intake, "end_stream", ending)
    _replace(Intake, "cut_streams", cutting)


def hurry_release(seconds: float) -> None:
    """No rule: a limit that no schedule could wait for."""
    if not hasattr(cutover_module, "RELEASE_SECONDS"):
        raise AttributeError("the release has no limit of that name any more: adapt this")
    cutover_module.RELEASE_SECONDS = seconds


def _replace(owner: Any, name: str, made: Callable[..., object]) -> None:
    """Put something else in its place.

    A name that is gone would break nothing, and other parameters break more than the rule.
    """
    if not hasattr(owner, name):
        raise AttributeError(f"{owner} has no {name} any more: adapt the breach")
    wanted = list(inspect.signature(getattr(owner, name)).parameters)
    taken = inspect.signature(made).parameters
    names = [one.name for one in taken.values() if one.kind is not one.VAR_KEYWORD]
    if names != (wanted if len(names) == len(taken) else wanted[: len(names)]):
        raise TypeError(f"{owner}.{name} takes {wanted} now, not {names}: adapt the breach")
    setattr(owner, name, made)


def _is_source_error(error: WarmsyncError) -> bool:
    return error.reason == "SOURCE_IO_ERROR"
