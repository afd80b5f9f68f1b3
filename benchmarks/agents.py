"""Agents to measure: real processes of the product, driven over gRPC, always ended again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from warmsync.v1 import migration_pb2 as pb
from warmsync.v1 import migration_service_pb2 as service_pb
from warmsync.v1.migration_service_pb2_grpc import MigrationServiceStub

from benchmarks.devices import scratch_directory

TRACKERS = {"ebpf": pb.TRACKER_EBPF, "scan": pb.TRACKER_SCAN}
_POLL_SECONDS = 0.05
_STOP_SECONDS = 20.0
_ENDED = (pb.STATE_FAILED, pb.STATE_CANCELLED)


@dataclass(frozen=True, slots=True)
class Agent:
    """A running agent."""

    address: str
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """Return the processor time it has used, in user and kernel mode."""
        return cpu_seconds(self.process)

    def resident_bytes(self) -> int:
        """Return its resident memory now."""
        return int(self.process.memory_info().rss)

    def peak_bytes(self) -> int:
        """Return the most resident memory it has had (VmHWM)."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
        raise RuntimeError(f"process {self.process.pid} does not say its peak")


def cpu_seconds(process: psutil.Process) -> float:
    """Return the processor time a process has used, in user and kernel mode."""
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def agent(*devices: str) -> Iterator[Agent]:
    """An agent on a free port of the loopback, which may touch these devices only."""
    with scratch_directory() as directory, (directory / "log").open("w+") as log:
        command = [sys.executable, "-m", "agent", "agent", "--listen", "127.0.0.1:0", "--insecure"]
        command += ["--json", "--log-level", "warning", "--state-dir", str(directory / "state")]
        for device in devices:
            command += ["--allow-device", device]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
            try:
                yield Agent(_announced(process, log.name), psutil.Process(process.pid))
            finally:
                _stop(process)


@contextmanager
def pair(source: str, target: str) -> Iterator[tuple[Agent, Agent]]:
    """Two agents, each with its own device."""
    with agent(source) as sending, agent(target) as receiving:
        yield sending, receiving


class Move:
    """A migration that was started; cancelled at the end, so that the source stays as it is."""

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

    def wait(self, ready: Callable[[pb.Migration], bool], timeout_seconds: float) -> pb.Migration:
        """Look until `ready`; RuntimeError when it takes too long."""
        deadline = time.monotonic() + timeout_seconds
        while not ready(found := self.look()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not there after {timeout_seconds} s: {found}")
            time.sleep(_POLL_SECONDS)
        return found

    def seed_seconds(self, timeout_seconds: float = 600) -> float:
        """Return the time from the request to the end of round 0, durable on the target."""
        found = self.wait(lambda one: one.progress.rounds > 0 and _synced(one) > 0, timeout_seconds)
        return _synced(found) - self._created


@contextmanager
def migration(
    sender: Agent, receiver: Agent, source: str, target: str, tracker: str = "ebpf"
) -> Iterator[Move]:
    """A migration of one volume with a budget that is never met by chance."""
    asked = pb.Migration(
        peer=receiver.address,
        volumes=[pb.Volume(source=source, target=target)],
        tracker=TRACKERS[tracker],
        max_downtime_seconds=0.5,
    )
    with grpc.insecure_channel(sender.address) as channel:
        stub = MigrationServiceStub(channel)
        created = time.time()
        made = stub.CreateMigration(service_pb.CreateMigrationRequest(migration=asked))
        cancel = service_pb.CancelMigrationRequest(name=made.name)
        try:
            yield Move(stub, made.name, created)
        except BaseException:
            with suppress(grpc.RpcError):  # what went wrong first is what matters
                stub.CancelMigration(cancel)
            raise
        stub.CancelMigration(cancel)


def _synced(found: pb.Migration) -> float:
    """Return when it first was SYNCING, in seconds since the epoch; 0 if it was not yet."""
    for step in found.history:
        if step.state == pb.STATE_SYNCING:
            return float(step.time.seconds) + step.time.nanos / 1e9
    return 0.0


def _announced(process: subprocess.Popen[str], log: str) -> str:
    if process.stdout is None:
        raise RuntimeError("the agent has no standard output")
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the agent did not start: {Path(log).read_text()}")
    return str(json.loads(line)["address"])


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
