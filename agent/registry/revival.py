"""What an agent before this one wrote down, found again at a start.

Owns the order: fences go up before anything else, then all goes on that can, and nothing that is
wrong with one migration keeps another from it. What it finds it puts among the agent's ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import TypeAlias

from agent.errors import WarmsyncError
from agent.journal import NOT_KEPT, Journal
from agent.migration import Plan, Role, Scheme
from agent.peer import Peer
from agent.record import SourceRecord, TargetRecord, load_source, load_target
from agent.registry.ended import Ended, give_up, tell_end, write_down
from agent.registry.fence import Fence, is_due, is_wanted, lift
from agent.registry.preparation import Preparation, Reopened
from agent.registry.reception import Reception
from agent.registry.reservations import Reservations
from agent.registry.waiting import Waiting, may_wait
from agent.sender import Workshop
from agent.source import SourceMigration
from agent.source.ending import still_fenced
from agent.state import TERMINAL
from agent.target import TargetSession

_log = logging.getLogger(__name__)

FIRST_TRY_SECONDS = 5.0
"""How long an agent that starts waits for the first try to take up what needs a QEMU."""
_TAKERS = 8
"""Migrations that are taken up at once: a QEMU that does not answer holds one of these threads."""

Source: TypeAlias = SourceMigration | Ended


class Revival:
    """One agent's, in this order: `put_up_fences`, `find`, `start`."""

    def __init__(
        self,
        preparation: Preparation,
        reception: Reception,
        reservations: Reservations,
        *,
        workshop: Workshop,
        journal: Journal,
        connect: Callable[[str], Peer],
        sources: dict[str, Source],
        targets: dict[str, TargetSession],
    ) -> None:
        self._preparation = preparation
        self._reception = reception
        self._reservations = reservations
        self._workshop = workshop
        self._journal = journal
        self._connect = connect
        self._sources = sources
        self._targets = targets
        self._written: dict[str, SourceRecord] = {}
        self._received: list[TargetRecord] = []
        self._fences: dict[str, Fence] = {}
        self._telling: dict[str, asyncio.Task[None]] = {}
        self._threads = ThreadPoolExecutor(_TAKERS, thread_name_prefix="take-up")

    def put_up_fences(self) -> None:
        """Read what was written down, and fence what has to be."""
        for role, name, values in self._journal.load():
            try:
                if role is Role.TARGET:
                    self._received.append(load_target(values))
                else:
                    self._written[name] = load_source(values)
            except ValueError as error:
                _log.error('record not understood id=%s role=%s reason="%s"', name, role, error)
        for name, record in self._written.items():
            needed = not self._is_outlived(record)
            fence = Fence(record, self._preparation.open_fence, needed=needed)
            self._fences[name] = fence
            fence.put_up()

    def _is_outlived(self, record: SourceRecord) -> bool:
        """Return whether a disk is migrated once more since this has ended: that one says more."""
        if record.history[-1].state not in TERMINAL:
            return False
        later = [
            one.plan
            for one in self._written.values()
            if one.history[0].at_seconds > record.history[-1].at_seconds
        ]
        return bool(_sources_of([record.plan]) & _sources_of(later))

    def find(self) -> None:
        """Take up what can be at once; a QEMU is not asked before the `start`."""
        for target in self._received:
            self._restore_target(target)
        for name, record in self._written.items():
            self._restore_source(record, self._fences[name])

    def tracked(self) -> set[str]:
        """Return the volumes, as `<migration>-<index>`, that are sources of what goes on."""
        ends = self._sources.values()
        going_on = [one.snapshot().plan for one in ends if not one.state.is_terminal]
        return {f"{plan.id}-{i}" for plan in going_on for i in range(len(plan.volumes))}

    def fenced(self) -> set[str]:
        """Return those of what has ended whose fences are still to go up, or to be lifted."""
        ended = [one.record for one in self._sources.values() if isinstance(one, Ended)]
        plans = [record.plan for record in ended if is_wanted(record)]
        return {f"{plan.id}-{i}" for plan in plans for i in range(len(plan.volumes))}

    def received(self) -> set[str]:
        """Return those that are targets of it."""
        going_on = [one.snapshot().plan for one in self._targets.values() if not one.is_over]
        return {f"{plan.id}-{i}" for plan in going_on for i in range(len(plan.volumes))}

    def _restore_target(self, record: TargetRecord) -> None:
        name = record.plan.id
        try:
            self._targets[name] = self._reception.restore(record)
        except (WarmsyncError, OSError) as error:  # it is in the journal still: the next start
            _log.error('session not found again id=%s reason="%s"', name, error)
            return
        if record.history[-1].state not in TERMINAL:
            paths = [volume.target for volume in record.plan.volumes]
            self._reservations.restore(Role.TARGET, name, paths)

    def _restore_source(self, record: SourceRecord, fence: Fence) -> None:
        name = record.plan.id
        if record.history[-1].state in TERMINAL:
            self._sources[name] = self._restore_ended(record, fence)
            return
        reason: Exception | None = fence.trouble
        if reason is None and record.scheme is not Scheme.QEMU:  # which may take long to ask
            try:
                self._go_on(record, self._preparation.reopen(record))
                fence.close()
                return
            except (WarmsyncError, OSError) as error:
                if not may_wait(record, error):
                    _log.error('migration cannot go on id=%s reason="%s"', name, error)
                    self._sources[name] = Ended(give_up(record, error), fence)
                    return
                reason = error
        self._take_devices(record)
        self._sources[name] = Waiting(
            record,
            fence,
            self._threads,
            reopen=self._preparation.reopen,
            give_back=self._preparation.give_back,
            adopt=self._adopt,
            conclude=self._conclude,
            reason=reason,
        )

    def _restore_ended(self, record: SourceRecord, fence: Fence) -> Ended:
        """An agent that was killed as it ended a migration may have left its fence up."""
        if not (record.owed and record.releasing):
            return Ended(record, fence)
        try:
            lift(record, self._preparation.open_fence, self._fenced_since(record))
        except (WarmsyncError, OSError) as error:
            _log.error('source still fenced id=%s reason="%s"', record.plan.id, error)
            return Ended(record, fence, still_fenced(record.plan.id, error))
        return Ended(replace(record, releasing=False), fence)

    def _fenced_since(self, record: SourceRecord) -> frozenset[str]:
        """Return the sources whose targets own, or may own, since this migration began."""
        handed_over = [
            one.plan
            for one in self._written.values()
            if (is_due(one) or one.history[-1].state.is_handed_over)
            and one.history[-1].at_seconds > record.history[0].at_seconds
        ]
        return _sources_of(handed_over)

    def _go_on(self, record: SourceRecord, reopened: Reopened) -> SourceMigration:
        prepared = self._preparation.take_up(record, reopened)
        migration = SourceMigration(prepared, self._workshop, self._journal)
        self._sources[record.plan.id] = migration
        self._take_devices(record)
        _log.info("migration found again id=%s state=%s", migration.id, migration.state)
        return migration

    def _take_devices(self, record: SourceRecord) -> None:
        paths = [volume.source for volume in record.plan.volumes]
        self._reservations.restore(Role.SOURCE, record.plan.id, paths)

    def _adopt(self, waiting: Waiting, reopened: Reopened) -> None:
        self._go_on(waiting.record, reopened).start()
        waiting.fence.close()  # the migration has its own now
        waiting.bell.ring()

    def _conclude(self, ended: Ended, record: SourceRecord) -> None:
        write_down(record, self._journal, before=ended.record)
        ended.become(record)
        _log.info("migration id=%s state=%s", ended.id, ended.state)
        self._tell(ended)

    def _tell(self, ended: Ended) -> None:
        telling = tell_end(ended, self._journal, self._connect)
        ended.telling = asyncio.create_task(telling, name=f"tell {ended.id}")
        self._telling[ended.id] = ended.telling

    def start(self) -> None:
        """Let go on what was found again; tell of what has ended."""
        for source in self._sources.values():
            source.start()
            if not isinstance(source, Ended) or not source.state.is_terminal:
                continue
            before = self._written[source.id]
            if source.record != before:
                try:
                    write_down(source.record, self._journal, before=before)
                except NOT_KEPT as error:
                    _log.error('not written down id=%s reason="%s"', source.id, error)
            if source.record.owed:
                self._tell(source)

    async def first_tries(self) -> None:
        """Wait until each that waits was tried once, FIRST_TRY_SECONDS at most."""
        waiting = [one for one in self._sources.values() if isinstance(one, Waiting)]
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST_TRY_SECONDS):
                for one in waiting:
                    await one.was_tried.wait()

    def forget(self, name: str) -> None:
        """It is not remembered any more; see `Ended.is_held`."""
        self._telling.pop(name, None)

    def close(self) -> None:
        """Tell nobody any more; a try under way ends by itself."""
        for telling in self._telling.values():
            telling.cancel()
        self._threads.shutdown(wait=False)


def _sources_of(plans: Iterable[Plan]) -> frozenset[str]:
    return frozenset(os.path.realpath(one.source) for plan in plans for one in plan.volumes)
