"""An agent that is gone for good after a cutover: a person says at the other one who owns."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.journal import Journal
from tests import content
from tests.devices import LoopDevice, require
from tests.e2e import disks
from tests.e2e.disks import MIB
from tests.e2e.hosts import Hosts
from tests.native.tracking import bpffs

SIZE = 16 * MIB
EASY = ("--max-downtime", "20s")


@pytest.fixture
def hosts(tmp_path: Path, resources: ExitStack) -> Iterator[Hosts]:
    require("root", "loop", "bpf")
    with bpffs() as pins, ExitStack() as stack:
        yield Hosts(tmp_path, pins, stack)


@pytest.fixture
def volume(loop_device: Callable[..., LoopDevice]) -> tuple[str, str]:
    source, target = loop_device(SIZE).path, loop_device(SIZE).path
    content.fill(source, 1)
    return source, target


def cut_over(hosts: Hosts, volume: tuple[str, str]) -> str:
    name = hosts.pair.start(*EASY, volumes=[volume])
    hosts.source.wait(name, "CONVERGED")
    assert hosts.source.ask("cutover", name)["state"] == "CUT_OVER"
    return name


def test_the_target_has_lost_its_state(
    hosts: Hosts, volume: tuple[str, str], tmp_path: Path
) -> None:
    name = cut_over(hosts, volume)
    said = hosts.source.refuse("settle", name, "--owner", "source", reason="OWNER_KNOWN")
    assert "roll back or finish" in said.error["message"]
    hosts.end("target", signal.SIGKILL)
    shutil.rmtree(tmp_path / "target")
    hosts.start("target")
    for command in ("finish", "rollback"):
        hosts.source.refuse(command, name, reason="SESSION_NOT_FOUND")
    hosts.source.refuse("delete", name, reason="NOT_ENDED")
    shown = hosts.source.ask("settle", name, "--owner", "source")
    assert (shown["state"], shown["owner"]) == ("ROLLED_BACK", "source")
    assert not disks.is_fenced(volume[0])
    disks.assert_writable(volume[0])
    # The next agent leaves the disk of the VM that was booted here alone.
    hosts.end("source", signal.SIGKILL)
    hosts.start("source")
    assert not disks.is_fenced(volume[0])
    disks.assert_writable(volume[0])
    assert hosts.source.show(name)["state"] == "ROLLED_BACK"
    hosts.source.ask("delete", name)
    again = cut_over(hosts, volume)
    disks.assert_equal(*volume)
    hosts.source.ask("rollback", again)
    hosts.pair.tidy()
    hosts.pair.assert_clean()


def test_the_source_has_lost_its_state(
    hosts: Hosts, volume: tuple[str, str], loop_device: Callable[..., LoopDevice], tmp_path: Path
) -> None:
    name = cut_over(hosts, volume)
    hosts.end("source", signal.SIGKILL)
    shutil.rmtree(tmp_path / "source")
    hosts.start("source")
    for command in ("cancel", "finish"):
        said = hosts.target.refuse(command, name, reason="NOT_THE_SOURCE")
        assert "warmsync settle" in said.error["message"]
    hosts.target.refuse("delete", name, reason="NOT_ENDED")
    shown = hosts.target.ask("settle", name, "--owner", "target")
    assert (shown["state"], shown["owner"]) == ("COMPLETED", "target")
    # What runs here now can be moved on.
    onward = volume[1], loop_device(SIZE).path
    words = ("--peer", hosts.source.address, "--volume", ":".join(onward))
    again = hosts.target.ask("migrate", *words, *EASY)["id"]
    hosts.target.wait(again, "CONVERGED")
    assert hosts.target.ask("cutover", again)["state"] == "CUT_OVER"
    disks.assert_equal(*onward)
    hosts.target.ask("finish", again)
    hosts.target.ask("delete", name)


def test_a_host_that_comes_back_after_all(hosts: Hosts, volume: tuple[str, str]) -> None:
    """It says what it knows; once it is settled there too, nothing is left."""
    name = cut_over(hosts, volume)
    hosts.end("target", signal.SIGKILL)
    assert hosts.source.ask("settle", name, "--owner", "source")["owner"] == "source"
    assert f"owner settled by a person id={name} owner=source was=CUT_OVER" in (
        hosts.source.log.read_text()
    )
    hosts.start("target")
    shown = hosts.target.show(name)
    assert (shown["state"], shown["owner"]) == ("CUT_OVER", "target")
    assert hosts.source.show(name)["owner"] == "source"
    shown = hosts.target.ask("settle", name, "--owner", "source")
    assert (shown["state"], shown["owner"]) == ("ROLLED_BACK", "source")
    hosts.pair.tidy()
    again = cut_over(hosts, volume)
    disks.assert_equal(*volume)
    hosts.source.ask("rollback", again)
    hosts.pair.tidy()
    hosts.pair.assert_clean()


def forget_the_answer(directory: Path) -> None:
    """Let a source's journal be as it was when its agent was killed in the release."""
    journal = Journal(directory)
    try:
        ((role, name, record),) = journal.load()
        assert record["history"][-1]["state"] == "CUT_OVER"
        assert record["releasing"]
        journal.save(role, name, {**record, "history": record["history"][:-1]})
    finally:
        journal.close()


@pytest.mark.parametrize("owner", ["source", "target"])
def test_a_release_that_is_never_answered(
    hosts: Hosts, volume: tuple[str, str], tmp_path: Path, owner: str
) -> None:
    name = cut_over(hosts, volume)
    for who in ("source", "target"):
        hosts.end(who, signal.SIGKILL)
    forget_the_answer(tmp_path / "source")
    shutil.rmtree(tmp_path / "target")
    disks.unfence(volume[0])  # as a reboot does
    hosts.start("source")
    assert disks.is_fenced(volume[0])
    shown = hosts.source.show(name)
    assert (shown["state"], shown["owner"]) == ("CUTTING_OVER", "nobody yet")
    assert shown["last_refusal"]["reason"] == "OWNER_UNKNOWN"
    assert "warmsync settle" in shown["last_refusal"]["message"]
    said = hosts.source.refuse("cancel", name, reason="TOO_LATE")
    assert "warmsync settle" in said.error["message"]
    said = hosts.source.refuse("rollback", name, reason="ILLEGAL_TRANSITION")
    assert "settle" in said.error["values"]["possible"]
    assert hosts.source.ask("settle", name, "--owner", owner)["owner"] == owner
    hosts.end("source", signal.SIGKILL)
    hosts.start("source")
    shown = hosts.source.show(name)
    assert (shown["state"], shown["owner"]) == (
        ("ROLLED_BACK", "source") if owner == "source" else ("COMPLETED", "target")
    )
    assert disks.is_fenced(volume[0]) is (owner == "target")
    if owner == "source":
        disks.assert_writable(volume[0])
    # Whoever comes back later is told nothing else, and the devices are free.
    hosts.start("target")
    assert hosts.source.show(name)["owner"] == owner
    hosts.source.ask("delete", name)
    if owner == "target":
        disks.unfence(volume[0])
    again = cut_over(hosts, volume)
    disks.assert_equal(*volume)
    hosts.source.ask("rollback", again)
    hosts.pair.tidy()
    hosts.pair.assert_clean()
