"""Nothing that others do makes an agent grow without bound: the table in docs/operations.md.

Watchers, pollers, strangers, a slow peer, dead sessions, a full state directory. The bounds are
generous: what is unbounded goes far beyond them.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub
from warmsync.v1 import migration_service_pb2 as pb
from warmsync.v1 import peer_service_pb2 as peers
from warmsync.v1.migration_service_pb2_grpc import MigrationServiceStub
from warmsync.v1.peer_service_pb2_grpc import PeerServiceStub

from agent.carrier.port import MAX_GREETINGS
from agent.config import LimitsConfig
from agent.daemon import max_calls
from agent.errors import Unavailable
from agent.migration import PROTOCOL_VERSION
from agent.rpc.errors import from_rpc_error
from tests import devices
from tests.devices import LoopDevice
from tests.e2e import agents, disks
from tests.e2e.agents import Agent, Pair, eventually
from tests.e2e.disks import MIB

SIZE = 16 * MIB
EASY = ("--max-downtime", "20s")
# Slow enough to be under way during a whole test.
SLOW = (*EASY, "--bandwidth-limit", "256K")
WATCHES = 40
MIGRATIONS = 8
STATE_DIR_BYTES = 2 * MIB


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds."""

    memory_bytes: int
    descriptors: int
    threads: int

    @classmethod
    def of(cls, agent: Agent) -> Held:
        proc = Path(f"/proc/{agent.process.pid}")
        status = dict(
            line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line
        )
        memory = int(status["VmRSS"].split()[0]) * 1024
        threads = int(status["Threads"])
        return cls(memory, len(list((proc / "fd").iterdir())), threads)


def assert_bounded(agent: Agent, before: Held, *, mib: int, descriptors: int, threads: int) -> None:
    """No more is held than before and so much beside."""
    now = Held.of(agent)
    assert now.memory_bytes <= before.memory_bytes + mib * MIB, (before, now)
    assert now.descriptors <= before.descriptors + descriptors, (before, now)
    assert now.threads <= before.threads + threads, (before, now)


@pytest.fixture
def pair(tmp_path: Path, resources: ExitStack) -> Iterator[Pair]:
    """Agents with small limits; the state directory of the source is a small file system."""
    devices.require("root", "loop")
    state = tmp_path / "source"
    state.mkdir()
    size = f"size={STATE_DIR_BYTES}"
    devices.run("mount", "-t", "tmpfs", "-o", size, "tmpfs", state)
    resources.callback(devices.run, "umount", state)
    pins = resources.enter_context(devices.scratch_directory())
    settings = {"limits": {"max_watches": WATCHES, "max_migrations": MIGRATIONS}}
    with ExitStack() as stack:
        both = [
            stack.enter_context(agents.agent(name, tmp_path, pins / name, settings=settings))
            for name in ("source", "target")
        ]
        made = Pair(*both)
        yield made
        made.tidy()


@pytest.fixture
def volume(loop_device: Callable[..., LoopDevice]) -> tuple[str, str]:
    source = loop_device(SIZE).path
    disks.soil(source, 1)
    return source, loop_device(SIZE).path


@contextmanager
def called(agent: Agent) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(agent.address) as channel:
        yield channel


def start(pair: Pair, volume: tuple[str, str], *words: str) -> str:
    return pair.start("--tracker", "scan", *words, volumes=[volume])


def test_watches(pair: Pair, volume: tuple[str, str]) -> None:
    """So many and no more; those that hang up make room; one that reads nothing costs nothing."""
    name = start(pair, volume, *SLOW)
    request = pb.WatchMigrationRequest(name=f"migrations/{name}")
    with called(pair.source) as channel:
        stub = MigrationServiceStub(channel)
        # Its threads and connections for the round are there then.
        eventually(lambda: pair.source.show(name)["bytes_sent"], bool)
        before = Held.of(pair.source)
        for _ in range(3):
            # Those of the turn before have hung up, and are noticed one after the other.
            watches = eventually(lambda: open_watches(stub, request), bool)
            with pytest.raises(grpc.RpcError) as caught:
                next(stub.WatchMigration(request))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert from_rpc_error(caught.value).reason == "TOO_MANY_WATCHES"
            # Nobody reads any more: what is not read must not pile up in the agent.
            at = pair.source.show(name)["bytes_sent"]
            eventually(lambda: pair.source.show(name)["bytes_sent"], lambda now: now > at)  # noqa: B023
            assert_bounded(pair.source, before, mib=48, descriptors=8, threads=8)
            for watch in watches:
                watch.cancel()
    pair.source.ask("cancel", name)


