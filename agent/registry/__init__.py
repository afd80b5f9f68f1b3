"""All migrations of one agent, at both ends.

Owns who may start, what is remembered of those that have ended, and the threads and buffers that
all share. Drives nothing itself.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from secrets import compare_digest
from typing import TypeAlias

from agent.bell import Bell
from agent.brake import undo_left_behind
from agent.carrier.port import DataPort
from agent.config import AgentConfig
from agent.errors import FailedPrecondition, NotFound, agent_stopped
from agent.journal import Journal
from agent.migration import PROTOCOL_VERSION, Identity, Owner, Plan, Role, Totals, check_plan
from agent.peer import Peer, SessionRequest
from agent.qemu.access import Access
from agent.registry.ended import Ended
from agent.registry.fence import Fence, is_wanted
from agent.registry.leftovers import remove_leftovers
from agent.registry.places import places_of
from agent.registry.preparation import Preparation
from agent.registry.reception import Reception
from agent.registry.reservations import Reservations
from agent.registry.revival import Revival, Source
from agent.registry.settling import PastSettling
from agent.registry.waiting import Waiting
from agent.sender import Workshop
from agent.signer import Signer
from agent.source import SourceMigration
from agent.state import State
from agent.target import TargetSession, session_not_found
from agent.threads import Threads
from native.buffer import BufferPool
from native.frame import MAX_PAYLOAD_BYTES

_log = logging.getLogger(__name__)

MAX_ENDED = 1000
"""Migrations that have ended and are remembered; the oldest are forgotten, unless one tells of a
fence: an agent that starts without it would let the old VM write beside the target's.
"""

End: TypeAlias = Source | TargetSession


class Registry:
    """Creates, finds and forgets migrations. `connect` makes the peer of an address."""

    def __init__(self, config: AgentConfig, connect: Callable[[str], Peer], signer: Signer) -> None:
        self.config = config
        self._connect = connect
        threads = config.transfer.threads
        self._threads = Threads(threads, thread_name_prefix="io")
        self._pool = BufferPool(2 * MAX_PAYLOAD_BYTES, threads)
        self._workshop = Workshop(
            self._threads,
            self._pool,
            config.transfer.read_ahead_frames,
            config.transfer.connections,
            config.transfer.checkpoint_bytes,
        )
        self.data_port: DataPort | None = None
        self._sources: dict[str, Source] = {}
        self._targets: dict[str, TargetSession] = {}
        self._reservations = Reservations(config.limits.max_migrations)
        self._closed = asyncio.Event()
        self._places = places = places_of(config)
        qemu = config.qemu
        self._qemus = Access(qemu.sockets, qemu.nbd_sockets, Path(qemu.run_dir), places.mark)
        self._journal = Journal(Path(config.state_dir))
        self._preparation = Preparation(config, places, self._qemus, connect, signer)
        self._reception = Reception(config, places, self._workshop, self._journal, signer)
        self._past = PastSettling(
            self._journal, connect, self._preparation.open_fence, self._sources
        )
        self._revival = Revival(
            self._preparation,
            self._reception,
            self._reservations,
            workshop=self._workshop,
            journal=self._journal,
            connect=connect,
            sources=self._sources,
            targets=self._targets,
        )
        self._revival.put_up_fences()
        undo_left_behind(places.brakes)
        self._revival.find()
        found = self._revival
        remove_leftovers(
            places, self._qemus, found.tracked(), found.received(), fenced=found.fenced()
        )

    @property
    def workshop(self) -> Workshop:
        """What all migrations share."""
        return self._workshop

    def totals(self) -> Totals:
        """Return the totals of all migrations that this agent was the source of."""
        counted = self._journal.totals()
        # Those that go on are counted when they are handed over, or end.
        sending = [
            source.snapshot().progress.sent_bytes
            for source in self._sources.values()
            if not source.state.is_terminal and not source.state.is_handed_over
        ]
        return Totals(
            migrations_started=int(counted.get("migrations_started", 0)),
            migrations_cut_over=int(counted.get("migrations_cut_over", 0)),
            migrations_failed=int(counted.get("migrations_failed", 0)),
            sent_bytes=int(counted.get("sent_bytes", 0)) + sum(sending),
            moved_bytes=int(counted.get("moved_bytes", 0)),
            downtime_seconds=counted.get("downtime_seconds", 0.0),
            downtime_saved_seconds=counted.get("downtime_saved_seconds", 0.0),
        )

    def all(self) -> list[End]:
        """Return all ends, sorted by id."""
        ends: list[End] = [*self._sources.values(), *self._targets.values()]
        return sorted(ends, key=lambda end: (end.id, isinstance(end, TargetSession)))

    def get(self, name: str) -> End:
        """Return a migration by its id; the source's end where this agent is both. NotFound."""
        end = self._sources.get(name) or self._targets.get(name)
        if end is None:
            raise NotFound(
                "MIGRATION_NOT_FOUND",
                f"there is no migration {name!r} on this agent; `warmsync list` shows all",
                id=name,
            )
        return end

    def get_source(self, name: str) -> Source:
        """Return a migration that this agent is the source of: only there it can be steered."""
        end = self.get(name)
        if isinstance(end, TargetSession):
            raise FailedPrecondition(
                "NOT_THE_SOURCE",
                f"this agent is the target of migration {name}; ask the agent of its source, or "
                "if that is gone settle who owns (warmsync settle)",
                id=name,
            )
        return end

    async def settle(self, name: str, owner: Owner) -> End:
        """Record what a person says: who owns, where the agents cannot learn it."""
        end = self.get(name)
        if isinstance(end, TargetSession):
            await end.settle(owner, self.config.allow_devices)
            return end
        if isinstance(end, SourceMigration) and end.is_giving_up:
            await end.given_back()
            end = self.get_source(name)
        if isinstance(end, SourceMigration) and end.state.is_terminal:
            record = end.record()
            fence = Fence(record, self._preparation.open_fence)
            end = self._sources[name] = Ended(record, fence)
        if isinstance(end, SourceMigration):
            await end.settle(owner)
        elif not await self._past.settle(end, owner):
            return await self.settle(name, owner)
        return end

    def session(self, token: str, *, ahead: bool = False) -> TargetSession:
        """Return the session of a token; see `agent.target.ledger`. NotFound."""
        for session in self._targets.values():
            if session.is_named_by(token, ahead=ahead):
                return session
        raise session_not_found()

    def session_of(self, secret: str) -> TargetSession:
        """Return the session of a secret, whatever its epoch. NotFound."""
        for session in self._targets.values():
            if compare_digest(session.secret.encode(), secret.encode()):
                return session
        raise session_not_found()

    def cap_limit(self, limit_bytes_per_second: int) -> int:
        """Return a migration's bandwidth limit (0: none) within the configuration's."""
        most = self.config.limits.bandwidth_bytes_per_second
        return min(limit_bytes_per_second or most, most) if most else limit_bytes_per_second

    def abort_session(self, token: str, reason: str, *, cancelled: bool) -> None:
        """Give a session up. One that never began leaves nothing behind: its id is free again."""
        # Each try of its source to come back counts, also one that has not arrived here.
        session = self.session(token, ahead=True)
        never_began = session.state is State.PENDING
        session.abort(reason, cancelled=cancelled)
        if never_began:
            self._reservations.free(Role.TARGET, session.id)
            del self._targets[session.id]
            self._journal.remove(Role.TARGET, session.id)

    def start(self) -> None:
        """Let the migrations go on that were found again; tell of those that have ended."""
        self._revival.start()

    async def first_tries(self) -> None:
        """See `agent.registry.revival`."""
        await self._revival.first_tries()

    def latest(self, end: End) -> End:
        """Return what `end` has become: one that waited may have been taken up since."""
        return self._sources.get(end.id, end) if isinstance(end, Waiting) else end

    async def create(self, plan: Plan) -> SourceMigration:
        """Check everything on both hosts and start. Whatever fails leaves nothing behind."""
        check_plan(plan)
        limit = self.cap_limit(plan.limit_bytes_per_second)
        plan = replace(plan, limit_bytes_per_second=limit)
        self._reserve(Role.SOURCE, plan.id)
        try:
            migration = await self._prepare(plan)
        except BaseException:
            self._reservations.free(Role.SOURCE, plan.id)
            raise
        self._sources[plan.id] = migration
        migration.start()
        return migration

    async def _prepare(self, plan: Plan) -> SourceMigration:
        take = partial(self._reservations.take, Role.SOURCE, plan.id)
        prepared = await self._preparation.prepare(plan, take)
        try:
            self._check_running()
            migration = SourceMigration(prepared, self._workshop, self._journal)
            migration.write_down({"migrations_started": 1})
        except BaseException as error:
            await self._preparation.undo(prepared, error)
            raise
        return migration

    async def open_session(self, request: SessionRequest) -> TargetSession:
        """Check and claim the target devices of a migration, all or none."""
        if request.protocol_version != PROTOCOL_VERSION:
            raise FailedPrecondition(
                "PROTOCOL_MISMATCH",
                f"the source speaks protocol {request.protocol_version}, this agent "
                f"{PROTOCOL_VERSION}; run the same version of warmsync on both hosts",
            )
        check_plan(Plan(request.migration_id, "", request.volumes))
        request.check()
        name = request.migration_id
        self._reserve(Role.TARGET, name)

        def take(found: list[Identity]) -> None:
            self._check_running()
            self._reservations.take(Role.TARGET, name, found)

        try:
            session = await self._reception.open(request, take)
        except BaseException:
            self._reservations.free(Role.TARGET, name)
            raise
        self._targets[session.id] = session
        _log.info("session opened id=%s", session.id)
        return session

    async def wait(self, bell: Bell, seen: int) -> None:
        """Wait for a migration to change; Unavailable when the agent stops meanwhile."""
        change = asyncio.ensure_future(bell.wait(seen))
        stop = asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait([change, stop], return_when=asyncio.FIRST_COMPLETED)
            if not change.done():
                raise agent_stopped()
        finally:
            change.cancel()
            stop.cancel()

    def forget(self, name: str) -> None:
        """Drop an ended migration. FailedPrecondition while it has not ended."""
        end = self.get(name)
        if not _has_ended(end):
            mend = (
                "what it still does with its disks and its target has to end: delete it again in a "
                "moment"
                if end.state.is_terminal
                else "cancel or finish it before deleting it, or settle it where the other agent "
                "is gone"
            )
            raise FailedPrecondition(
                "NOT_ENDED", f"migration {name} is {end.state}; {mend}", id=name, state=end.state
            )
        self._reservations.free(end.snapshot().role, name)
        self._drop(end)

    def _drop(self, end: End) -> None:
        is_target = isinstance(end, TargetSession)
        self._journal.remove(Role.TARGET if is_target else Role.SOURCE, end.id)
        if isinstance(end, Ended):
            end.forget()
        if not is_target:
            self._revival.forget(end.id)
        hook = self._places.hook(end.id, "boot" if is_target else "quiesce")
        shutil.rmtree(hook, ignore_errors=True)
        (self._targets if is_target else self._sources).pop(end.id)

    async def close(self) -> None:
        """Give everything back; what is written down goes on with the next start. Once only."""
        self._closed.set()
        stopping = agent_stopped()
        await asyncio.gather(*(source.close(stopping) for source in self._sources.values()))
        self._revival.close()
        for session in self._targets.values():
            session.close()
        await asyncio.gather(*(session.ended() for session in self._targets.values()))
        await asyncio.to_thread(self._threads.shutdown)
        self._pool.close()
        self._journal.close()
        with suppress(OSError):  # never made, or not empty: then the next start tidies up
            self._places.pins.rmdir()

    def _check_running(self) -> None:
        """Raise Unavailable once the agent stops: what begins now would be ended by nobody."""
        if self._closed.is_set():
            raise agent_stopped()

    def _reserve(self, role: Role, name: str) -> None:
        self._check_running()
        self._tidy()
        existing = self._sources if role is Role.SOURCE else self._targets
        self._reservations.reserve(role, name, existing)

    def _tidy(self) -> None:
        """Give back the devices of migrations that have ended; forget the oldest of them."""
        ended = [(end.snapshot(), end) for end in self.all() if _has_ended(end)]
        for one, _ in ended:
            self._reservations.free(one.role, one.plan.id)
        spare = [
            (one.history[-1].at_seconds, end) for one, end in ended if not _tells_of_fence(end)
        ]
        spare.sort(key=itemgetter(0))
        for _, end in spare[: max(len(spare) - MAX_ENDED, 0)]:
            self._drop(end)


def _has_ended(end: End) -> bool:
    """Return whether an end has come to its end, and holds nothing any more."""
    if isinstance(end, TargetSession):
        return end.state.is_terminal
    is_held = end.is_held if isinstance(end, Ended) else end.is_giving_up
    return end.state.is_terminal and not is_held


def _tells_of_fence(end: End) -> bool:
    """Return whether only this end tells of a fence that has to go up, or to come down."""
    if isinstance(end, TargetSession):
        return False
    if isinstance(end, SourceMigration):
        return is_wanted(end.record())
    return is_wanted(end.record) or end.fence.trouble is not None
