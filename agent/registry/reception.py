"""How the sessions of a target begin: opened for a source that asks, or found again at a start.

Owns that devices are claimed, and what is read back of them has its place, before a session is
there. What fails leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from agent.config import AgentConfig
from agent.device import boot_id, identities
from agent.errors import WarmsyncError
from agent.hook import Hook, HookRun
from agent.journal import Journal
from agent.migration import Depth, Identity, Plan
from agent.peer import SessionRequest
from agent.record import TargetRecord
from agent.registry.places import Places
from agent.sender import Workshop
from agent.signer import Signer
from agent.state import State
from agent.store import Store
from agent.target import TargetSession, new_session
from agent.target.claim import claim, open_targets
from agent.target.growth import Growth
from agent.target.witness import Witness
from native.blockio import BlockDevice

_log = logging.getLogger(__name__)


class Reception:
    """One agent's."""

    def __init__(
        self,
        config: AgentConfig,
        places: Places,
        workshop: Workshop,
        journal: Journal,
        signer: Signer,
    ) -> None:
        self._config = config
        self._places = places
        self._workshop = workshop
        self._journal = journal
        self._signer = signer

    async def open(
        self, request: SessionRequest, take: Callable[[list[Identity]], None]
    ) -> TargetSession:
        """Check and claim the devices of a new session. `take` reserves them, or raises."""
        devices = await asyncio.to_thread(
            open_targets, request, self._config.allow_devices, boot_id()
        )
        record = new_session(request)
        witness = self._make_witness(record.plan)
        try:
            growth = self._make_growth(record.plan)
            await asyncio.to_thread(growth.check, devices, request.file_systems)
            await asyncio.to_thread(witness.start)
            take([one for device in devices for one in identities(device.path)])
            session = self._make_session(record, devices, witness)
            try:
                session.write_down()
            except BaseException:
                session.close()  # it waits for its source, and would write that down one day
                raise
        except BaseException:
            witness.close()
            for device in devices:
                device.close()
            raise
        return session

    def restore(self, record: TargetRecord) -> TargetSession:
        """Return the session that an earlier agent wrote down; its devices claimed, if they are."""
        devices: list[BlockDevice] = []
        is_open = record.history[-1].state in (State.PENDING, State.SEEDING, State.SYNCING)
        if is_open:
            try:
                undoing = self._make_growth(record.plan) if record.resizing else None
                devices = claim(
                    record.plan.volumes, self._config.allow_devices, undoing, record.nameplates
                )
            except WarmsyncError as error:  # tried again when its source comes back
                _log.error('target not claimed id=%s reason="%s"', record.plan.id, error)
        witness, failure = self._make_witness(record.plan, live=is_open), None
        try:
            if record.boot_id == boot_id():
                witness.resume()
            elif is_open:
                witness.start()
        except WarmsyncError as error:
            failure = error
        session = self._make_session(record, devices, witness)
        if failure is not None:
            session.give_up(failure)
        return session

    def _make_session(
        self, record: TargetRecord, devices: list[BlockDevice], witness: Witness
    ) -> TargetSession:
        hooks = self._config.hooks
        hook = Hook("boot", "target", hooks.boot, hooks.boot_seconds)
        return TargetSession(
            record,
            devices,
            self._workshop,
            self._journal,
            self._config.allow_devices,
            witness=witness,
            signer=self._signer,
            growth=self._make_growth(record.plan),
            boot=HookRun(hook, self._places.hook(record.plan.id, "boot")),
        )

    def _make_growth(self, plan: Plan) -> Growth:
        return Growth(self._places.resizes, plan, self._config.resize)

    def _make_witness(self, plan: Plan, *, live: bool = True) -> Witness:
        names = [f"{plan.id}-{i}" for i in range(len(plan.volumes))]
        stores = [Store(self._places.digests, name) for name in names]
        depth = plan.verify if live else Depth.NONE
        return Witness(depth, plan.volumes, stores, self._workshop.threads, self._workshop.pool)