def open_watches(stub: MigrationServiceStub, request: pb.WatchMigrationRequest) -> list[Any]:
    """Return as many watches as there may be, which have been answered; none if one was refused."""
    watches = [stub.WatchMigration(request) for _ in range(WATCHES)]
    try:
        assert {next(watch).migration.name for watch in watches} == {request.name}
    except grpc.RpcError:
        for watch in watches:
            watch.cancel()
        return []
    return watches


def test_polls(pair: Pair, volume: tuple[str, str]) -> None:
    """Thousands of calls, one after the other and all at once: answered, or refused and typed."""
    name = start(pair, volume, *SLOW)
    request = pb.GetMigrationRequest(name=f"migrations/{name}")
    listing = pb.ListMigrationsRequest()
    with called(pair.source) as channel:
        stub = MigrationServiceStub(channel)
        for _ in range(200):  # what is made once
            stub.GetMigration(request)
        before = Held.of(pair.source)
        for _ in range(1500):
            stub.GetMigration(request)
            stub.ListMigrations(listing)
        assert_bounded(pair.source, before, mib=16, descriptors=8, threads=8)
        calls = [stub.GetMigration.future(request) for _ in range(3000)]
        reasons = {from_rpc_error(call.exception()).reason for call in calls if call.exception()}
        assert reasons <= {"TOO_MANY_CALLS", "CALL_CANCELLED"}  # gRPC's own queue is short, too
        assert_bounded(pair.source, before, mib=48, descriptors=8, threads=8)
        assert stub.GetMigration(request).name == request.name
    pair.source.ask("cancel", name)


def test_calls_that_do_not_end(pair: Pair) -> None:
    """The health service's watches, which anybody may hold: so many calls and no more."""
    most = max_calls(LimitsConfig(max_migrations=MIGRATIONS, max_watches=WATCHES))
    before = Held.of(pair.source)
    with called(pair.source) as channel:
        stub: Any = HealthStub(channel)
        watches = [stub.Watch(HealthCheckRequest()) for _ in range(most)]
        for watch in watches:
            next(watch)
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Watch(HealthCheckRequest()))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = from_rpc_error(caught.value)
        assert (type(error), error.reason) == (Unavailable, "TOO_MANY_CALLS")
        assert_bounded(pair.source, before, mib=48, descriptors=8, threads=8)
        for watch in watches:
            watch.cancel()
    eventually(lambda: pair.source.run("list").code, lambda code: code == 0)


def test_sessions_that_come_to_nothing(pair: Pair, loop_device: Callable[..., LoopDevice]) -> None:
    """A thousand that are opened and given up; and more at once than there may be."""
    targets = [loop_device(MIB).path for _ in range(MIGRATIONS + 1)]
    with called(pair.target) as channel:
        stub = PeerServiceStub(channel)

        def open_session(number: int, path: str) -> str:
            given = peers.SessionVolume(
                source="/dev/x", target=path, size_bytes=MIB, block_size_bytes=4096
            )
            secret = f"the secret of session {number}"
            stub.OpenSession(
                peers.OpenSessionRequest(
                    migration_id=f"dead-{number}",
                    protocol_version=PROTOCOL_VERSION,
                    boot_id="another",
                    volumes=[given],
                    session_secret=secret,
                    epoch=1,
                )
            )
            return f"{secret}/1"

        def give_up(token: str) -> None:
            stub.AbortSession(peers.AbortSessionRequest(session_token=token, reason="test"))

        give_up(open_session(0, targets[0]))
        before = Held.of(pair.target)
        for number in range(1, 1000):
            give_up(open_session(number, targets[0]))
        assert_bounded(pair.target, before, mib=16, descriptors=8, threads=8)
        tokens = [open_session(number, path) for number, path in enumerate(targets[:MIGRATIONS])]
        with pytest.raises(grpc.RpcError) as caught:
            open_session(MIGRATIONS, targets[MIGRATIONS])
        assert from_rpc_error(caught.value).reason == "TOO_MANY_MIGRATIONS"
        for token in tokens:
            give_up(token)
    assert pair.target.held() == []
    assert pair.target.ask("list")["migrations"] == []


