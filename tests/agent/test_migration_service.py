"""MigrationService as a controller sees it: over gRPC, with targets that are fakes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from warmsync.v1 import migration_pb2 as pb
from warmsync.v1 import migration_service_pb2 as service
from warmsync.v1.migration_service_pb2_grpc import (
    MigrationServiceStub,
    add_MigrationServiceServicer_to_server,
)

from agent.errors import FailedPrecondition, InvalidArgument, NotFound, WarmsyncError
from agent.rpc.client import open_channel
from agent.rpc.errors import calling
from agent.rpc.migration_service import MigrationServicer
from agent.rpc.server import Service, start_server
from tests.agent.carriers.rig import request as rig_request
from tests.agent.registry.hosts import Host, hosting
from tests.agent.rpc_helpers import run

Steps = Callable[[Host, Any], Coroutine[Any, Any, None]]
WEB1 = "migrations/web1"
LIMIT = "bandwidth_limit_bytes_per_second"


def trial(directory: Path, steps: Steps, **limits: int) -> None:
    """Run `steps(host, stub)`."""

    async def main() -> None:
        async with hosting(directory, **limits) as host:
            servicer = MigrationServicer(host.registry)

            def add(server: Any) -> None:
                add_MigrationServiceServicer_to_server(servicer, server)

            server = await start_server("127.0.0.1:0", [Service("x", add)])
            try:
                async with open_channel(str(server.address)) as channel:
                    await steps(host, MigrationServiceStub(channel))
            finally:
                await server.stop(0)

    run(main)


async def create(host: Host, stub: Any, name: str = "web1", image: str = "a") -> pb.Migration:
    volume = pb.Volume(source=str(host.images[image]), target=str(host.targets[image]))
    wanted = pb.Migration(peer="target:7070", volumes=[volume], tracker=pb.TRACKER_SCAN)
    request = service.CreateMigrationRequest(migration_id=name, migration=wanted)
    migration: pb.Migration = await stub.CreateMigration(request)
    return migration


async def refused(call: Any) -> WarmsyncError:
    with pytest.raises(WarmsyncError) as caught, calling("agent"):
        await call
    return caught.value


def update(paths: list[str], **values: Any) -> service.UpdateMigrationRequest:
    wanted = pb.Migration(name=WEB1, **values)
    return service.UpdateMigrationRequest(migration=wanted, update_mask=FieldMask(paths=paths))


def test_create_get_and_delete(tmp_path: Path) -> None:
    async def steps(host: Host, stub: Any) -> None:
        made = await create(host, stub)
        assert (made.name, made.state, made.role) == (WEB1, pb.STATE_PENDING, pb.ROLE_SOURCE)
        assert made.volumes[0].size_bytes == 4 << 20
        got = await stub.GetMigration(service.GetMigrationRequest(name=WEB1))
        assert got.create_time == made.create_time
        early = await refused(stub.DeleteMigration(service.DeleteMigrationRequest(name=WEB1)))
        assert isinstance(early, FailedPrecondition)
        assert early.reason == "NOT_ENDED"
        ended = await stub.CancelMigration(service.CancelMigrationRequest(name=WEB1))
        assert ended.state == pb.STATE_CANCELLED
        await stub.DeleteMigration(service.DeleteMigrationRequest(name=WEB1))
        gone = await refused(stub.GetMigration(service.GetMigrationRequest(name=WEB1)))
        assert isinstance(gone, NotFound)

    trial(tmp_path, steps)


def test_an_id_is_chosen(tmp_path: Path) -> None:
    async def steps(host: Host, stub: Any) -> None:
        made = await create(host, stub, name="")
        assert made.name.startswith("migrations/m-")

    trial(tmp_path, steps)


def test_updates_follow_their_mask(tmp_path: Path) -> None:
    limit, budget = "bandwidth_limit_bytes_per_second", "max_downtime_seconds"

    async def steps(host: Host, stub: Any) -> None:
        await create(host, stub)
        both: dict[str, Any] = {limit: 1000, budget: 2.5}
        after = await stub.UpdateMigration(update([limit], **both))
        assert (after.bandwidth_limit_bytes_per_second, after.max_downtime_seconds) == (1000, 0.5)
        after = await stub.UpdateMigration(update([budget], **both))
        assert (after.bandwidth_limit_bytes_per_second, after.max_downtime_seconds) == (1000, 2.5)
        # In the mask and not set: the default, which for the limit is none.
        after = await stub.UpdateMigration(update([limit]))
        assert after.bandwidth_limit_bytes_per_second == 0
        # Without a mask, what is set.
        after = await stub.UpdateMigration(update([], max_downtime_seconds=1.5))
        assert (after.bandwidth_limit_bytes_per_second, after.max_downtime_seconds) == (0, 1.5)

    trial(tmp_path, steps)


@pytest.mark.parametrize(
    ("paths", "values", "reason"),
    [
        (["peer"], {"peer": "elsewhere:1"}, "IMMUTABLE_FIELD"),
        (["nonsense"], {}, "IMMUTABLE_FIELD"),
        (["max_downtime_seconds"], {}, "INVALID_BUDGET"),
        (
            ["bandwidth_limit_bytes_per_second"],
            {"bandwidth_limit_bytes_per_second": -5},
            "INVALID_LIMIT",
        ),
    ],
)
def test_updates_that_make_no_sense(
    tmp_path: Path, paths: list[str], values: dict[str, Any], reason: str
) -> None:
    async def steps(host: Host, stub: Any) -> None:
        before = await create(host, stub)
        error = await refused(stub.UpdateMigration(update(paths, **values)))
        assert isinstance(error, InvalidArgument)
        assert error.reason == reason
        after = await stub.GetMigration(service.GetMigrationRequest(name=WEB1))
        assert after.max_downtime_seconds == before.max_downtime_seconds
        assert after.peer == before.peer

    trial(tmp_path, steps)


def test_an_update_stays_within_the_configuration(tmp_path: Path) -> None:
    async def steps(host: Host, stub: Any) -> None:
        await create(host, stub)
        for asked, given in ((7, 7), (1 << 40, 5000), (0, 5000)):
            change = update(
                ["bandwidth_limit_bytes_per_second"], bandwidth_limit_bytes_per_second=asked
            )
            after = await stub.UpdateMigration(change)
            assert after.bandwidth_limit_bytes_per_second == given

    trial(tmp_path, steps, bandwidth_bytes_per_second=5000)


def test_pages(tmp_path: Path) -> None:
    async def steps(host: Host, stub: Any) -> None:
        for name in "cab":
            await create(host, stub, name=name, image=name)

        async def page(size: int, token: str = "") -> tuple[list[str], str]:
            request = service.ListMigrationsRequest(page_size=size, page_token=token)
            answer = await stub.ListMigrations(request)
            return [one.name[-1] for one in answer.migrations], answer.next_page_token

        assert await page(0) == (["a", "b", "c"], "")
        first, token = await page(2)
        assert (first, bool(token)) == (["a", "b"], True)
        assert await page(2, token) == (["c"], "")
        assert await page(3) == (["a", "b", "c"], "")
        assert await page(5000) == (["a", "b", "c"], "")
        assert await page(2, "99") == ([], "")
        for size, token in ((-1, ""), (1, "x"), (1, "-1")):
            request = service.ListMigrationsRequest(page_size=size, page_token=token)
            assert isinstance(await refused(stub.ListMigrations(request)), InvalidArgument)

    trial(tmp_path, steps)


def test_a_watch_begins_with_the_present_and_ends_with_the_end(tmp_path: Path) -> None:
    """Level-triggered: states in between may be skipped, the last never."""

    async def steps(host: Host, stub: Any) -> None:
        await create(host, stub)
        watch = stub.WatchMigration(service.WatchMigrationRequest(name=WEB1))
        answers = aiter(watch)
        first = (await anext(answers)).migration
        assert (first.name, first.state) == (WEB1, pb.STATE_PENDING)
        migration = host.registry.get_source("web1")
        for _ in range(500):  # nobody is told 500 times
            migration.bell.ring()
        await stub.CancelMigration(service.CancelMigrationRequest(name=WEB1))
        seen = [answer.migration.state async for answer in answers]
        assert seen[-1] == pb.STATE_CANCELLED
        assert len(seen) < 10
        # Of one that has ended: one message.
        again = stub.WatchMigration(service.WatchMigrationRequest(name=WEB1))
        assert [a.migration.state async for a in again] == [pb.STATE_CANCELLED]

    trial(tmp_path, steps)


def test_a_watch_that_hangs_up_leaves_nothing(tmp_path: Path) -> None:
    async def steps(host: Host, stub: Any) -> None:
        await create(host, stub)
        before = len(asyncio.all_tasks())
        watch = stub.WatchMigration(service.WatchMigrationRequest(name=WEB1))
        await watch.read()
        watch.cancel()
        for _ in range(200):
            if len(asyncio.all_tasks()) <= before:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the watch goes on without its caller")

    trial(tmp_path, steps)


def test_unknown_names(tmp_path: Path) -> None:
    async def steps(host: Host, stub: Any) -> None:
        for method, request in (
            (stub.GetMigration, service.GetMigrationRequest),
            (stub.PauseMigration, service.PauseMigrationRequest),
            (stub.CutOverMigration, service.CutOverMigrationRequest),
            (stub.DeleteMigration, service.DeleteMigrationRequest),
        ):
            assert isinstance(await refused(method(request(name=WEB1))), NotFound)
            assert isinstance(await refused(method(request(name="web1"))), InvalidArgument)
        watch = stub.WatchMigration(service.WatchMigrationRequest(name=WEB1))
        assert isinstance(await refused(watch.read()), NotFound)

    trial(tmp_path, steps)


def test_illegal_commands_change_nothing(tmp_path: Path) -> None:
    async def steps(host: Host, stub: Any) -> None:
        await create(host, stub)
        for method, request in (
            (stub.ResumeMigration, service.ResumeMigrationRequest),
            (stub.RollBackMigration, service.RollBackMigrationRequest),
            (stub.FinishMigration, service.FinishMigrationRequest),
            (stub.CutOverMigration, service.CutOverMigrationRequest),
        ):
            assert isinstance(await refused(method(request(name=WEB1))), FailedPrecondition)
        verify = stub.VerifyMigration(service.VerifyMigrationRequest(name=WEB1))
        assert (await refused(verify.read())).reason == "NOT_COMPARABLE"
        after = await stub.GetMigration(service.GetMigrationRequest(name=WEB1))
        assert after.state == pb.STATE_PENDING

    trial(tmp_path, steps)


def test_settle_is_asked_for_a_source_or_a_target(tmp_path: Path) -> None:
    async def steps(host: Host, stub: Any) -> None:
        await create(host, stub)
        for owner in (pb.OWNER_UNSPECIFIED, pb.OWNER_NOBODY):
            request = service.SettleMigrationRequest(name=WEB1, owner=owner)
            assert (await refused(stub.SettleMigration(request))).reason == "INVALID_OWNER"
        request = service.SettleMigrationRequest(name=WEB1, owner=pb.OWNER_SOURCE)
        assert (await refused(stub.SettleMigration(request))).reason == "ILLEGAL_TRANSITION"
        unknown = service.SettleMigrationRequest(name="migrations/x", owner=pb.OWNER_SOURCE)
        assert (await refused(stub.SettleMigration(unknown))).reason == "MIGRATION_NOT_FOUND"

    trial(tmp_path, steps)


def test_settle_at_either_end(tmp_path: Path) -> None:
    async def steps(host: Host, stub: Any) -> None:
        await host.registry.open_session(rig_request([host.targets["b"]]))
        request = service.SettleMigrationRequest(name=WEB1, owner=pb.OWNER_SOURCE)
        settled = await stub.SettleMigration(request)
        assert (settled.role, settled.state) == (pb.ROLE_TARGET, pb.STATE_CANCELLED)

    trial(tmp_path, steps)
