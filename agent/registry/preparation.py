"""What comes before a migration is driven: its sources opened and tracked, its target claimed.

Owns that whatever fails leaves nothing behind, and what of an earlier agent's marks is believed.
Starts no round.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from agent.brake import Brake, find_brake
from agent.config import AgentConfig
from agent.device import boot_id
from agent.disk import Fenceable, OpenSource, SourceDisk, open_fence, open_source
from agent.errors import InvalidArgument, WarmsyncError
from agent.hook import Hook, HookRun
from agent.migration import PROTOCOL_VERSION, Identity, Plan, Scheme
from agent.peer import Peer, SessionRequest, session_token
from agent.qemu.access import Access, Seat
from agent.record import SourceRecord
from agent.registry.places import Places
from agent.resize import foresee
from agent.shrinkage import fit
from agent.signer import Signer
from agent.source.prepared import Prepared
from agent.state import State
from agent.store import Store
from agent.tracker.choice import choose_scheme, fit_block, settle_scheme

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reopened:
    """The sources of a migration that was found again; `suspect`: why marks are not believed."""

    disks: list[SourceDisk]
    request: SessionRequest
    brake: Brake | None
    suspect: str


class Preparation:
    """One agent's. `connect` makes the peer of an address."""

    def __init__(
        self,
        config: AgentConfig,
        places: Places,
        qemus: Access,
        connect: Callable[[str], Peer],
        signer: Signer,
    ) -> None:
        self._config = config
        self._places = places
        self._qemus = qemus
        self._connect = connect
        self._signer = signer

    async def prepare(self, plan: Plan, take: Callable[[list[Identity]], None]) -> Prepared:
        """Check everything on both hosts. `take` reserves devices, or raises."""
        quiesce = self._quiesce(plan.id)
        if plan.quiesces:
            quiesce.hook.check()
        named, told = settle_scheme(plan.scheme, [volume.source for volume in plan.volumes])
        sources = await self._open_sources(plan, named)
        disks: list[SourceDisk] = []
        peer: Peer | None = None
        secret = ""  # of a session that may be there
        try:
            brake = await asyncio.to_thread(self._find_brake, plan, sources)
            wanted = [one for s in sources for one in s.identities]
            take(wanted + (brake.identities if brake else []))
            if brake is not None:
                await asyncio.to_thread(brake.prove)
            scheme, reason = await asyncio.to_thread(
                choose_scheme, named, [source.device for source in sources]
            )
            peer = self._connect(plan.peer)
            if plan.resize:
                sources = await fit(sources, peer)
            request = await asyncio.to_thread(_request, plan, sources, scheme)
            secret = secrets.token_urlsafe(24)
            opening = asyncio.ensure_future(peer.open_session(replace(request, secret=secret)))
            try:
                # Meanwhile, as both take a while.
                for i, source in enumerate(sources):
                    disks.append(self._make_disk(source, scheme, plan, i))
                    await asyncio.to_thread(disks[-1].start)
            finally:
                await opening
            if plan.boots:
                await peer.boot(session_token(secret, 1), 0)
            if plan.cold:
                for disk in disks:
                    await asyncio.to_thread(disk.check_unclaimed)
        except BaseException as error:
            await _undo(sources, disks, peer, secret, error)
            raise
        return Prepared(
            plan,
            scheme,
            told or reason,
            disks,
            peer,
            secret,
            request,
            self._signer,
            brake,
            quiesce=quiesce,
        )

    async def undo(self, prepared: Prepared, error: BaseException) -> None:
        """Give back what was prepared; the target is told why."""
        await _undo([], prepared.disks, prepared.peer, prepared.secret, error)

    def open_fence(self, record: SourceRecord, index: int) -> Fenceable | None:
        """Open what a volume is fenced at; see `agent.disk.open_fence`."""
        seat = self._seat(record.scheme, record.plan.id, index)
        source, known = record.plan.volumes[index].source, record.nameplate(index)
        return open_fence(source, self._config.allow_devices, seat, known=known)

    def reopen(self, record: SourceRecord) -> Reopened:
        """Open the sources of a migration again, and take their trackers up. Blocking."""
        plan, disks = record.plan, list[SourceDisk]()
        owns = record.history[-1].state is not State.CUT_OVER
        fenced = record.releasing or not owns
        suspect = ""
        try:
            for i, volume in enumerate(plan.volumes):
                seat = self._seat(record.scheme, plan.id, i)
                allowed, known = self._config.allow_devices, record.nameplate(i)
                source = open_source(volume, allowed, seat, fenced=fenced, known=known)
                disk = self._make_disk(source, record.scheme, plan, i)
                disks.append(disk)
                if fenced:
                    disk.fence()
                if owns:
                    same = record.boot_id == boot_id() and record.devices[i] == disk.known_key
                    # Each of them, whatever was found of the others.
                    suspect = disk.resume(believed=same) or suspect
            request = _request(plan, [disk.source for disk in disks], record.scheme)
        except BaseException:
            for disk in disks:
                disk.detach()
            raise
        brake = self._find_brake_again(plan, disks)
        if suspect:
            _log.warning('marks not believed, all is sent id=%s reason="%s"', plan.id, suspect)
        return Reopened(disks, request, brake, suspect)

    def take_up(self, record: SourceRecord, reopened: Reopened) -> Prepared:
        """Return what a migration goes on with."""
        plan = record.plan
        return Prepared(
            plan,
            record.scheme,
            record.scheme_reason,
            reopened.disks,
            self._connect(plan.peer),
            record.secret,
            reopened.request,
            self._signer,
            reopened.brake,
            restored=record,
            suspect=reopened.suspect,
            quiesce=self._quiesce(plan.id),
        )

    async def _open_sources(self, plan: Plan, scheme: Scheme) -> list[OpenSource]:
        sources: list[OpenSource] = []
        try:
            for i, volume in enumerate(plan.volumes):
                allowed, seat = self._config.allow_devices, self._seat(scheme, plan.id, i)
                if seat is not None:
                    await asyncio.to_thread(_forget_earlier, seat)
                sources.append(await asyncio.to_thread(open_source, volume, allowed, seat))
                _check_disjoint(sources)
        except BaseException:
            for source in sources:
                source.device.close()
            raise
        return sources

    def _make_disk(self, source: OpenSource, scheme: Scheme, plan: Plan, index: int) -> SourceDisk:
        name = f"{plan.id}-{index}"
        store, pin = Store(self._places.volumes, name), self._places.pins / name
        return SourceDisk(source, scheme, plan.block_size_bytes, pin, store, verify=plan.verify)

    def give_back(self, record: SourceRecord) -> None:
        """Remove what an earlier agent left in QEMUs of what is not taken up. Blocking."""
        for index in range(len(record.plan.volumes)):
            seat = self._seat(record.scheme, record.plan.id, index)
            if seat is not None:
                from agent.qemu.tidy import give_back

                give_back(seat)

    def _seat(self, scheme: Scheme, name: str, index: int) -> Seat | None:
        if scheme is not Scheme.QEMU:
            return None
        volume = f"{name}-{index}"
        return Seat(self._qemus, volume, self._places.volumes / f"{volume}.qemu")

    def _find_brake(self, plan: Plan, sources: list[OpenSource]) -> Brake | None:
        if plan.guest_throttle is None:
            return None
        devices = [source.device for source in sources]
        journal = self._places.brakes / f"{plan.id}.json"
        return find_brake(plan.guest_throttle, devices, self._config.allow_cgroups, journal)

    def _find_brake_again(self, plan: Plan, disks: list[SourceDisk]) -> Brake | None:
        try:
            return self._find_brake(plan, [disk.source for disk in disks])
        except WarmsyncError as error:
            _log.warning('the guest cannot be slowed any more id=%s reason="%s"', plan.id, error)
            return None

    def _quiesce(self, name: str) -> HookRun:
        hooks = self._config.hooks
        hook = Hook("quiesce", "source", hooks.quiesce, hooks.quiesce_seconds)
        return HookRun(hook, self._places.hook(name, "quiesce"))


def _forget_earlier(seat: Seat) -> None:
    """Remove the note of a migration of that id, and first what that has left: only it tells."""
    with suppress(ImportError):  # to open the source says so
        from agent.qemu.tidy import settle

        settle(seat)
    with suppress(OSError):
        seat.note.unlink(missing_ok=True)


async def _undo(
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
        file_systems=tuple(foresee(one.device) for one in sources) if plan.resize else (),
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
