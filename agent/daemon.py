"""The agent as a process: one event loop, one server, one registry, a clean end.

Owns the life of the process and the claim to its state directory. Knows no migration.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import grpc.aio
import uvloop
from warmsync.v1 import host_service_pb2_grpc, migration_service_pb2_grpc

from agent import log
from agent.address import Address, parse_address
from agent.carrier.port import DataPort
from agent.config import AgentConfig, LimitsConfig
from agent.errors import FailedPrecondition, NotAllowed
from agent.registry import Registry
from agent.rpc.client import open_channel
from agent.rpc.host_service import HostServicer
from agent.rpc.migration_service import MigrationServicer
from agent.rpc.peer_client import PeerClient
from agent.rpc.peer_service import PeerServicer
from agent.rpc.peer_service import register as register_peers
from agent.rpc.server import AgentServer, Service, start_server
from agent.signer import open_signer

# For calls under way at the end; those that wait for a migration end with the registry.
STOP_GRACE_SECONDS = 2.0

SPARE_CALLS = 256
"""Calls that may be under way beside the watches and what migrations need."""
CALLS_A_MIGRATION = 4

_log = logging.getLogger(__name__)


def run(config: AgentConfig, *, log_level: str = "info", as_json: bool = False) -> None:
    """Serve until SIGTERM or SIGINT. Raises the domain's errors if it cannot start."""
    log.set_up(log_level, as_json=as_json)
    with (
        claim_state_dir(Path(config.state_dir)),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(serve(config, as_json=as_json))


async def serve(config: AgentConfig, *, as_json: bool = False) -> None:
    """Serve on this event loop until a signal comes."""
    stop = _stop_on_signals()
    # Now, not at a cutover, when it would be too late to mend it.
    signer = open_signer(Path(config.state_dir))
    registry = Registry(
        config,
        lambda address: PeerClient(
            lambda: open_channel(address, config.tls), address, tls=config.tls.is_on
        ),
        signer,
    )
    try:
        server = await start_server(
            config.listen, _services(config, registry), config.tls, max_calls(config.limits)
        )
    except BaseException:
        await registry.close()
        raise
    try:
        registry.data_port = open_data_port(config, server.address)
        registry.start()
        await registry.first_tries()
        _announce(server, config, as_json=as_json)
        _log.info("identity key=%s", signer.fingerprint)
        await stop.wait()
    finally:
        _log.info("stopping")
        # The registry first: it ends the streams that watch, which the server would wait for.
        await registry.close()
        if registry.data_port is not None:
            await registry.data_port.close()
        await server.stop(STOP_GRACE_SECONDS)
    _log.info("stopped")


def max_calls(limits: LimitsConfig) -> int:
    """Return how many calls may be under way at once."""
    return SPARE_CALLS + limits.max_watches + CALLS_A_MIGRATION * limits.max_migrations


def open_data_port(config: AgentConfig, address: Address) -> DataPort | None:
    """Listen for data connections beside the port for calls; None if there shall be none.

    FailedPrecondition DATA_PORT_UNUSABLE.
    """
    port = config.transfer.data_port
    if port < 0 or address.path:
        return None
    if port == 0 and parse_address(config.listen).port != 0:
        port = address.port + 1
    opened = DataPort(tls=config.tls.is_on)
    opened.listen(address.host, port)
    _log.info("data port=%s", opened.port)
    return opened


@contextmanager
def claim_state_dir(path: Path) -> Iterator[None]:
    """Make the directory if need be and hold it: two agents would take each other's trackers.

    NotAllowed STATE_DIR_UNUSABLE, FailedPrecondition STATE_DIR_IN_USE.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        message = f"state directory {path}: {error.strerror}; choose another with --state-dir"
        raise NotAllowed("STATE_DIR_UNUSABLE", message, path=path) from error
    try:
        _lock(lock, path)
        yield
    finally:
        os.close(lock)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"another agent uses {path}: stop it or give this one its own --state-dir"
        raise FailedPrecondition("STATE_DIR_IN_USE", message, path=path) from error


def _services(config: AgentConfig, registry: Registry) -> list[Service]:
    state_dir, sockets = Path(config.state_dir), config.qemu.sockets
    host = HostServicer(registry, state_dir, config.allow_devices, sockets)
    migrations, peers = MigrationServicer(registry), PeerServicer(registry)

    def add_host(server: grpc.aio.Server) -> None:
        host_service_pb2_grpc.add_HostServiceServicer_to_server(host, server)

    def add_migrations(server: grpc.aio.Server) -> None:
        migration_service_pb2_grpc.add_MigrationServiceServicer_to_server(migrations, server)

    def add_peers(server: grpc.aio.Server) -> None:
        register_peers(peers, server)

    return [
        Service("warmsync.v1.HostService", add_host),
        Service("warmsync.v1.MigrationService", add_migrations),
        Service("warmsync.v1.PeerService", add_peers),
    ]


def _stop_on_signals() -> asyncio.Event:
    """Return what the first SIGTERM or SIGINT sets; a second one ends the process at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def begin() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, begin)
    return stop


def _announce(server: AgentServer, config: AgentConfig, *, as_json: bool) -> None:
    """Say on stdout where it listens: scripts that ask for port 0 read it there."""
    address, tls = str(server.address), config.tls.is_on
    if as_json:
        click.echo(json.dumps({"event": "listening", "address": address, "tls": tls}))
    else:
        secured = "with mutual TLS" if tls else "without TLS (this host only)"
        click.echo(f"listening on {address} {secured}")
    if not config.allow_devices:
        _log.warning("no device is allowed: give --allow-device or allow_devices")
