"""A target agent in this process, and a source's connection to it."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import threading
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trustme

from agent.bell import Bell
from agent.carrier import Carrier, CarrierRequest
from agent.carrier.port import DataPort
from agent.config import AgentConfig, TlsConfig
from agent.migration import PROTOCOL_VERSION, CarrierKind, Role, Volume
from agent.peer import Peer, SessionRequest, session_token
from agent.registry import Registry
from agent.rpc.client import open_channel
from agent.rpc.peer_client import PeerClient
from agent.rpc.peer_service import PeerServicer, register
from agent.rpc.server import AgentServer, Service, start_server
from agent.target import TargetSession
from native.blockio import BlockDevice
from native.buffer import AlignedBuffer
from native.frame import gather
from tests.agent.certificates import signer

CARRIERS = ("grpc", "tcp", "tcp-tls")
"""Every carrier joins here and in `Rig.open_carrier`."""

BLOCK = 4096
SECRET = "the secret of a test"
SIZE = 4 << 20


@dataclass
class Rig:
    """The target agent with one session open, and the client of its source."""

    kind: str
    registry: Registry
    server: AgentServer
    peer: PeerClient
    token: str
    targets: list[Path]
    opened: list[BlockDevice] = field(default_factory=list)

    @property
    def session(self) -> TargetSession:
        return self.registry.session(self.token)

    async def vanish(self) -> None:
        """Let the target be gone, without a word, as when its process dies."""
        await self.server.stop(0)
        self.session._intake.stop()

    async def open_carrier(
        self, token: str | None = None, *, source: Path | None = None, compress: bool = False
    ) -> Carrier:
        """Open a carrier. What `send_marked` reads is `source`, for each volume."""
        sources = [BlockDevice(str(source or target)) for target in self.targets]
        self.opened += sources
        request = CarrierRequest(
            devices=sources,
            digests=[None for _ in sources],
            kind=CarrierKind(self.kind.partition("-")[0]),
            connections=3,
            compress=compress,
        )
        return await self.peer.open_carrier(self.token if token is None else token, request)


@asynccontextmanager
async def rig(
    kind: str, directory: Path, targets: list[Path], **changes: object
) -> AsyncIterator[Rig]:
    """Start the agent, open a session for `targets` of SIZE bytes each; all ends with the block.

    `changes`: see `request`.
    """
    allowed = tuple(str(path) for path in targets)
    config = AgentConfig(
        state_dir=tempfile.mkdtemp(prefix="state-", dir=directory),
        bpffs_dir=str(directory),
        allow_devices=allowed,
    )
    registry = Registry(config, _no_peer, signer(Role.TARGET))
    service = Service("warmsync.v1.PeerService", lambda s: register(PeerServicer(registry), s))
    tls = certificates(directory) if kind == "tcp-tls" else TlsConfig()
    server = await start_server("127.0.0.1:0", [service], tls)
    address = f"localhost:{server.address.port}"
    peer = PeerClient(lambda: open_channel(address, tls), address, tls=tls.is_on)
    registry.data_port = DataPort(tls=tls.is_on)
    registry.data_port.listen("127.0.0.1", 0)
    try:
        await peer.open_session(request(targets, **changes))
        token = session_token(SECRET, 1)
        made = Rig(kind, registry, server, peer, token, targets)
        try:
            yield made
        finally:
            for device in made.opened:
                device.close()
    finally:
        await peer.close()
        await server.stop(0)
        await registry.close()
        await registry.data_port.close()


def certificates(directory: Path) -> TlsConfig:
    """Return files of one agent that is its own controller and peer."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    files = TlsConfig(*(str(directory / name) for name in ("cert.pem", "key.pem", "ca.pem")))
    issued.cert_chain_pems[0].write_to_path(files.cert)
    issued.private_key_pem.write_to_path(files.key)
    authority.cert_pem.write_to_path(files.ca)
    return files


def is_cut(session: TargetSession) -> bool:
    """Return whether a session's stream has ended, for a reason: its source may come back."""
    return session.snapshot().refusal is not None and not session.state.is_terminal


def request(targets: list[Path], **changes: object) -> SessionRequest:
    """Return what a source on another host asks for."""
    values: dict[str, object] = {
        "migration_id": "web1",
        "protocol_version": PROTOCOL_VERSION,
        "boot_id": "another host",
        "volumes": tuple(Volume(f"/src/{i}", str(t), SIZE, BLOCK) for i, t in enumerate(targets)),
        "source_identities": tuple(() for _ in targets),
        "secret": SECRET,
    }
    return SessionRequest(**{**values, **changes})  # type: ignore[arg-type]


def image(directory: Path, name: str, seed: int | None = None) -> Path:
    """Return an image file of SIZE bytes: zeros, or noise of a seed."""
    path = directory / name
    path.write_bytes(random.Random(seed).randbytes(SIZE) if seed else bytes(SIZE))
    return path


def frame_of(
    source: Path, offset: int, length: int, *, volume: int = 0, generation: int = 1, number: int = 1
) -> bytes:
    """Return a frame of one extent of the source."""
    with BlockDevice(str(source)) as device:
        extents = array("Q", [offset, length])
        return gather(
            device,
            extents,
            AlignedBuffer(length),
            volume=volume,
            generation=generation,
            sequence=number,
        )


def frames_of(source: Path, step: int, *, volume: int = 0, generation: int = 1) -> list[bytes]:
    """Return frames of `step` bytes each that hold the whole source."""
    return [
        frame_of(source, at, step, volume=volume, generation=generation, number=at // step)
        for at in range(0, SIZE, step)
    ]


async def until(bell: Bell, condition: Callable[[], bool]) -> None:
    """Wait for a migration to change until it is as wanted."""
    while not condition():
        await bell.wait(bell.count)


def tasks() -> set[str]:
    """Return the coroutines that tasks of this loop run, but the present one."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    return {repr(task.get_coro()) for task in others}


def descriptors() -> list[str]:
    """Return what the open descriptors of this process are."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(_kind(os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:  # the one of the listing itself
            continue
    return sorted(found)


def threads() -> list[str]:
    """Return the names of the living threads."""
    return sorted(thread.name for thread in threading.enumerate())


def _kind(link: str) -> str:
    """Return what sort of thing a descriptor is: `socket:[123]` is a socket whatever its number."""
    return link.partition("[")[0] if link.startswith(("socket:", "pipe:")) else link


def _no_peer(address: str) -> Peer:
    raise AssertionError(f"a target calls nobody, but called {address}")
