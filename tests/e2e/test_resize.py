"""Migrations to larger disks: what is on them is grown in the cutover, or told why it was not."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import devices, filesystems
from tests.agent.resizing.disks import GROWTH_BYTES, Disk, source_bytes
from tests.agent.resizing.test_refusals import damage, programs, put
from tests.devices import LoopDevice
from tests.e2e import agents, disks
from tests.e2e.agents import ROOT, SECONDS, Agent, Pair, Shown
from tests.filesystems import MIB
from tests.native.tracking import bpffs

__all__ = ["programs"]

NAMES = {"ext4": "ext", "xfs": "xfs", "btrfs": "btrfs"}
DOOMED = """
from tests.agent.resizing import doomed
doomed.die_at({piece})
"""


@pytest.fixture
def move(loop_device: Callable[..., LoopDevice]) -> Callable[..., tuple[Disk, Disk]]:
    """A source with files in it, and a larger target of garbage that will hold the same."""

    def build(
        kind: str = "ext4", scheme: str = "none", sector_size: int = 512, growth: int = GROWTH_BYTES
    ) -> tuple[Disk, Disk]:
        devices.require(kind)
        size = source_bytes(kind, scheme)
        source = Disk(loop_device(size, sector_size).path, size, sector_size, kind, scheme)
        source.prepare()
        path = loop_device(size + growth, sector_size).path
        disks.soil(path, 2)
        target = Disk(path, size, sector_size, kind, scheme, source.start_bytes, source.files)
        return source, target

    return build


def cut_over(pair: Pair, *pairs: tuple[Disk, Disk], words: tuple[str, ...] = ()) -> Shown:
    name = converge(pair, *pairs, words=words)
    return pair.source.ask("cutover", name)


def converge(pair: Pair, *pairs: tuple[Disk, Disk], words: tuple[str, ...] = ()) -> str:
    volumes = [(a.path, b.path) for a, b in pairs]
    name = pair.start("--resize", "--max-downtime", "20s", *words, volumes=volumes)
    pair.source.wait(name, "CONVERGED")
    return name


def assert_grown(resize: Shown, target: Disk, growth: int = GROWTH_BYTES) -> None:
    assert resize["error"] is None
    assert resize["file_system"] == NAMES[target.kind]
    # A last group that is too small for its own tables, a whole number of MiB in a partition.
    least = growth - 8 * MIB
    assert resize["after_bytes"] >= resize["before_bytes"] + least
    end = disks.size_of(target.path)
    target.check(end if target.scheme == "none" else end // MIB * MIB)


@pytest.mark.parametrize(
    ("kind", "scheme", "sector_size"),
    [
        ("ext4", "none", 512),
        ("ext4", "none", 4096),
        ("ext4", "gpt", 512),
        ("ext4", "gpt", 4096),
        ("ext4", "mbr", 512),
        ("xfs", "none", 512),
        ("xfs", "gpt", 4096),
        ("btrfs", "none", 512),
    ],
)
def test_what_is_on_the_target_is_grown(
    pair: Pair, move: Callable[..., tuple[Disk, Disk]], kind: str, scheme: str, sector_size: int
) -> None:
    source, target = move(kind, scheme, sector_size)
    shown = cut_over(pair, (source, target))
    assert shown["state"] == "CUT_OVER"
    assert shown["resize"] is True
    [resize] = shown["resizes"]
    assert 0 < resize["seconds"] <= shown["downtime_parts"]["resize_seconds"]
    assert sum(shown["downtime_parts"].values()) <= shown["downtime_seconds"]
    assert disks.is_free(target.path)
    assert disks.is_fenced(source.path)
    assert_grown(resize, target)
    [theirs] = pair.target.show(shown["id"])["resizes"]
    assert theirs == resize
    pair.source.refuse("verify", shown["id"], reason="TARGET_RESIZED")


def test_without_being_asked_nothing_is_grown(
    pair: Pair, move: Callable[..., tuple[Disk, Disk]]
) -> None:
    source, target = move()
    name = pair.start("--max-downtime", "20s", volumes=[(source.path, target.path)])
    pair.source.wait(name, "CONVERGED")
    shown = pair.source.ask("cutover", name)
    assert (shown["resize"], shown["resizes"]) == (False, [])
    assert shown["downtime_parts"]["resize_seconds"] == 0
    disks.assert_equal(source.path, target.path)


def test_each_of_several_volumes_is_told_of(
    pair: Pair, move: Callable[..., tuple[Disk, Disk]]
) -> None:
    """One is grown, one has no room, one is damaged: it is not touched, and all are released."""
    pairs = [move(), move(growth=0), move("ext4", "none", 4096)]
    damage(pairs[2][0])
    shown = cut_over(pair, *pairs)
    grown, full, damaged = shown["resizes"]
    assert_grown(grown, pairs[0][1])
    assert full["error"] is None
    assert full["after_bytes"] == full["before_bytes"]
    assert damaged["error"]["reason"] == "FILE_SYSTEM_DAMAGED"
    for source, target in pairs[1:]:
        disks.assert_equal(source.path, target.path)
        assert disks.is_free(target.path)


def test_a_rollback_of_a_resized_target(pair: Pair, move: Callable[..., tuple[Disk, Disk]]) -> None:
    source, target = move()
    shown = cut_over(pair, (source, target))
    assert pair.source.ask("rollback", shown["id"])["state"] == "ROLLED_BACK"
    assert not disks.is_fenced(source.path)
    with source.file_system(source.old_end_bytes) as part:
        devices.run("e2fsck", "-f", "-n", part)


class Hosts:
    """Two agents on ports of their own; the target's can be killed and started again."""

    def __init__(self, directory: Path, pins: Path, stack: ExitStack) -> None:
        self._directory, self._pins, self._stack = directory, pins, stack
        self.source = self.start("source")

    def start(
        self,
        name: str,
        listen: str = "",
        command: tuple[str, ...] = (),
        settings: dict[str, Any] | None = None,
    ) -> Agent:
        running = agents.agent(
            name,
            self._directory,
            self._pins / name,
            listen=listen,
            command=command,
            settings=settings,
        )
        return self._stack.enter_context(running)

    def left(self) -> list[Path]:
        """Return what a resize has left in the target's state directory."""
        return list((self._directory / "target" / "resize").glob("*"))


