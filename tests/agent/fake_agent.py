"""An agent that only pretends: MigrationService and HostService in a thread, for the command."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from google.protobuf.empty_pb2 import Empty
from warmsync.v1 import (
    host_service_pb2,
    host_service_pb2_grpc,
    migration_pb2,
    migration_service_pb2,
    migration_service_pb2_grpc,
)

from agent.errors import AlreadyExists, Cancelled, DataLoss, FailedPrecondition, NotFound
from agent.rpc.errors import to_status
from agent.rpc.server import Service, start_server
from tests.agent.messages import migration

pb, service = migration_pb2, migration_service_pb2


class FakeAgent(migration_service_pb2_grpc.MigrationServiceServicer):
    """Remembers requests; what a watch tells is set by the test."""

    def __init__(self) -> None:
        self.address = ""
        self.requests: list[Any] = []
        self.watched: list[Any] = [migration(state=pb.STATE_CONVERGED)]
        self.hang = False
        self.hanging = threading.Event()
        self.compared: list[Any] = []

    async def CreateMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.append(request)
        if request.migration_id == "taken":
            raise AlreadyExists("DUPLICATE_ID", "taken exists: choose another", id="taken")
        return migration(request.migration_id or "chosen", state=pb.STATE_PENDING)

    async def GetMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.name != "migrations/web1":
            raise NotFound("MIGRATION_NOT_FOUND", f"{request.name} is unknown", name=request.name)
        return migration()

    async def ListMigrations(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.append(request)
        if not request.page_token:
            return service.ListMigrationsResponse(
                migrations=[migration("a")], next_page_token="second"
            )
        return service.ListMigrationsResponse(migrations=[migration("b", state=pb.STATE_FAILED)])

    async def UpdateMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.append(request)
        return migration()

    async def DeleteMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        return Empty()

    async def WatchMigration(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        for message in self.watched:
            yield service.WatchMigrationResponse(migration=message)
        if self.hang:
            self.hanging.set()
            await asyncio.Event().wait()

    async def PauseMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        return migration(state=pb.STATE_PAUSED)

    async def ResumeMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        return migration(state=pb.STATE_SYNCING)

    async def CancelMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        return migration(state=pb.STATE_CANCELLED)

    async def RollBackMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        return migration(state=pb.STATE_ROLLED_BACK)

    async def FinishMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        return migration(state=pb.STATE_COMPLETED)

    async def SettleMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.append(request)
        is_source = request.owner == pb.OWNER_SOURCE
        return migration(state=pb.STATE_ROLLED_BACK if is_source else pb.STATE_COMPLETED)

    async def CutOverMigration(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.append(request)
        if not request.force:
            raise FailedPrecondition("NOT_CONVERGED", "not converged yet: wait or use --force")
        done = migration(state=pb.STATE_CUT_OVER)
        done.progress.downtime_seconds = 0.25
        done.progress.downtime_parts.send_seconds = 0.125
        return done

    async def VerifyMigration(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        for message in self.compared:
            yield message


class FakeHost(host_service_pb2_grpc.HostServiceServicer):
    """A host that lacks something."""

    async def GetHost(self, request: Any, context: Any) -> Any:  # noqa: N802
        return host_service_pb2.GetHostResponse(
            checks=[
                host_service_pb2.Check(
                    name="remote",
                    status=host_service_pb2.CHECK_STATUS_MISSING,
                    finding="none",
                    mend="buy one",
                )
            ]
        )

    async def ListDevices(self, request: Any, context: Any) -> Any:  # noqa: N802
        device = host_service_pb2.Device(
            path="/dev/vg/web1", size_bytes=1 << 30, logical_block_size_bytes=512, in_use_by="x"
        )
        return host_service_pb2.ListDevicesResponse(devices=[device])


def failed(name: str = "web1") -> Any:
    """A migration that has failed."""
    message = migration(name, state=pb.STATE_FAILED)
    error = DataLoss("SOURCE_IO_ERROR", "source /dev/x: check the disk", path="/dev/x")
    message.error.CopyFrom(to_status(error))
    message.last_refusal.CopyFrom(to_status(Cancelled("WAS_REFUSED", "not now")))
    return message


@contextmanager
def pretending(listen: str = "127.0.0.1:0", fake: FakeAgent | None = None) -> Iterator[FakeAgent]:
    """Serve a FakeAgent, or the one given, from a thread with a loop of its own."""
    fake = fake or FakeAgent()
    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=asyncio.run, args=[_serve(fake, listen, ready, stop.is_set)])
    thread.start()
    try:
        assert ready.wait(20)
        yield fake
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


async def _serve(
    fake: FakeAgent, listen: str, ready: threading.Event, stopped: Callable[[], bool]
) -> None:
    def migrations(server: Any) -> None:
        migration_service_pb2_grpc.add_MigrationServiceServicer_to_server(fake, server)

    def host(server: Any) -> None:
        host_service_pb2_grpc.add_HostServiceServicer_to_server(FakeHost(), server)

    services = [
        Service("warmsync.v1.MigrationService", migrations),
        Service("warmsync.v1.HostService", host),
    ]
    server = await start_server(listen, services)
    fake.address = str(server.address)
    ready.set()
    while not stopped():  # noqa: ASYNC110 - the other side is a thread
        await asyncio.sleep(0.01)
    await server.stop(0)