def test_strangers_at_the_data_port(pair: Pair) -> None:
    """Connections that say nothing: a few are waited for, the others are hung up on."""
    port = int(pair.target.log.read_text().partition("data port=")[2].split()[0])
    before = Held.of(pair.target)
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        pair.target.ask("list")
        assert_bounded(
            pair.target,
            before,
            mib=16,
            descriptors=2 * MAX_GREETINGS + 8,
            threads=MAX_GREETINGS + 8,
        )
    eventually(lambda: Held.of(pair.target).descriptors, lambda now: now <= before.descriptors + 8)


@pytest.mark.parametrize("carrier", ["tcp", "grpc"])
def test_a_peer_that_takes_nothing(
    pair: Pair, loop_device: Callable[..., LoopDevice], carrier: str
) -> None:
    """What is read ahead is bounded, however much there is to send."""
    size = 320 * MIB
    source, target = loop_device(size).path, loop_device(size).path
    disks.soil(source, 1)
    before = Held.of(pair.source)
    name = start(pair, (source, target), *EASY, "--carrier", carrier, "--bandwidth-limit", "1M")
    pair.source.wait(name, "SEEDING", until=lambda now: now["bytes_sent"] > 0)
    pair.target.process.send_signal(signal.SIGSTOP)
    try:
        pair.source.ask("update", name, "--bandwidth-limit", "0")
        # Until as much was taken as there is room for: then nothing moves any more.
        seen = [-1]
        eventually(lambda: moved(pair, name, seen), lambda still: still >= 25)
        assert_bounded(pair.source, before, mib=128, descriptors=16, threads=32)
    finally:
        pair.target.process.send_signal(signal.SIGCONT)
    pair.source.wait(name, "CONVERGED")
    pair.source.ask("cancel", name)


def moved(pair: Pair, name: str, seen: list[int]) -> int:
    """Return how many looks ago bytes were last sent."""
    now = pair.source.show(name)["bytes_sent"]
    seen[:] = [*seen, now] if now == seen[-1] else [now]
    return len(seen)


def fill(directory: Path) -> Path:
    """Leave not a byte free."""
    path = directory / "filler"
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return path


def test_a_full_state_directory(pair: Pair, volume: tuple[str, str], tmp_path: Path) -> None:
    """Refused and typed, nothing entered that was not written down, no crash; then it goes on."""
    state = tmp_path / "source"
    filler = fill(state)
    before = Held.of(pair.source)
    for _ in range(10):
        answer = pair.source.run(*pair.migrate("--tracker", "scan", volumes=[volume]))
        assert (answer.code, answer.error["reason"]) in {
            (1, "STATE_NOT_KEPT"),
            (1, "STATE_DIR_FULL"),
        }
    assert_bounded(pair.source, before, mib=16, descriptors=8, threads=16)
    assert pair.source.held() == pair.target.held() == []
    filler.unlink()
    name = start(pair, volume, *EASY)
    pair.source.wait(name, "CONVERGED")
    # A thousand writes of the journal, in a place smaller than SQLite lets its log grow by default.
    with called(pair.source) as channel:
        stub = MigrationServiceStub(channel)
        for number in range(1000):
            changed = pb.UpdateMigrationRequest()
            changed.migration.name = f"migrations/{name}"
            changed.migration.max_downtime_seconds = 20 + number % 2
            stub.UpdateMigration(changed)
    assert sum(path.stat().st_size for path in state.glob("journal.db*")) < MIB
    filler = fill(state)
    # The log that is there may have room for it; entered is only what was written down.
    answer = pair.source.run("pause", name)
    assert answer.code == 0 or answer.error["reason"] == "STATE_NOT_KEPT"
    assert (pair.source.show(name)["state"] == "PAUSED") == (answer.code == 0)
    filler.unlink()
    if answer.code == 0:
        pair.source.ask("resume", name)
    pair.source.wait(name, "CONVERGED")
    assert pair.source.ask("cutover", name)["state"] == "CUT_OVER"
    disks.assert_equal(*volume)
    assert os.statvfs(state).f_bavail > 0