@pytest.fixture
def hosts(tmp_path: Path, programs: Path, resources: ExitStack) -> Iterator[Hosts]:
    """Agents that find the programs of the test before those of the host."""
    devices.require("root", "loop", "bpf")
    with bpffs() as pins, ExitStack() as stack:
        yield Hosts(tmp_path, pins, stack)


def test_a_file_system_that_this_host_does_not_grow_any_more(
    hosts: Hosts, move: Callable[..., tuple[Disk, Disk]]
) -> None:
    source, target = move()
    before = hosts.start("target")
    name = converge(Pair(hosts.source, before), (source, target))
    before.stop()
    settings: dict[str, Any] = {"resize": {"file_systems": []}}
    pair = Pair(hosts.source, hosts.start("target", listen=before.address, settings=settings))
    agents.eventually(pair.target.log.read_text, lambda text: "session resumed" in text)
    [resize] = pair.source.ask("cutover", name)["resizes"]
    assert resize["error"]["reason"] == "GROW_NOT_ALLOWED"
    disks.assert_equal(source.path, target.path)
    pair.tidy()


def test_a_program_that_fails(
    hosts: Hosts, programs: Path, move: Callable[..., tuple[Disk, Disk]]
) -> None:
    source, target = move("ext4", "gpt")
    put(programs, "resize2fs", 'resize2fs "$@"; echo no more; exit 1')
    pair = Pair(hosts.source, hosts.start("target"))
    [resize] = cut_over(pair, (source, target))["resizes"]
    assert resize["error"]["reason"] == "GROW_FAILED"
    assert "no more" in resize["error"]["message"]
    disks.assert_equal(source.path, target.path)
    assert hosts.left() == []
    pair.tidy()


