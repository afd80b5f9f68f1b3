from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from warmsync.v1 import host_service_pb2, host_service_pb2_grpc

from agent import inventory
from agent.inventory import list_devices
from agent.migration import Totals
from agent.rpc.client import open_channel
from agent.rpc.host_service import HostServicer
from agent.rpc.server import Service, start_server
from tests.agent.rpc_helpers import run


def picture(root: Path, name: str, sectors: int, **files: str) -> Path:
    """Draw a disk as sysfs shows it."""
    disk = root / "devices" / name
    (disk / "queue").mkdir(parents=True)
    (disk / "queue/logical_block_size").write_text("4096\n")
    (disk / "size").write_text(f"{sectors}\n")
    (disk / "ro").write_text("0\n")
    for file, text in files.items():
        (disk / file).write_text(text)
    (root / "block").mkdir(exist_ok=True)
    (root / "block" / name).symlink_to(disk)
    return disk


@pytest.fixture
def sys_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    users = {"/dev/fakeb": ["mounted at /mnt", "held by dm-0"]}
    monkeypatch.setattr(inventory, "known_users", lambda path: users.get(path, []))
    disk = picture(tmp_path, "fakea", 2048)
    part = disk / "fakea1"
    part.mkdir()
    for file, text in {"size": "1024", "ro": "0", "partition": "1"}.items():
        (part / file).write_text(text)
    (tmp_path / "block/fakea1").symlink_to(part)
    picture(tmp_path, "fakeb", 8, ro="1\n")
    picture(tmp_path, "fakec", 0)
    picture(tmp_path, "fake!c0d0", 8)
    (tmp_path / "block/fakegone").symlink_to(tmp_path / "unplugged")
    return tmp_path / "block"


def test_allowed_devices_are_listed(sys_block: Path) -> None:
    found = {
        device.path: device for device in list_devices(("/dev/fake*", "/dev/fake/*"), sys_block)
    }
    assert sorted(found) == ["/dev/fake/c0d0", "/dev/fakea", "/dev/fakea1", "/dev/fakeb"]
    assert found["/dev/fakea"].size_bytes == 2048 * 512
    assert found["/dev/fakea1"].size_bytes == 1024 * 512
    assert found["/dev/fakea1"].logical_block_size_bytes == 4096
    assert found["/dev/fakeb"].read_only
    assert found["/dev/fakeb"].in_use_by == "mounted at /mnt, held by dm-0"
    assert not found["/dev/fakea"].read_only
    assert found["/dev/fakea"].in_use_by == ""


def test_other_devices_are_not_shown(sys_block: Path) -> None:
    assert list_devices((), sys_block) == []
    assert [device.path for device in list_devices(("/dev/fakeb",), sys_block)] == ["/dev/fakeb"]


def test_links_are_shown_by_the_name_that_is_allowed(
    sys_block: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "_aliases", lambda: {"/dev/fakea": ["/dev/x/y", "/dev/vg/lv"]})
    (device,) = list_devices(("/dev/vg/*",), sys_block)
    assert device.path == "/dev/vg/lv"


def test_links_under_dev_are_found() -> None:
    for target, links in inventory._aliases().items():
        assert all(os.path.realpath(link) == target for link in links)


def test_a_real_device(loop_device: Any) -> None:
    device = loop_device(8 << 20, sector_size=4096)
    (found,) = list_devices((device.path,))
    assert found.size_bytes == 8 << 20
    assert found.logical_block_size_bytes == 4096
    assert (found.read_only, found.in_use_by) == (False, "")


class Registry:
    def totals(self) -> Totals:
        return Totals(3, 2, 1, 4096)


def test_the_host_over_grpc(tmp_path: Path) -> None:
    servicer = HostServicer(Registry(), tmp_path, ("/dev/*",))

    def register(server: Any) -> None:
        host_service_pb2_grpc.add_HostServiceServicer_to_server(servicer, server)

    async def main() -> Any:
        server = await start_server("127.0.0.1:0", [Service("warmsync.v1.HostService", register)])
        async with open_channel(str(server.address)) as channel:
            stub = host_service_pb2_grpc.HostServiceStub(channel)
            host = await stub.GetHost(host_service_pb2.GetHostRequest())
            devices = await stub.ListDevices(host_service_pb2.ListDevicesRequest())
        await server.stop(0)
        return host, devices

    host, devices = run(main)
    assert (host.hostname, host.kernel) == (os.uname().nodename, os.uname().release)
    assert host.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert {check.name for check in host.checks} >= {"kernel", "btf", "privileges"}
    assert all(check.status for check in host.checks)
    totals = host.totals
    assert (totals.migrations_started, totals.migrations_cut_over) == (3, 2)
    assert (totals.migrations_failed, totals.sent_bytes) == (1, 4096)
    assert len(devices.devices) == len(list_devices(("/dev/*",)))
