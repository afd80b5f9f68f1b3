"""A guest that writes faster than can be sent, slowed through a real cgroup (v1)."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import cgroups, devices, host
from tests.cgroups import BlkioCgroup
from tests.devices import LoopDevice
from tests.e2e import agents, disks
from tests.e2e.agents import Pair, Shown, eventually
from tests.e2e.conftest import running_pair
from tests.e2e.disks import MIB
from tests.e2e.test_errors import refused
from tests.guest import boot, destroy, power_off

SIZE = 8 * MIB
LEAST = MIB // 2
ALLOW = ("--allow-cgroup", f"{host.BLKIO}/warmsync-test-*")
WRITER = ("--rw=randwrite", "--bs=4096", "--rate=40m", "--time_based", "--runtime=600")
STALLING = ("--tracker", "ebpf", "--bandwidth-limit", "2M", "--max-downtime", "1s")
"""The guest dirties the whole disk in each round, which takes four seconds to send."""


@pytest.fixture
def throttling(tmp_path: Path, resources: ExitStack) -> Iterator[Pair]:
    devices.require("blkio")
    with running_pair(tmp_path, *ALLOW) as pair:
        yield pair


@pytest.fixture
def volume(loop_device: Callable[..., LoopDevice], throttling: Pair) -> tuple[str, str]:
    source, target = loop_device(SIZE).path, loop_device(SIZE).path
    disks.soil(target, 2)
    return source, target


@pytest.fixture
def cgroup(resources: ExitStack) -> BlkioCgroup:
    return resources.enter_context(cgroups.blkio_cgroup())


@pytest.fixture
def guest(
    resources: ExitStack, cgroup: BlkioCgroup, volume: tuple[str, str]
) -> subprocess.Popen[str]:
    """A guest in the cgroup that writes faster than can be sent."""
    process = boot(volume[0], *WRITER)
    resources.callback(destroy, process)
    cgroup.adopt(process.pid)
    return process


def asking(cgroup: BlkioCgroup) -> tuple[str, ...]:
    return ("--guest-cgroup", str(cgroup.path), "--guest-least-rate", str(LEAST))


@pytest.fixture
def slowed(
    throttling: Pair, volume: tuple[str, str], cgroup: BlkioCgroup, guest: subprocess.Popen[str]
) -> str:
    """A migration whose guest is slowed."""
    name = throttling.start(*STALLING, *asking(cgroup), volumes=[volume])
    shown = throttling.source.wait(name, until=lambda now: limit_of(now) > 0)
    assert LEAST <= limit_of(shown) <= 8 * MIB
    assert list(cgroup.limits()) == [cgroups.number_of(volume[0])]
    return name


def limit_of(shown: Shown) -> int:
    return int(shown["guest_limit_bytes_per_second"])


def test_it_converges_and_the_limit_stays_until_the_cutover(
    throttling: Pair,
    volume: tuple[str, str],
    cgroup: BlkioCgroup,
    guest: subprocess.Popen[str],
    slowed: str,
) -> None:
    source = throttling.source
    shown = source.wait(slowed, "CONVERGED")
    assert cgroup.limits() == {cgroups.number_of(volume[0]): limit_of(shown)}
    assert shown["guest_throttle"] == {
        "cgroup": str(cgroup.path),
        "least_bytes_per_second": LEAST,
    }
    power_off(guest)
    done = source.ask("cutover", slowed, "--force")
    assert (done["state"], limit_of(done)) == ("CUT_OVER", 0)
    assert cgroup.limits() == {}
    disks.assert_equal(*volume)
    source.ask("finish", slowed)


def test_a_pause_lifts_it(throttling: Pair, cgroup: BlkioCgroup, slowed: str) -> None:
    throttling.source.ask("pause", slowed)
    eventually(cgroup.limits, lambda limits: limits == {})
    throttling.source.wait(slowed, until=lambda now: limit_of(now) == 0)
    throttling.source.ask("resume", slowed)
    throttling.source.wait(slowed, until=lambda now: limit_of(now) > 0)
    assert throttling.source.ask("cancel", slowed)["state"] == "CANCELLED"
    assert cgroup.limits() == {}


def test_an_operators_limit_comes_back(
    throttling: Pair,
    volume: tuple[str, str],
    cgroup: BlkioCgroup,
    guest: subprocess.Popen[str],
) -> None:
    disk = cgroups.number_of(volume[0])
    cgroup.set(disk, 30 * MIB)
    name = throttling.start(*STALLING, *asking(cgroup), volumes=[volume])
    throttling.source.wait(name, until=lambda now: limit_of(now) > 0)
    assert cgroup.limits()[disk] < 30 * MIB
    throttling.source.ask("cancel", name)
    assert cgroup.limits() == {disk: 30 * MIB}


def test_the_agent_is_stopped(throttling: Pair, cgroup: BlkioCgroup, slowed: str) -> None:
    throttling.source.ends_well = False  # it leaves its tracker, for the next start
    assert throttling.source.stop() == 0
    assert cgroup.limits() == {}


def test_the_agent_is_killed_and_started_again(
    throttling: Pair,
    cgroup: BlkioCgroup,
    guest: subprocess.Popen[str],
    slowed: str,
    tmp_path: Path,
) -> None:
    dead, before = throttling.source, cgroup.limits()
    dead.ends_well = False
    assert dead.stop(signal.SIGKILL) == -signal.SIGKILL
    assert len(before) == len(cgroup.limits()) == 1
    assert guest.poll() is None
    # Allowed no more: what was done is undone all the same.
    with agents.agent("source", tmp_path, dead.pins) as again:
        assert cgroup.limits() == {}
        assert f"lifted a guest's limit that an earlier agent left behind id={slowed}" in (
            again.said()
        )
        again.ask("cancel", slowed)
    assert list((tmp_path / "source" / "brakes").iterdir()) == []


@pytest.mark.usefixtures("guest")
def test_refused_before_anything_starts(
    throttling: Pair,
    volume: tuple[str, str],
    cgroup: BlkioCgroup,
    image_file: Callable[..., Path],
    resources: ExitStack,
) -> None:
    def refuse(path: Path | str, reason: str, least: str = "1M", code: int = 1) -> str:
        words = ("--guest-cgroup", str(path), "--guest-least-rate", least)
        answer = refused(throttling, *words, volumes=[volume], reason=reason, code=code)
        return str(answer.error["message"])

    assert "--allow-cgroup" in refuse(host.BLKIO, "CGROUP_NOT_ALLOWED")
    refuse(cgroup.path / "below", "CGROUP_NOT_ALLOWED")
    refuse(f"{cgroup.path}-gone", "CGROUP_NOT_FOUND")
    empty = resources.enter_context(cgroups.blkio_cgroup())
    assert "nothing runs" in refuse(empty.path, "CGROUP_EMPTY")
    refuse("blkio/vm", "USAGE", code=2)
    refuse(cgroup.path, "USAGE", least="0", code=2)
    for half in (asking(cgroup)[:2], asking(cgroup)[2:]):
        refused(throttling, *half, volumes=[volume], reason="USAGE", code=2)
    files = [(image_file(SIZE), volume[1])]
    refused(throttling, *asking(cgroup), volumes=files, reason="THROTTLE_UNSUITABLE")
    assert cgroup.limits() == {}


def test_partitions_of_one_disk_in_two_migrations(
    throttling: Pair, cgroup: BlkioCgroup, loop_device: Callable[..., LoopDevice]
) -> None:
    """Their limits would be one: the second is refused; without the throttle it is not."""
    disk = loop_device(2 * SIZE + MIB, partitions=True)
    targets = [loop_device(SIZE + MIB).path for _ in range(2)]
    volumes = list(zip(disk.partitions, targets, strict=True))
    with cgroups.resident(cgroup):
        first = throttling.start(*asking(cgroup), volumes=[volumes[0]])
        words = throttling.migrate(*asking(cgroup), volumes=[volumes[1]])
        answer = throttling.source.refuse(*words, reason="DEVICE_IN_MIGRATION")
        assert answer.error["values"]["id"] == first
        assert str(cgroup.path) in answer.error["message"]
        throttling.start(volumes=[volumes[1]])
    throttling.tidy()
    throttling.assert_clean()
