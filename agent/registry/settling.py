"""What a person settles of a migration that is not driven any more: who owns its disks.

Owns that it is written down before the fence comes down, and that a target that answers is not
contradicted. One that is driven settles itself, see `agent.source.settling`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from agent.errors import WarmsyncError
from agent.journal import Journal
from agent.migration import Owner, Role
from agent.peer import Peer, session_token
from agent.record import SourceRecord, dump
from agent.registry.ended import Ended
from agent.registry.fence import Opener, lift
from agent.registry.revival import Source
from agent.source.ending import still_fenced
from agent.source.settling import EVENTS, ask_owner, log_settled, owner_known
from agent.state import Machine, State

_log = logging.getLogger(__name__)


class PastSettling:
    """One agent's. `connect` makes the peer of an address, `opener` opens what is fenced.

    `ends` are the migrations of which this agent is the source.
    """

    def __init__(
        self,
        journal: Journal,
        connect: Callable[[str], Peer],
        opener: Opener,
        ends: Mapping[str, Source],
    ) -> None:
        self._journal = journal
        self._ends = ends
        self._connect = connect
        self._opener = opener

    async def settle(self, ended: Ended, owner: Owner) -> bool:
        """End it as the person says. FailedPrecondition OWNER_KNOWN, STILL_FENCED.

        Returns False, and does nothing, if it has been taken up or forgotten meanwhile.
        """
        async with ended.settling:
            if self._ends.get(ended.id) is not ended:
                return False
            await self._settle(ended, owner)
            return True

    async def _settle(self, ended: Ended, owner: Owner) -> None:
        async with ended.at_rest():
            if not ended.state.is_terminal or ended.owner is Owner.NOBODY:
                await self._enter(ended, owner)
            elif ended.owner is not owner:
                raise owner_known(ended.id, f"it is {ended.state}, and the {ended.owner} owns")
            if ended.owner is Owner.SOURCE and ended.record.releasing:
                await self._unfence(ended)

    async def _enter(self, ended: Ended, owner: Owner) -> None:
        record, before = ended.record, ended.state
        machine = Machine.restore(record.history)
        machine.apply(EVENTS[owner], time.time())
        if before is State.CUTTING_OVER and not record.releasing:
            raise owner_known(ended.id, "the source owns, as the target was not asked yet")
        # Each time it is asked by an epoch of its own: an older one is not answered.
        self._keep(ended, record := replace(record, epoch=record.epoch + 1))
        peer = self._connect(record.plan.peer)
        try:
            said = await ask_owner(peer, record.secret, record.epoch)
            if said not in (None, owner):
                raise owner_known(
                    ended.id,
                    f"the target at {peer.address} says that the {said} owns; if that is wrong, "
                    "settle it at the target's agent first",
                )
            settled = replace(
                record,
                history=machine.history,
                error=None,
                stopped=None,
                releasing=owner is Owner.SOURCE,  # until the fence is down
            )
            sent = {"sent_bytes": float(record.progress.sent_bytes)}
            self._keep(ended, settled, sent if before is State.CUTTING_OVER else None)
            log_settled(ended.id, owner, before)
            if said is not None:
                await self._tell(peer, record, owner)
        finally:
            await peer.close()

    def _keep(
        self, ended: Ended, record: SourceRecord, counted: Mapping[str, float] | None = None
    ) -> None:
        self._journal.save(Role.SOURCE, ended.id, dump(record), counted)
        ended.become(record)

    async def _tell(self, peer: Peer, record: SourceRecord, owner: Owner) -> None:
        """Let the target go too; not told, it is settled there."""
        token = session_token(record.secret, record.epoch)
        try:
            if owner is Owner.TARGET:
                await peer.finish(token)
            else:
                await peer.abort(token, "settled at the source", cancelled=True)
        except WarmsyncError as error:
            _log.warning('target not told of the end id=%s reason="%s"', record.plan.id, error)

    def _fenced_since(self, ended: Ended) -> frozenset[str]:
        """Return the sources that another migration has, or may have, handed over since."""
        began = ended.record.history[0].at_seconds
        others = [end.snapshot() for name, end in self._ends.items() if name != ended.id]
        away = [
            one.plan.volumes
            for one in others
            if one.owner is not Owner.SOURCE and one.history[-1].at_seconds > began
        ]
        return frozenset(os.path.realpath(one.source) for some in away for one in some)

    async def _unfence(self, ended: Ended) -> None:
        ended.fence.close()  # its lock would outlive it
        ended.fence.trouble = None
        try:
            await asyncio.to_thread(lift, ended.record, self._opener, self._fenced_since(ended))
        except (WarmsyncError, OSError) as error:
            ended.trouble = failed = still_fenced(ended.id, error)
            raise failed from error
        ended.trouble = None
        record = replace(ended.record, releasing=False)
        if record.error is not None and record.error.reason == "STILL_FENCED":
            record = replace(record, error=None)
        self._keep(ended, record)
