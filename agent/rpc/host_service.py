"""HostService: what this host is and can do."""

from __future__ import annotations

import asyncio
import platform
import socket
from pathlib import Path
from typing import Any, Protocol

from warmsync.v1 import host_service_pb2, host_service_pb2_grpc

from agent import doctor
from agent.device import boot_id
from agent.inventory import list_devices
from agent.migration import Totals
from agent.version import agent_version

_STATUS = {
    doctor.Verdict.OK: host_service_pb2.CHECK_STATUS_OK,
    doctor.Verdict.WARNING: host_service_pb2.CHECK_STATUS_WARNING,
    doctor.Verdict.MISSING: host_service_pb2.CHECK_STATUS_MISSING,
}


class Totaled(Protocol):
    """What has totals: the registry."""

    def totals(self) -> Totals:
        """Return the totals of this host."""


class HostServicer(host_service_pb2_grpc.HostServiceServicer):
    """Serves the doctor's findings, the totals and the devices."""

    def __init__(
        self,
        registry: Totaled,
        state_dir: Path,
        allowed: tuple[str, ...],
        qmp_sockets: tuple[str, ...] = (),
    ) -> None:
        self._registry = registry
        self._host = doctor.Host(state_dir, qmp_sockets=qmp_sockets)
        self._allowed = allowed

    async def GetHost(self, request: Any, context: Any) -> host_service_pb2.GetHostResponse:  # noqa: ARG002, N802
        """Answer with facts, checks and totals."""
        checks = await asyncio.to_thread(doctor.examine, self._host)
        totals = self._registry.totals()
        return host_service_pb2.GetHostResponse(
            hostname=socket.gethostname(),
            boot_id=boot_id(),
            kernel=platform.release(),
            version=agent_version(),
            checks=[_check(check) for check in checks],
            totals=host_service_pb2.Totals(
                migrations_started=totals.migrations_started,
                migrations_cut_over=totals.migrations_cut_over,
                migrations_failed=totals.migrations_failed,
                sent_bytes=totals.sent_bytes,
                moved_bytes=totals.moved_bytes,
                downtime_seconds=totals.downtime_seconds,
                downtime_saved_seconds=totals.downtime_saved_seconds,
            ),
        )

    async def ListDevices(self, request: Any, context: Any) -> host_service_pb2.ListDevicesResponse:  # noqa: ARG002, N802
        """Answer with the block devices that the configuration allows."""
        devices = await asyncio.to_thread(list_devices, self._allowed)
        return host_service_pb2.ListDevicesResponse(
            devices=[
                host_service_pb2.Device(
                    path=device.path,
                    size_bytes=device.size_bytes,
                    logical_block_size_bytes=device.logical_block_size_bytes,
                    read_only=device.read_only,
                    in_use_by=device.in_use_by,
                )
                for device in devices
            ]
        )


def _check(check: doctor.Check) -> host_service_pb2.Check:
    return host_service_pb2.Check(
        name=check.name,
        status=_STATUS[check.verdict],
        finding=check.finding,
        mend=check.mend,
    )
