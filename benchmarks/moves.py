"""Migrations to measure: started, watched, handed over, and always undone again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import grpc
from google.protobuf.json_format import ParseDict
from warmsync.v1 import migration_pb2 as pb
from warmsync.v1 import migration_service_pb2 as service_pb
from warmsync.v1.migration_service_pb2_grpc import MigrationServiceStub

from benchmarks.agents import Agent
from benchmarks.contender import OURS, Contender, Copied

_POLL_SECONDS = 0.2
"""Coarse, as looking costs both ends: times come from the migration's history."""
_ENDED = (pb.STATE_FAILED, pb.STATE_CANCELLED)


class Move:
    """A migration that was started."""

    def __init__(self, stub: MigrationServiceStub, name: str, created_seconds: float) -> None:
        self._stub = stub
        self._name = name
        self._created = created_seconds

    def look(self) -> pb.Migration:
        """Return the migration now; RuntimeError if it has failed."""
        found: pb.Migration = self._stub.GetMigration(
            service_pb.GetMigrationRequest(name=self._name)
        )
        if found.state in _ENDED:
            raise RuntimeError(f"the migration ended: {found.error.message}")
        return found

    def wait(
        self,
        ready: Callable[[pb.Migration], bool],
        timeout_seconds: float,
        poll_seconds: float = _POLL_SECONDS,
    ) -> pb.Migration:
        """Look until `ready`; TimeoutError when it takes too long."""
        deadline = time.monotonic() + timeout_seconds
        while not ready(found := self.look()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not there after {timeout_seconds} s: {found}")
            time.sleep(poll_seconds)
        return found

    def seed_seconds(self, timeout_seconds: float = 600) -> float:
        """Return the time from the request to the end of round 0, durable on the target."""
        found = self.wait(
            lambda one: one.progress.rounds > 0 and _entered(one, pb.STATE_SYNCING) > 0,
            timeout_seconds,
        )
        return _entered(found, pb.STATE_SYNCING) - self._created

    def copy_seconds(self) -> float:
        """Return the time of round 0, which is done, without what came before it."""
        found = self.look()
        return _entered(found, pb.STATE_SYNCING) - _entered(found, pb.STATE_SEEDING)

    def converged_seconds(self, timeout_seconds: float = 600) -> float:
        """Return the time from the request to when it first was CONVERGED."""
        found = self.wait(lambda one: _entered(one, pb.STATE_CONVERGED) > 0, timeout_seconds)
        return _entered(found, pb.STATE_CONVERGED) - self._created

    def pause(self) -> None:
        """Stop carrying; tracking goes on."""
        self._stub.PauseMigration(service_pb.PauseMigrationRequest(name=self._name))

    def resume(self) -> None:
        """Go on where the pause began."""
        self._stub.ResumeMigration(service_pb.ResumeMigrationRequest(name=self._name))

    def cut_over(self) -> pb.Migration:
        """Return when the target is durable and released, the source fenced."""
        request = service_pb.CutOverMigrationRequest(name=self._name, force=True)
        done: pb.Migration = self._stub.CutOverMigration(request)
        return done

    def undo(self) -> None:
        """Leave the source as it was found: not fenced, not tracked."""
        state = self.look().state
        if state == pb.STATE_CUT_OVER:
            self._stub.RollBackMigration(service_pb.RollBackMigrationRequest(name=self._name))
        else:
            self._stub.CancelMigration(service_pb.CancelMigrationRequest(name=self._name))


@contextmanager
def migration(
    sender: Agent,
    receiver: Agent,
    source: str,
    target: str,
    *,
    compress: bool | None = None,
    cold: bool = False,
) -> Iterator[Move]:
    """A migration of one volume; cancelled or rolled back at the end. `compress`: None: unsaid.

    `cold`: the VM is off, and it is cut over at once.
    """
    asked = pb.Migration(
        peer=receiver.address,
        volumes=[pb.Volume(source=source, target=target)],
        tracker=pb.TRACKER_EBPF,
        max_downtime_seconds=0.5,
        cold=cold,
    )
    _choose(asked, compress)
    with sender.channel() as channel:
        stub = MigrationServiceStub(channel)
        # Before the clock starts: a controller has its connection open.
        grpc.channel_ready_future(channel).result(timeout=20)
        created = time.time()
        made = stub.CreateMigration(service_pb.CreateMigrationRequest(migration=asked))
        move = Move(stub, made.name, created)
        try:
            yield move
        except BaseException:
            with suppress(grpc.RpcError, RuntimeError):  # what went wrong first is what matters
                move.undo()
            raise
        move.undo()


def contender(sender: Agent, receiver: Agent) -> Contender:
    """Ours: from the request to the end of round 0, durable on the target."""

    def copy(source: str, target: str) -> Copied:
        sent, received = sender.cpu_seconds(), receiver.cpu_seconds()
        with migration(sender, receiver, source, target) as move:
            seconds = move.seed_seconds()
            used = sender.cpu_seconds() - sent, receiver.cpu_seconds() - received
            carrier = pb.Carrier.Name(move.look().carrier).removeprefix("CARRIER_").lower()
        return Copied(seconds, *used, f"carrier {carrier}")

    return Contender(OURS, copy)


def _choose(asked: pb.Migration, compress: bool | None) -> None:
    """Say in a request how the data is to travel; the agents choose the carrier.

    A build that cannot compress has no such field: it is measured as it is.
    """
    if compress is not None and "compression" in asked.DESCRIPTOR.fields_by_name:
        # By name: such a build's enum is not in this one's types.
        ParseDict({"compression": f"COMPRESSION_{'ZSTD' if compress else 'NONE'}"}, asked)


def is_handed_over(found: pb.Migration) -> bool:
    """Whether the target owns the disk."""
    return bool(found.state == pb.STATE_CUT_OVER)


def _entered(found: pb.Migration, state: int) -> float:
    """Return when it first was in a state, in seconds since the epoch; 0 if it was not yet."""
    for step in found.history:
        if step.state == state:
            return float(step.time.seconds) + step.time.nanos / 1e9
    return 0.0
