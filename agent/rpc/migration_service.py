"""MigrationService: what controllers call."""

# Method names and arguments are those of the protocol.
# ruff: noqa: ARG002, N802
from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from google.protobuf.empty_pb2 import Empty
from warmsync.v1 import migration_pb2, migration_service_pb2_grpc
from warmsync.v1 import migration_service_pb2 as pb

from agent.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from agent.registry import Registry
from agent.registry.revival import Source
from agent.rpc.convert import id_of, to_comparison, to_message, to_mode, to_owner, to_plan
from agent.rpc.errors import to_its_end
from agent.target import TargetSession

WATCH_SECONDS = 0.1
"""Least time between two messages of a watch, so that progress does not flood the controller."""

WATCH_MESSAGES_PER_SECOND = 1000
"""All watches together get at most so many: each costs 0.13 ms of the one event loop, which the
migrations need too. Watches are level-triggered: what is skipped is in the next message."""

_NUMBERS = ("bandwidth_limit_bytes_per_second", "max_downtime_seconds")
_MUTABLE = (*_NUMBERS, "cutover")
_MAX_PAGE = 1000
_DEFAULT_PAGE = 100


class MigrationServicer(migration_service_pb2_grpc.MigrationServiceServicer):
    """Serves controllers. Method names are those of the protocol."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._watches = 0

    async def CreateMigration(
        self, request: pb.CreateMigrationRequest, context: Any
    ) -> migration_pb2.Migration:
        """Check everything on both hosts, then start."""
        plan = to_plan(request, f"m-{secrets.token_hex(4)}")
        # A caller that hangs up in the middle must not leave half of it behind.
        migration = await to_its_end(self._registry.create(plan))
        return to_message(migration.snapshot())

    async def GetMigration(
        self, request: pb.GetMigrationRequest, context: Any
    ) -> migration_pb2.Migration:
        """Return a migration, at either end."""
        return to_message(self._registry.get(id_of(request.name)).snapshot())

    async def ListMigrations(
        self, request: pb.ListMigrationsRequest, context: Any
    ) -> pb.ListMigrationsResponse:
        """Return a page, sorted by id."""
        if request.page_size < 0:
            raise InvalidArgument(
                "INVALID_PAGE_SIZE",
                f"page size {request.page_size} is below zero; use 0 for the default",
                page_size=request.page_size,
            )
        ends = self._registry.all()
        first = _parse_token(request.page_token)
        last = first + min(request.page_size or _DEFAULT_PAGE, _MAX_PAGE)
        return pb.ListMigrationsResponse(
            migrations=[to_message(end.snapshot()) for end in ends[first:last]],
            next_page_token=str(last) if last < len(ends) else "",
        )

    async def UpdateMigration(
        self, request: pb.UpdateMigrationRequest, context: Any
    ) -> migration_pb2.Migration:
        """Change the limit or the budget while running."""
        wanted = request.migration
        migration = self._source(wanted.name)
        # Without a mask, what is set is meant (AIP-134).
        given = [field.name for field, _ in wanted.ListFields() if field.name in _MUTABLE]
        paths = list(request.update_mask.paths) or given
        for path in paths:
            if path not in _MUTABLE:
                raise InvalidArgument(
                    "IMMUTABLE_FIELD",
                    f"field {path!r} cannot be changed; {', '.join(_MUTABLE)} can",
                    field=path,
                )
        limit, budget = (getattr(wanted, name) if name in paths else None for name in _NUMBERS)
        mode = to_mode(wanted.cutover) if "cutover" in paths else None
        if limit is not None:
            limit = self._registry.cap_limit(limit)
        if mode is not None:
            migration.check_mode(mode)
        if mode is None or limit is not None or budget is not None:
            migration.update(limit, budget)
        if mode is not None:
            await migration.set_mode(mode)
        return to_message(migration.snapshot())

    async def DeleteMigration(self, request: pb.DeleteMigrationRequest, context: Any) -> Empty:
        """Forget a migration that has ended."""
        self._registry.forget(id_of(request.name))
        return Empty()

    async def WatchMigration(
        self, request: pb.WatchMigrationRequest, context: Any
    ) -> AsyncIterator[pb.WatchMigrationResponse]:
        """Stream the migration whenever it changed, until it has ended."""
        end = self._registry.get(id_of(request.name))
        with self._watching():
            while True:
                seen = end.bell.count
                migration = end.snapshot()
                yield pb.WatchMigrationResponse(migration=to_message(migration))
                if end.state.is_terminal and end.state == migration.state:
                    return
                await asyncio.sleep(self._watch_seconds)
                await self._registry.wait(end.bell, seen)
                end = self._registry.latest(end)

    @property
    def _watch_seconds(self) -> float:
        return max(WATCH_SECONDS, self._watches / WATCH_MESSAGES_PER_SECOND)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Count a watch. ResourceExhausted TOO_MANY_WATCHES."""
        most = self._registry.config.limits.max_watches
        if self._watches >= most:
            raise ResourceExhausted(
                "TOO_MANY_WATCHES",
                f"this agent has {self._watches} watches, its limit; end one, ask with "
                "GetMigration (warmsync show), or raise limits.max_watches",
                limit=most,
            )
        self._watches += 1
        try:
            yield
        finally:
            self._watches -= 1

    async def PauseMigration(
        self, request: pb.PauseMigrationRequest, context: Any
    ) -> migration_pb2.Migration:
        """Stop sending; tracking goes on."""
        migration = self._source(request.name)
        migration.pause()
        return to_message(migration.snapshot())

    async def ResumeMigration(
        self, request: pb.ResumeMigrationRequest, context: Any
    ) -> migration_pb2.Migration:
        """Go on."""
        migration = self._source(request.name)
        migration.resume()
        return to_message(migration.snapshot())

    async def CancelMigration(
        self, request: pb.CancelMigrationRequest, context: Any
    ) -> migration_pb2.Migration:
        """Stop and release the target, marked incomplete."""
        end = self._registry.get(id_of(request.name))
        if isinstance(end, TargetSession):
            end.abandon()
            return to_message(end.snapshot())
        return await self._finish(request.name, "cancel")

    async def CutOverMigration(
        self, request: pb.CutOverMigrationRequest, context: Any
    ) -> migration_pb2.Migration:
        """Return once the target is durable and released."""
        migration = self._source(request.name)
        await migration.cut_over(force=request.force)
        return to_message(migration.snapshot())

    async def RollBackMigration(
        self, request: pb.RollBackMigrationRequest, context: Any
    ) -> migration_pb2.Migration:
        """Make the source the owner again."""
        return await self._finish(request.name, "roll_back")

    async def FinishMigration(
        self, request: pb.FinishMigrationRequest, context: Any
    ) -> migration_pb2.Migration:
        """End a migration that was cut over."""
        return await self._finish(request.name, "finish")

    async def SettleMigration(
        self, request: pb.SettleMigrationRequest, context: Any
    ) -> migration_pb2.Migration:
        """Record who owns, at either end; to its end, also if the caller hangs up."""
        settling = self._registry.settle(id_of(request.name), to_owner(request.owner))
        end = await to_its_end(settling)
        return to_message(end.snapshot())

    async def GetCutoverCertificate(
        self, request: pb.GetCutoverCertificateRequest, context: Any
    ) -> pb.GetCutoverCertificateResponse:
        """Return what both agents have signed."""
        end = self._registry.get(id_of(request.name))
        if not end.certificate:
            raise FailedPrecondition(
                "NO_CERTIFICATE",
                f"migration {end.id} is {end.state}: both agents sign a certificate when it is "
                "cut over",
                id=end.id,
                state=end.state,
            )
        return pb.GetCutoverCertificateResponse(certificate=end.certificate.encode())

    async def VerifyMigration(
        self, request: pb.VerifyMigrationRequest, context: Any
    ) -> AsyncIterator[pb.VerifyMigrationResponse]:
        """Compare both ends; stream the progress, then the result."""
        async for comparison in self._source(request.name).verify():
            yield to_comparison(comparison)

    def _source(self, name: str) -> Source:
        return self._registry.get_source(id_of(name))

    async def _finish(self, name: str, command: str) -> migration_pb2.Migration:
        """Run a command to its end, also if the caller hangs up meanwhile."""
        migration = self._source(name)
        await to_its_end(getattr(migration, command)())
        return to_message(migration.snapshot())


def _parse_token(token: str) -> int:
    if token and not token.isdecimal():
        raise InvalidArgument(
            "INVALID_PAGE_TOKEN", f"page token {token!r} is none of this agent's", token=token
        )
    return int(token or 0)
