"""A source end without a network: a carrier and a peer that do as the test tells them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent import disk as disk_module
from agent.bell import Bell
from agent.brake import Brake
from agent.carrier import Carrier, CarrierRequest
from agent.certificate import Signature
from agent.certificate.statement import parse_statement
from agent.disk import SourceDisk, open_source
from agent.errors import WarmsyncError
from agent.journal import Journal
from agent.migration import Depth, Plan, Resize, Role, Scheme, Volume
from agent.peer import DiskSize, Proof, Resumed, SessionRequest, TargetProof, Unread
from agent.record import SourceRecord
from agent.sender import Sender, Workshop
from agent.signer import Signer
from agent.source import SourceMigration
from agent.source.cutover import Cutover
from agent.source.prepared import Prepared
from agent.source.proof import SourceProof
from agent.tracker import Take
from agent.tracker.memory import MemoryTracker
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer, BufferPool
from native.frame import MAX_PAYLOAD_BYTES, inspect, scatter

BLOCK = 4096
SIZE = (1 << 20) + 4096

Hook = Callable[[], None]

SIGNER = Signer(Ed25519PrivateKey.generate())


class FakeCarrier:
    """Applies frames to image files. `events` is what happened, in order."""

    name = "grpc"
    detail = ""

    def __init__(self, targets: list[Path]) -> None:
        self._targets = targets
        self.devices = [BlockDevice(str(path), writable=True) for path in targets]
        self.durable = 0
        self.events: list[str] = []
        self.frames: list[bytes] = []
        self.before: dict[str, Hook] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.reached = Bell()
        self.flush_seconds = 0.0
        self.failure: WarmsyncError | None = None
        self.closed = False

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def send(self, frame: bytes) -> None:
        await self._enter("send")
        self.frames.append(frame)
        header = inspect(frame)
        device = self.devices[header.volume]
        scratch = AlignedBuffer(MAX_PAYLOAD_BYTES)
        size, volume = device.size_bytes(), header.volume
        scatter(
            device, frame, scratch, size_bytes=size, volume=volume, generation=header.generation
        )

    async def flush(self, generation: int) -> float:
        await self._enter(f"flush {generation}")
        self.durable = generation
        return self.flush_seconds

    async def close(self) -> None:
        self.closed = True
        for device in self.devices:
            device.close()

    def reopen(self) -> None:
        """Serve a source that has come back."""
        if self.closed:
            self.devices = [BlockDevice(str(path), writable=True) for path in self._targets]
            self.closed, self.failure = False, None

    def hold(self, event: str) -> asyncio.Event:
        """Let the next `event` wait until the returned gate is set."""
        self.gates[event] = asyncio.Event()
        return self.gates[event]

    async def until(self, event: str) -> None:
        while event not in self.events:
            await self.reached.wait(self.reached.count)

    async def _enter(self, event: str) -> None:
        self.events.append(event)
        self.reached.ring()
        if hook := self.before.pop(event, None):
            hook()
        if gate := self.gates.get(event):
            await gate.wait()


class FakePeer:
    """Remembers what it is asked; raises `errors[call]`, one after the other."""

    address = "target:7070"

    def __init__(self, carrier: FakeCarrier) -> None:
        self.carrier = carrier
        self.calls: list[str] = []
        self.requests: list[SessionRequest] = []
        self.errors: dict[str, list[Exception]] = defaultdict(list)
        self.gates: dict[str, asyncio.Event] = {}
        self.before: dict[str, Hook] = {}
        self.heard = Bell()
        self.released = False
        self.resizes: tuple[Resize, ...] = ()
        self.proofs = tuple(Proof(0, b"") for _ in carrier.devices)

    async def measure(self, targets: Sequence[str]) -> list[DiskSize]:
        await self._answer("measure")
        return [DiskSize(device.size_bytes(), 512) for device in self.carrier.devices]

    async def open_session(self, request: SessionRequest) -> None:
        self.requests.append(request)
        await self._answer("open_session")

    async def resume(self, secret: str, epoch: int) -> Resumed:
        await self._answer("resume", f"resume {epoch}")
        return Resumed(self.carrier.durable, self.released)

    async def open_carrier(self, token: str, request: CarrierRequest) -> Carrier:
        await self._answer("open_carrier")
        self.carrier.reopen()
        return self.carrier

    async def digests(self, token: str, volume: int) -> AsyncIterator[tuple[int, bytes]]:
        await self._answer("digests")
        nothing: tuple[tuple[int, bytes], ...] = ()
        for item in nothing:
            yield item

    async def unread(self, token: str) -> Unread:
        await self._answer("unread")
        return Unread(0, 1e9)

    async def prove(self, token: str, generation: int) -> TargetProof:
        await self._answer("prove", f"prove {generation}")
        return TargetProof(self.proofs, "there", "1.0")

    async def resize(self, token: str, generation: int) -> tuple[Resize, ...]:
        await self._answer("resize", f"resize {generation}")
        return self.resizes

    async def release(
        self, token: str, generation: int, statement: bytes, signature: Signature
    ) -> Signature:
        await self._answer("release", f"release {generation}")
        return SIGNER.sign(parse_statement(statement), Role.TARGET)

    async def abort(self, token: str, reason: str, *, cancelled: bool) -> None:
        await self._answer("abort", f"abort {'cancelled' if cancelled else 'failed'}: {reason}")

    async def boot(self, token: str, attempt: int) -> float:
        await self._answer("boot", f"boot {attempt}")
        return 0.5

    async def reclaim(self, token: str) -> None:
        await self._answer("reclaim")

    async def finish(self, token: str) -> None:
        await self._answer("finish")

    async def close(self) -> None:
        self.calls.append("close")

    async def until(self, call: str) -> None:
        while not any(heard.startswith(call) for heard in self.calls):
            await self.heard.wait(self.heard.count)

    async def _answer(self, call: str, said: str = "") -> None:
        self.calls.append(said or call)
        self.heard.ring()
        if hook := self.before.pop(call, None):
            hook()
        if gate := self.gates.get(call):
            await gate.wait()
        if self.errors[call]:
            raise self.errors[call].pop(0)


class WatchedTracker(MemoryTracker):
    """A memory tracker that tells whether it was stopped, and fails when told to."""

    def __init__(self, size_bytes: int, block_size_bytes: int) -> None:
        super().__init__(size_bytes, block_size_bytes)
        self.stopped = False
        self.take_error: Exception | None = None

    def take(self, into: DirtyBitmap) -> Take:
        if self.take_error:
            raise self.take_error
        return super().take(into)

    def stop(self) -> None:
        self.stopped = True


@dataclass
class Source:
    """A source end with all its parts in hand."""

    workshop: Workshop
    images: list[Path]
    targets: list[Path]
    disks: list[SourceDisk]
    carrier: FakeCarrier
    peer: FakePeer
    plan: Plan
    journal: Journal = field(default_factory=lambda: Journal(None))
    _sender: Sender | None = field(default=None)

    @property
    def trackers(self) -> list[WatchedTracker]:
        trackers = [disk.tracker for disk in self.disks]
        return [tracker for tracker in trackers if isinstance(tracker, WatchedTracker)]

    def sender(self) -> Sender:
        """Return a sender that is ready to send."""
        if self._sender is None:
            self._sender = Sender(self.disks, self.workshop, 0)
            self._sender.use(self.carrier)
        return self._sender

    def cutover(self) -> Cutover:
        """Return an attempt to hand over, on what was sent with `sender`."""
        sender = self.sender()
        proof = SourceProof(self.plan, sender, self.workshop)
        return Cutover(
            sender,
            self.peer,
            lambda: "token",
            prove=lambda: proof.prove(self.peer, "token", 0.0),
            signer=SIGNER,
            resize=self.plan.resize,
        )

    def migration(
        self, brake: Brake | None = None, *, restored: SourceRecord | None = None
    ) -> SourceMigration:
        """Return the migration, not yet started; `restored`: of an agent before this one."""
        request = SessionRequest(self.plan.id, 1, "boot", self.plan.volumes, ())
        prepared = Prepared(
            self.plan,
            Scheme.SCAN,
            "",
            self.disks,
            self.peer,
            "secret",
            request,
            SIGNER,
            brake,
            restored=restored,
        )
        return SourceMigration(prepared, self.workshop, self.journal)

    def write(self, offset: int, data: bytes, volume: int = 0) -> None:
        """Write as the guest does; the tracker learns of it."""
        with self.images[volume].open("r+b") as file:
            file.seek(offset)
            file.write(data)
        self.trackers[volume].mark(offset, len(data))

    def equal(self) -> bool:
        """Return whether every target equals its source."""
        pairs = zip(self.images, self.targets, strict=True)
        return all(one.read_bytes() == other.read_bytes() for one, other in pairs)

    def is_open(self) -> bool:
        """Return whether a source device is still open."""
        for disk in self.disks:
            try:
                disk.device.fileno()
            except ValueError:
                continue
            return True
        return False

    def is_fenced(self) -> bool:
        """Return whether a source is read-only."""
        return not all(path.stat().st_mode & 0o200 for path in self.images)


@contextmanager
def source(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    volumes: int = 1,
    verify: Depth = Depth.NONE,
) -> Iterator[Source]:
    """Make images, trackers that are told of writes, a carrier and a peer."""
    monkeypatch.setattr(
        disk_module,
        "make_tracker",
        lambda scheme, device, block, pins, store, *, size_bytes: WatchedTracker(size_bytes, block),
    )
    images = [directory / f"source{i}.img" for i in range(volumes)]
    targets = [directory / f"target{i}.img" for i in range(volumes)]
    for i, (image, target) in enumerate(zip(images, targets, strict=True)):
        image.write_bytes(bytes([i + 1]) * SIZE)
        target.write_bytes(bytes(SIZE))
    plan = Plan(
        "web1",
        "target:7070",
        tuple(Volume(str(a), str(b)) for a, b in zip(images, targets, strict=True)),
        verify=verify,
    )
    with ThreadPoolExecutor(4) as threads:
        pool = BufferPool(MAX_PAYLOAD_BYTES, 4)
        opened = [open_source(volume, tuple(map(str, images))) for volume in plan.volumes]
        disks = [SourceDisk(one, Scheme.EBPF, BLOCK, directory, verify=verify) for one in opened]
        carrier = FakeCarrier(targets)
        try:
            for disk in disks:
                disk.start()
            made = Source(
                Workshop(threads, pool, 4),
                images,
                targets,
                disks,
                carrier,
                FakePeer(carrier),
                plan,
            )
            yield made
        finally:
            for disk in disks:
                disk.close()
            for device in carrier.devices:
                device.close()
            pool.close()


async def until(bell: Bell, condition: Callable[[], bool]) -> None:
    """Wait for a migration to change until it is as wanted."""
    while not condition():
        await bell.wait(bell.count)