def await_file(path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_the_middle(pair: Pair, name: str) -> subprocess.Popen[str]:
    """Begin a cutover, of which the target will not see the end."""
    return pair.source.start("cutover", name)


def recover(hosts: Hosts, dead: Agent, name: str) -> Pair:
    """Start the target again; what is there is compared, and then the cutover goes well."""
    pair = Pair(hosts.source, hosts.start("target", listen=dead.address))
    shown = pair.source.wait(
        name, until=lambda now: now["state"] == "CONVERGED" and now["suspect_volumes"] > 0
    )
    assert shown["resizes"] == []
    return pair


@pytest.mark.parametrize("scheme", ["none", "gpt"])
def test_a_target_killed_while_a_program_runs(
    hosts: Hosts,
    programs: Path,
    tmp_path: Path,
    move: Callable[..., tuple[Disk, Disk]],
    scheme: str,
) -> None:
    source, target = move("ext4", scheme)
    ready = tmp_path / "ready"
    put(programs, "resize2fs", f'resize2fs "$@"; touch {ready}; exec sleep 1000')
    doomed = hosts.start("target")
    pair = Pair(hosts.source, doomed)
    name = converge(pair, (source, target))
    with in_the_middle(pair, name) as cutover:
        await_file(ready)
        assert disks.is_fenced(source.path)
        doomed.ends_well = False
        doomed.stop(signal.SIGKILL)
        (programs / "resize2fs").unlink()
        pair = recover(hosts, doomed, name)
        assert cutover.wait(SECONDS) == 1
    assert not disks.is_fenced(source.path)
    [resize] = pair.source.ask("cutover", name)["resizes"]
    assert_grown(resize, target)
    assert hosts.left() == []
    pair.tidy()
    pair.assert_clean()


@pytest.mark.parametrize("piece", [1, 5, 13])
def test_a_target_killed_while_it_writes(
    hosts: Hosts, tmp_path: Path, move: Callable[..., tuple[Disk, Disk]], piece: int
) -> None:
    """What it had overwritten is brought back, and is compared all the same."""
    source, target = move("ext4", "gpt")
    (tmp_path / "sitecustomize.py").write_text(DOOMED.format(piece=piece))
    doomed = hosts.start("target", command=("env", f"PYTHONPATH={tmp_path}:{ROOT}"))
    pair = Pair(hosts.source, doomed)
    name = converge(pair, (source, target))
    with in_the_middle(pair, name) as cutover:
        doomed.ends_well = False
        assert doomed.process.wait(SECONDS) == -signal.SIGKILL
        assert any(path.suffix == ".json" for path in hosts.left())
        pair = recover(hosts, doomed, name)
        assert cutover.wait(SECONDS) == 1
    assert "undid a resize" in pair.target.log.read_text()
    [resize] = pair.source.ask("cutover", name)["resizes"]
    assert_grown(resize, target)
    assert hosts.left() == []
    pair.tidy()


def test_a_source_that_goes_on_after_a_resize(
    hosts: Hosts, programs: Path, tmp_path: Path, move: Callable[..., tuple[Disk, Disk]]
) -> None:
    """The source's agent dies between the resize and the release; the guest is booted there again.

    What the target holds is not what was acknowledged: without a comparison it would be damaged.
    """
    source, target = move()
    ready, go = tmp_path / "ready", tmp_path / "go"
    waiting = f"touch {ready}; while [ ! -e {go} ]; do sleep 0.1; done"
    put(programs, "resize2fs", f'resize2fs "$@"; {waiting}')
    pair = Pair(hosts.source, hosts.start("target"))
    name = converge(pair, (source, target))
    with in_the_middle(pair, name) as cutover:
        await_file(ready)
        pair.source.ends_well = False
        pair.source.stop(signal.SIGKILL)
        go.touch()
        agents.eventually(
            lambda: pair.target.show(name)["resizes"], lambda resizes: len(resizes) == 1
        )
        assert cutover.wait(SECONDS) == 1
    assert disks.size_of(target.path) > target.data_bytes
    pair = Pair(hosts.start("source", listen=pair.source.address), pair.target)
    hosts.source = pair.source
    pair.source.wait(name, "CONVERGED")
    assert not disks.is_fenced(source.path)
    assert pair.target.show(name)["resizes"] == []
    with filesystems.opened(source.path, "ext4") as directory:
        (directory / "later").write_bytes(os.urandom(MIB))
        source.files.update(filesystems.digests(directory))
    [resize] = pair.source.ask("cutover", name, "--force")["resizes"]
    assert_grown(resize, target)
    pair.tidy()
