"""Agents that stop or die in the middle, and start again: the migration goes on, whole."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from agent.device import boot_id
from tests import content, guest
from tests.devices import LoopDevice, require
from tests.e2e import disks
from tests.e2e.agents import eventually
from tests.e2e.disks import MIB
from tests.e2e.hosts import Hosts
from tests.native.tracking import bpffs

SIZE = 32 * MIB
MIDDLES = {"SEEDING": ("--bandwidth-limit", "8M"), "SYNCING": ("--max-downtime", "1ms")}
TRACKERS = ("ebpf", "scan")


@pytest.fixture
def hosts(tmp_path: Path, resources: ExitStack) -> Iterator[Hosts]:
    require("root", "loop", "bpf")
    with bpffs() as pins, ExitStack() as stack:
        yield Hosts(tmp_path, pins, stack)


@pytest.fixture
def volume(loop_device: Callable[..., LoopDevice]) -> tuple[str, str]:
    source, target = loop_device(SIZE).path, loop_device(SIZE).path
    content.fill(source, 1)
    disks.soil(target, 2)
    return source, target


@pytest.fixture
def writer(volume: tuple[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A guest that goes on writing whatever happens to the agents."""
    options = ("--rw=randwrite", "--bs=4096", "--rate=2m", "--time_based", "--runtime=600")
    running = guest.boot(volume[0], *options)
    yield running
    guest.destroy(running)


def hand_over(hosts: Hosts, name: str, writer: subprocess.Popen[str]) -> None:
    """Converge, power the guest off, cut over."""
    hosts.source.ask("update", name, "--max-downtime", "20s", "--bandwidth-limit", "0")
    hosts.source.wait(name, "CONVERGED")
    guest.power_off(writer)
    assert hosts.source.ask("cutover", name)["state"] == "CUT_OVER"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stop", "kill"])
@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("tracker", TRACKERS)
@pytest.mark.parametrize("who", ["source", "target"])
def test_an_agent_ends_and_starts_again(  # noqa: PLR0917 - parameters and fixtures
    hosts: Hosts,
    volume: tuple[str, str],
    writer: subprocess.Popen[str],
    who: str,
    tracker: str,
    middle: str,
    number: signal.Signals,
) -> None:
    name = hosts.pair.start("--tracker", tracker, *MIDDLES[middle], volumes=[volume])
    hosts.source.wait(
        name, middle, until=lambda now: now["state"] == middle and now["bytes_sent"] > 4 * MIB
    )
    hosts.end(who, number)
    hosts.start(who)
    shown = hosts.source.show(name)
    assert shown["state"] in ("SEEDING", "SYNCING", "CONVERGED"), shown
    if who == "source":
        assert shown["resumes"] == 1
        assert shown["suspect_volumes"] == 0
        assert shown["resumed_saved_bytes"] > 0
    hand_over(hosts, name, writer)
    disks.assert_equal(*volume)
    assert disks.is_fenced(volume[0])
    assert disks.is_free(volume[1])
    hosts.pair.tidy()
    hosts.pair.assert_clean()


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_fence_outlives_its_agent_and_goes_up_again(
    hosts: Hosts, volume: tuple[str, str], tracker: str
) -> None:
    name = hosts.pair.start("--tracker", tracker, "--max-downtime", "20s", volumes=[volume])
    hosts.source.wait(name, "CONVERGED")
    hosts.source.ask("cutover", name)
    hosts.end("source", signal.SIGKILL)
    hosts.end("target", signal.SIGKILL)
    assert disks.is_fenced(volume[0])
    disks.assert_equal(*volume)
    disks.unfence(volume[0])  # as a reboot does
    hosts.start("target")
    hosts.start("source")
    assert disks.is_fenced(volume[0])
    assert hosts.source.show(name)["state"] == hosts.target.show(name)["state"] == "CUT_OVER"
    assert hosts.source.ask("verify", name)["equal"] is True
    assert hosts.source.ask("rollback", name)["state"] == "ROLLED_BACK"
    assert not disks.is_fenced(volume[0])
    assert hosts.target.show(name)["state"] == "ROLLED_BACK"


def test_what_has_ended_is_still_shown(hosts: Hosts, volume: tuple[str, str]) -> None:
    name = hosts.pair.start("--bandwidth-limit", "2M", volumes=[volume])
    hosts.source.wait(name, "SEEDING")
    hosts.source.ask("cancel", name)
    hosts.end("source", signal.SIGTERM)
    hosts.start("source")
    assert hosts.source.show(name)["state"] == "CANCELLED"
    hosts.source.refuse("pause", name, reason="ILLEGAL_TRANSITION")
    hosts.source.ask("delete", name)
    assert hosts.source.ask("list")["migrations"] == []


def test_a_target_that_has_lost_its_state_is_compared(
    hosts: Hosts, volume: tuple[str, str], writer: subprocess.Popen[str], tmp_path: Path
) -> None:
    name = hosts.pair.start("--max-downtime", "1ms", volumes=[volume])
    hosts.source.wait(name, "SYNCING")
    hosts.end("target", signal.SIGKILL)
    for path in (tmp_path / "target").glob("journal.db*"):
        path.unlink()
    hosts.start("target")
    eventually(lambda: hosts.source.show(name), lambda now: now["suspect_volumes"] == 1)
    hand_over(hosts, name, writer)
    # Compared, and not all of it sent again.
    assert hosts.source.show(name)["reconciled_bytes"] > 0
    disks.assert_equal(*volume)
    hosts.pair.tidy()


