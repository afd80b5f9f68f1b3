"""All migrations of one agent, at both ends.

Owns who may start, which devices are taken by which migration, and the threads and buffers that
all share. Drives nothing itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from secrets import compare_digest
from typing import TypeAlias

from agent.bell import Bell
from agent.brake import Brake, find_brake, undo_left_behind
from agent.carrier.port import DataPort
from agent.config import AgentConfig
from agent.device import boot_id, identities
from agent.disk import OpenSource, SourceDisk, open_source
from agent.ended import Ended, give_up
from agent.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WarmsyncError,
)
from agent.growth import Growth
from agent.hook import Hook, HookRun
from agent.journal import Journal
from agent.migration import (
    PROTOCOL_VERSION,
    Depth,
    Identity,
    Plan,
    Role,
    Scheme,
    Totals,
    check_plan,
)
from agent.peer import Peer, SessionRequest, session_token
from agent.qemu.access import Access, Seat
from agent.record import SourceRecord, TargetRecord, dump, load_source, load_target
from agent.sender import Workshop
from agent.signer import Signer
from agent.source import Prepared, SourceMigration
from agent.state import TERMINAL, State
from agent.store import Store
from agent.target import (
    TargetSession,
    claim,
    new_session,
    open_targets,
    session_not_found,
)
from agent.tracker.choice import choose_scheme, fit_block, remove_stale
from agent.witness import Witness
from native.blockio import BlockDevice
from native.buffer import BufferPool
from native.frame import MAX_PAYLOAD_BYTES

_log = logging.getLogger(__name__)

MAX_ENDED = 1000
"""Migrations that have ended and are remembered; the oldest are forgotten."""

Source: TypeAlias = SourceMigration | Ended
End: TypeAlias = Source | TargetSession


class Registry:
    """Creates, finds and forgets migrations. `connect` makes the peer of an address."""

    def __init__(self, config: AgentConfig, connect: Callable[[str], Peer], signer: Signer) -> None:
        self.config = config
        self._signer = signer
        self._connect = connect
        threads = config.transfer.threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="io")
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
        # Devices of migrations that have not ended, and ids being created.
        self._taken: dict[tuple[Role, str], list[Identity]] = {}
        self._closed = asyncio.Event()
        self._brakes = Path(config.state_dir) / "brakes"
        undo_left_behind(self._brakes)
        digest = hashlib.sha256(os.path.realpath(config.state_dir).encode()).hexdigest()
        self._pins = Path(config.bpffs_dir) / digest[:12]
        self._volumes = Path(config.state_dir) / "volumes"
        self._digests = Path(config.state_dir) / "targets"
        qemu = config.qemu
        self._qemus = Access(qemu.sockets, qemu.nbd_sockets, Path(qemu.run_dir), digest[:12])
        self._resizes = Path(config.state_dir) / "resize"
        self._hooks = Path(config.state_dir) / "hooks"
        self._journal = Journal(Path(config.state_dir))
        self._written: dict[str, SourceRecord] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self._restore()

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
        return sorted(ends, key=lambda end: (end.id, end.snapshot().role))

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
                f"this agent is the target of migration {name}; ask the agent of its source",
                id=name,
            )
        return end

    def session(self, token: str) -> TargetSession:
        """Return the session of a token. NotFound."""
        for session in self._targets.values():
            if session.is_named_by(token):
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
        session = self.session(token)
        never_began = session.state is State.PENDING
        session.abort(reason, cancelled=cancelled)
        if never_began:
            self._taken.pop((Role.TARGET, session.id), None)
            del self._targets[session.id]
            self._journal.remove(Role.TARGET, session.id)

    def _restore(self) -> None:
        """Find what the agent before this one wrote down. Fences go up again before all else."""
        sources: dict[str, SourceRecord] = {}
        for role, name, values in self._journal.load():
            try:
                if role is Role.TARGET:
                    self._restore_target(load_target(values))
                else:
                    sources[name] = self._written[name] = load_source(values)
            except ValueError as error:
                _log.error('record not understood id=%s role=%s reason="%s"', name, role, error)
        for record in sources.values():
            self._restore_source(record)
        going_on = self._tracked()
        for name in remove_stale(self._pins, going_on):
            _log.warning("removed a tracker that an earlier agent left behind name=%s", name)
        self._tidy_qemus(going_on)
        open_sessions = {
            f"{one.id}-{i}"
            for one in self._targets.values()
            if not one.is_over
            for i in range(len(one.snapshot().plan.volumes))
        }
        for directory, wanted in (
            (self._volumes, going_on),
            (self._digests, open_sessions),
            (self._resizes, open_sessions),
        ):
            for path in directory.glob("*"):
                if path.stem not in wanted:
                    path.unlink()

    def _tidy_qemus(self, going_on: Container[str]) -> None:
        """Remove what an earlier agent has left in QEMUs, and in images whose QEMU has ended."""
        notes = [path for path in self._volumes.glob("*.qemu") if path.stem not in going_on]
        if not (self._qemus.sockets or notes):
            return
        try:
            from agent.qemu.tidy import tidy
        except ImportError as error:
            _log.error('QEMUs not tidied up: this build has no qemu tracker reason="%s"', error)
            return
        ended = [Seat(self._qemus, path.stem, path) for path in notes]
        for name in tidy(self._qemus, going_on, ended):
            _log.warning("removed what an earlier agent left in a QEMU name=%s", name)

    def _tracked(self) -> set[str]:
        going_on = [one for one in self._sources.values() if isinstance(one, SourceMigration)]
        return {f"{one.id}-{i}" for one in going_on for i in range(len(one.disks))}

    def _restore_target(self, record: TargetRecord) -> None:
        devices: list[BlockDevice] = []
        open_states = (State.PENDING, State.SEEDING, State.SYNCING)
        if record.history[-1].state in open_states:
            try:
                undoing = self._make_growth(record.plan) if record.resizing else None
                devices = claim(record.plan.volumes, self.config.allow_devices, undoing)
            except WarmsyncError as error:  # tried again when its source comes back
                _log.error('target not claimed id=%s reason="%s"', record.plan.id, error)
        is_open = record.history[-1].state in open_states
        witness, failure = self._make_witness(record.plan, live=is_open), None
        try:
            if record.boot_id == boot_id():
                witness.resume()
            elif is_open:
                witness.start()
        except WarmsyncError as error:
            failure = error
        session = self._make_session(record, devices, witness)
        self._targets[record.plan.id] = session
        if failure is not None:
            session.give_up(failure)
        found = [one for volume in record.plan.volumes for one in _identities(volume.target)]
        if record.history[-1].state not in TERMINAL:
            self._taken[Role.TARGET, record.plan.id] = found

    def _make_session(
        self, record: TargetRecord, devices: list[BlockDevice], witness: Witness
    ) -> TargetSession:
        return TargetSession(
            record,
            devices,
            self._workshop,
            self._journal,
            self.config.allow_devices,
            witness=witness,
            signer=self._signer,
            growth=self._make_growth(record.plan),
            boot=HookRun(self._boot_hook(), self._hooks / f"{record.plan.id}-boot"),
        )

    def _make_growth(self, plan: Plan) -> Growth:
        return Growth(self._resizes, plan, self.config.resize)

    def _boot_hook(self) -> Hook:
        hooks = self.config.hooks
        return Hook("boot", "target", hooks.boot, hooks.boot_seconds)

    def _quiesce(self, name: str) -> HookRun:
        hooks = self.config.hooks
        hook = Hook("quiesce", "source", hooks.quiesce, hooks.quiesce_seconds)
        return HookRun(hook, self._hooks / f"{name}-quiesce")

    def _make_witness(self, plan: Plan, *, live: bool = True) -> Witness:
        stores = [Store(self._digests, f"{plan.id}-{i}") for i in range(len(plan.volumes))]
        depth = plan.verify if live else Depth.NONE
        return Witness(depth, plan.volumes, stores, self._threads, self._pool)

    def _restore_source(self, record: SourceRecord) -> None:
        name = record.plan.id
        if record.history[-1].state in TERMINAL:
            self._sources[name] = Ended(record)
            return
        try:
            prepared = self._take_up(record)
        except (WarmsyncError, OSError) as error:
            _log.error('migration cannot go on id=%s reason="%s"', name, error)
            self._sources[name] = Ended(give_up(record, error))
            return
        migration = SourceMigration(prepared, self._workshop, self._journal)
        self._sources[name] = migration
        self._taken[Role.SOURCE, name] = [
            one for volume in record.plan.volumes for one in _identities(volume.source)
        ]
        _log.info("migration found again id=%s state=%s", name, migration.state)

    def _take_up(self, record: SourceRecord) -> Prepared:
        """Open the sources of a migration again, and take their trackers up."""
        plan, disks = record.plan, list[SourceDisk]()
        owns = record.history[-1].state is not State.CUT_OVER
        suspect = ""
        try:
            for i, volume in enumerate(plan.volumes):
                seat = self._seat(record.scheme, plan.id, i)
                source = open_source(volume, self.config.allow_devices, seat)
                disk = self._make_disk(source, record.scheme, plan, i)
                disks.append(disk)
                if record.releasing or not owns:
                    disk.fence()
                if owns:
                    same = record.boot_id == boot_id() and record.devices[i] == disk.known_key
                    # Each of them, whatever was found of the others.
                    suspect = disk.resume(believed=same) or suspect
            request = _request(plan, [disk.source for disk in disks], record.scheme)
            peer = self._connect(plan.peer)
        except BaseException:
            for disk in disks:
                disk.detach()
            raise
        brake = self._find_brake_again(plan, disks)
        if suspect:
            _log.warning('marks not believed, all is sent id=%s reason="%s"', plan.id, suspect)
        return Prepared(
            plan,
            record.scheme,
            record.scheme_reason,
            disks,
            peer,
            record.secret,
            request,
            self._signer,
            brake,
            restored=record,
            suspect=suspect,
            quiesce=self._quiesce(plan.id),
        )

    def _find_brake_again(self, plan: Plan, disks: list[SourceDisk]) -> Brake | None:
        try:
            return self._find_brake(plan, [disk.source for disk in disks])
        except WarmsyncError as error:
            _log.warning('the guest cannot be slowed any more id=%s reason="%s"', plan.id, error)
            return None

    def _seat(self, scheme: Scheme, name: str, index: int) -> Seat | None:
        if scheme is not Scheme.QEMU:
            return None
        volume = f"{name}-{index}"
        return Seat(self._qemus, volume, self._volumes / f"{volume}.qemu")

    def _make_disk(self, source: OpenSource, scheme: Scheme, plan: Plan, index: int) -> SourceDisk:
        name = f"{plan.id}-{index}"
        store = Store(self._volumes, name)
        return SourceDisk(
            source, scheme, plan.block_size_bytes, self._pins / name, store, verify=plan.verify
        )

    def start(self) -> None:
        """Let the migrations go on that were found again."""
        for source in self._sources.values():
            source.start()
            if isinstance(source, Ended) and source.record != self._written.get(source.id):
                self._telling.add(asyncio.create_task(self._tell_end(source)))

    async def _tell_end(self, source: Ended) -> None:
        """Write down that a migration could not be taken up, and let its target go."""
        record = source.record
        try:
            failed = record.history[-1].state is State.FAILED
            counted = {"migrations_failed": 1.0, "sent_bytes": record.progress.sent_bytes}
            self._journal.save(Role.SOURCE, source.id, dump(record), counted if failed else None)
            if record.history[-1].state is not State.FAILED:
                return
            peer = self._connect(record.plan.peer)
            try:
                token = session_token(record.secret, record.epoch)
                await peer.abort(token, str(record.error), cancelled=False)
            finally:
                await peer.close()
        except WarmsyncError as error:
            _log.warning('target not told of the end id=%s reason="%s"', source.id, error)

    async def create(self, plan: Plan) -> SourceMigration:
        """Check everything on both hosts and start. Whatever fails leaves nothing behind."""
        check_plan(plan)
        limit = self.cap_limit(plan.limit_bytes_per_second)
        plan = replace(plan, limit_bytes_per_second=limit)
        self._reserve(Role.SOURCE, plan.id, self._sources)
        prepared: Prepared | None = None
        try:
            prepared = await self._prepare(plan)
            migration = SourceMigration(prepared, self._workshop, self._journal)
            try:
                migration.write_down({"migrations_started": 1})
            except WarmsyncError as error:
                await self._undo([], prepared.disks, prepared.peer, prepared.secret, error)
                prepared = None
                raise
        finally:
            if prepared is None:
                del self._taken[Role.SOURCE, plan.id]
        self._sources[plan.id] = migration
        migration.start()
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
        self._reserve(Role.TARGET, request.migration_id, self._targets)
        session: TargetSession | None = None
        try:
            devices = await asyncio.to_thread(
                open_targets, request, self.config.allow_devices, boot_id()
            )
            record = new_session(request)
            witness = self._make_witness(record.plan)
            try:
                await asyncio.to_thread(witness.start)
                found = [one for device in devices for one in identities(device.path)]
                self._check_running()
                self._take(Role.TARGET, request.migration_id, found)
                session = self._make_session(record, devices, witness)
                session.write_down()
            except BaseException:
                session = None
                witness.close()
                for device in devices:
                    device.close()
                raise
        finally:
            if session is None:
                del self._taken[Role.TARGET, request.migration_id]
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
                raise _stopping()
        finally:
            change.cancel()
            stop.cancel()

    def forget(self, name: str) -> None:
        """Drop an ended migration. FailedPrecondition while it has not ended."""
        end = self.get(name)
        if not end.state.is_terminal:
            raise FailedPrecondition(
                "NOT_ENDED",
                f"migration {name} is {end.state}; cancel or finish it before deleting it",
                id=name,
                state=end.state,
            )
        role = end.snapshot().role
        self._taken.pop((role, name), None)
        self._journal.remove(role, name)
        hook = "quiesce" if role is Role.SOURCE else "boot"
        shutil.rmtree(self._hooks / f"{name}-{hook}", ignore_errors=True)
        (self._sources if role is Role.SOURCE else self._targets).pop(name)

    async def close(self) -> None:
        """Give everything back; what is written down goes on with the next start. Once only."""
        self._closed.set()
        for task in self._telling:
            task.cancel()
        stopping = _stopping()
        await asyncio.gather(*(source.close(stopping) for source in self._sources.values()))
        for session in self._targets.values():
            session.close()
        await asyncio.gather(*(session.ended() for session in self._targets.values()))
        await asyncio.to_thread(self._threads.shutdown)
        self._pool.close()
        self._journal.close()
        with suppress(OSError):  # never made, or not empty: then the next start tidies up
            self._pins.rmdir()

    async def _prepare(self, plan: Plan) -> Prepared:
        if plan.quiesces:
            self._quiesce(plan.id).hook.check()
        sources = await self._open_sources(plan)
        disks: list[SourceDisk] = []
        peer: Peer | None = None
        secret = ""
        try:
            brake = await asyncio.to_thread(self._find_brake, plan, sources)
            wanted = [one for s in sources for one in s.identities]
            self._take(Role.SOURCE, plan.id, wanted + (brake.identities if brake else []))
            if brake is not None:
                await asyncio.to_thread(brake.prove)
            scheme, reason = await asyncio.to_thread(
                choose_scheme, plan.scheme, [source.device for source in sources]
            )
            peer = self._connect(plan.peer)
            request = _request(plan, sources, scheme)
            opening = asyncio.ensure_future(peer.open_session(request))
            try:
                # Meanwhile, as both take a while.
                for i, source in enumerate(sources):
                    disks.append(self._make_disk(source, scheme, plan, i))
                    await asyncio.to_thread(disks[-1].start)
            finally:
                secret = await opening
            if plan.boots:
                await peer.boot(session_token(secret, 1), 0)
            if plan.cold:
                for disk in disks:
                    await asyncio.to_thread(disk.check_unclaimed)
            self._check_running()
        except BaseException as error:
            await self._undo(sources, disks, peer, secret, error)
            raise
        return Prepared(
            plan,
            scheme,
            reason,
            disks,
            peer,
            secret,
            request,
            self._signer,
            brake,
            quiesce=self._quiesce(plan.id),
        )

    def _find_brake(self, plan: Plan, sources: list[OpenSource]) -> Brake | None:
        if plan.guest_throttle is None:
            return None
        devices = [source.device for source in sources]
        journal = self._brakes / f"{plan.id}.json"
        return find_brake(plan.guest_throttle, devices, self.config.allow_cgroups, journal)

    async def _open_sources(self, plan: Plan) -> list[OpenSource]:
        sources: list[OpenSource] = []
        try:
            for i, volume in enumerate(plan.volumes):
                allowed, seat = self.config.allow_devices, self._seat(plan.scheme, plan.id, i)
                sources.append(await asyncio.to_thread(open_source, volume, allowed, seat))
                _check_disjoint(sources)
        except BaseException:
            for source in sources:
                source.device.close()
            raise
        return sources

    async def _undo(
        self,
        sources: list[OpenSource],
        disks: list[SourceDisk],
        peer: Peer | None,
        secret: str,
        error: BaseException,
    ) -> None:
        for disk in disks:
            await asyncio.to_thread(disk.close)
        for source in sources:
            source.device.close()
        if peer is not None:
            if secret:
                with suppress(WarmsyncError):  # the error that led here is the one to report
                    await peer.abort(session_token(secret, 1), str(error), cancelled=False)
            await peer.close()

    def _check_running(self) -> None:
        """Raise Unavailable once the agent stops: what begins now would be ended by nobody."""
        if self._closed.is_set():
            raise _stopping()

    def _reserve(self, role: Role, name: str, existing: Container[str]) -> None:
        self._check_running()
        self._tidy()
        if name in existing or (role, name) in self._taken:
            raise AlreadyExists(
                "MIGRATION_EXISTS",
                f"there is a migration {name!r} already; choose another id, or delete it once it "
                "has ended",
                id=name,
            )
        if len(self._taken) >= self.config.limits.max_migrations:
            raise ResourceExhausted(
                "TOO_MANY_MIGRATIONS",
                f"this agent has {len(self._taken)} migrations under way, its limit; wait for one "
                "to end or raise limits.max_migrations",
                limit=self.config.limits.max_migrations,
            )
        self._taken[role, name] = []

    def _take(self, role: Role, name: str, wanted: list[Identity]) -> None:
        for (other_role, other), held in self._taken.items():
            if (other_role, other) != (role, name):
                for one in wanted:
                    if any(one.overlaps(taken) for taken in held):
                        raise FailedPrecondition(
                            "DEVICE_IN_MIGRATION",
                            f"migration {other} has the device already ({one.device}); "
                            "end that one first",
                            id=other,
                            device=one.device,
                        )
        self._taken[role, name] = wanted

    def _tidy(self) -> None:
        """Give back the devices of migrations that have ended."""
        ended = [end for end in self.all() if end.state.is_terminal]
        snapshots = sorted(
            (end.snapshot() for end in ended), key=lambda one: one.history[-1].at_seconds
        )
        for one in snapshots:
            self._taken.pop((one.role, one.plan.id), None)
        for one in snapshots[: max(len(snapshots) - MAX_ENDED, 0)]:
            self._journal.remove(one.role, one.plan.id)
            (self._sources if one.role is Role.SOURCE else self._targets).pop(one.plan.id)


def _stopping() -> Unavailable:
    return Unavailable(
        "AGENT_STOPPED", "the agent was stopped; its migrations go on when it is started again"
    )


def _request(plan: Plan, sources: list[OpenSource], scheme: Scheme) -> SessionRequest:
    volumes = []
    for source in sources:
        block = fit_block(scheme, source.volume.size_bytes, plan.block_size_bytes)
        volumes.append(replace(source.volume, block_size_bytes=block))
    return SessionRequest(
        migration_id=plan.id,
        protocol_version=PROTOCOL_VERSION,
        boot_id=boot_id(),
        volumes=tuple(volumes),
        source_identities=tuple(source.identities for source in sources),
        verify=plan.verify,
    )


def _check_disjoint(sources: list[OpenSource]) -> None:
    new = sources[-1]
    for other in sources[:-1]:
        if any(a.overlaps(b) for a in new.identities for b in other.identities):
            raise InvalidArgument(
                "DUPLICATE_DEVICE",
                f"{new.volume.source} and {other.volume.source} share their bytes; "
                "name each device once",
                path=new.volume.source,
                other=other.volume.source,
            )


def _identities(path: str) -> tuple[Identity, ...]:
    """Return what a path really is now; nothing if it is not there."""
    try:
        return identities(path)
    except OSError:
        return ()