def test_a_source_that_has_lost_its_state_leaves_no_tracker(
    hosts: Hosts, volume: tuple[str, str], tmp_path: Path
) -> None:
    name = hosts.pair.start("--tracker", "ebpf", "--max-downtime", "1ms", volumes=[volume])
    hosts.source.wait(name, "SYNCING")
    hosts.end("source", signal.SIGKILL)
    assert hosts.source.pinned() != []  # the kernel goes on marking
    for path in (tmp_path / "source").glob("journal.db*"):
        path.unlink()
    hosts.start("source")
    assert hosts.source.pinned() == []
    assert "removed a tracker" in hosts.source.log.read_text()
    assert hosts.source.ask("list")["migrations"] == []
    disks.assert_writable(volume[0])


def test_a_tracker_that_is_gone_is_not_believed(
    hosts: Hosts, volume: tuple[str, str], writer: subprocess.Popen[str]
) -> None:
    name = hosts.pair.start("--tracker", "ebpf", "--max-downtime", "1ms", volumes=[volume])
    hosts.source.wait(name, "SYNCING")
    hosts.end("source", signal.SIGKILL)
    for pin in hosts.source.pins.rglob("*/*/*"):
        pin.unlink()
    hosts.start("source")
    assert hosts.source.show(name)["suspect_volumes"] == 1
    hand_over(hosts, name, writer)
    disks.assert_equal(*volume)
    hosts.pair.tidy()


def test_marks_of_another_boot_are_not_believed(
    hosts: Hosts, volume: tuple[str, str], tmp_path: Path
) -> None:
    """What `scan` knows is in the state directory, and nothing made it durable in time."""
    name = hosts.pair.start("--tracker", "scan", "--max-downtime", "20s", volumes=[volume])
    hosts.source.wait(name, "CONVERGED")
    hosts.end("source", signal.SIGKILL)
    boot = boot_id()
    with closing(sqlite3.connect(tmp_path / "source/journal.db")) as journal, journal:
        changed = journal.execute(
            "UPDATE migration SET record = replace(record, ?, ?)", (boot, boot[::-1])
        )
        assert changed.rowcount == 1
    hosts.start("source")
    assert hosts.source.show(name)["suspect_volumes"] == 1
    hosts.source.wait(name, "CONVERGED")
    hosts.source.ask("cutover", name)
    disks.assert_equal(*volume)
    hosts.pair.tidy()


def test_each_volume_is_taken_up_whatever_the_first_was(
    hosts: Hosts, volume: tuple[str, str], loop_device: Callable[..., LoopDevice]
) -> None:
    other = loop_device(SIZE).path, loop_device(SIZE).path
    content.fill(other[0], 3)
    disks.soil(other[1], 4)
    words = ("--tracker", "ebpf", "--max-downtime", "20s")
    name = hosts.pair.start(*words, volumes=[volume, other])
    hosts.source.wait(name, "CONVERGED")
    hosts.end("source", signal.SIGKILL)
    for pin in hosts.source.pins.rglob(f"{name}-0/*"):
        pin.unlink()
    for path, seed in ((volume[0], 5), (other[0], 6)):
        content.fill(path, seed)
    hosts.start("source")
    assert hosts.source.show(name)["suspect_volumes"] == 1
    hosts.source.wait(name, "CONVERGED")
    assert hosts.source.ask("cutover", name)["state"] == "CUT_OVER"
    disks.assert_equal(*volume)
    disks.assert_equal(*other)
    hosts.pair.tidy()


def test_an_agent_that_is_away_is_waited_for(
    hosts: Hosts, volume: tuple[str, str], writer: subprocess.Popen[str]
) -> None:
    name = hosts.pair.start("--max-downtime", "20s", volumes=[volume])
    hosts.source.wait(name, "CONVERGED")
    hosts.end("target", signal.SIGTERM)
    shown = eventually(lambda: hosts.source.show(name), lambda now: now["trouble"] != "")
    assert shown["state"] in ("SYNCING", "CONVERGED")
    hosts.start("target")
    eventually(lambda: hosts.source.show(name), lambda now: now["trouble"] == "")
    hand_over(hosts, name, writer)
    disks.assert_equal(*volume)
    hosts.pair.tidy()


def test_a_target_given_up_while_its_source_is_away(hosts: Hosts, volume: tuple[str, str]) -> None:
    name = hosts.pair.start("--max-downtime", "20s", volumes=[volume])
    hosts.source.wait(name, "CONVERGED")
    hosts.target.refuse("cancel", name, reason="NOT_THE_SOURCE")
    hosts.end("source", signal.SIGKILL)
    eventually(lambda: hosts.target.run("cancel", name), lambda answer: answer.code == 0)
    shown = hosts.target.show(name)
    assert (shown["state"], shown["incomplete"]) == ("CANCELLED", True)
    assert disks.is_free(volume[1])
    # The source hears of it when it comes back, and stays the owner of what it has.
    hosts.start("source")
    shown = eventually(lambda: hosts.source.show(name), lambda now: now["state"] == "FAILED")
    assert shown["owner"] == "source"
    assert not disks.is_fenced(volume[0])
    disks.assert_writable(volume[0])
    # Both are free for another migration, and nothing of the first is believed.
    disks.soil(volume[1], 7)
    again = hosts.pair.start("--max-downtime", "20s", volumes=[volume])
    hosts.source.wait(again, "CONVERGED")
    assert hosts.source.ask("cutover", again)["state"] == "CUT_OVER"
    disks.assert_equal(*volume)
    hosts.source.ask("rollback", again)
    hosts.pair.tidy()
    hosts.pair.assert_clean()
