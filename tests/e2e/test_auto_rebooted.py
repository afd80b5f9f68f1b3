"""A cutover by the agents whose source host is rebooted: the VM that was off may be on again."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from agent.device import boot_id
from agent.journal import Journal
from tests import content
from tests.devices import LoopDevice, require
from tests.e2e import disks
from tests.e2e.agents import Shown, eventually
from tests.e2e.disks import MIB
from tests.e2e.hosts import Hosts
from tests.native.tracking import bpffs

SIZE = 16 * MIB
QUIESCE = """#!/bin/sh
touch {0}/asked
while ! test -e {0}/go; do sleep 0.05; done
"""
BOOT = """#!/bin/sh
touch {0}/booted
"""


@pytest.fixture
def hosts(tmp_path: Path, resources: ExitStack) -> Iterator[Hosts]:
    require("root", "loop", "bpf")
    hooks: dict[str, object] = {}
    for name, text in (("quiesce", QUIESCE), ("boot", BOOT)):
        path = tmp_path / f"{name}-hook"
        path.write_text(text.format(tmp_path))
        path.chmod(0o755)
        hooks[name] = [str(path)]
    with bpffs() as pins, ExitStack() as stack:
        made = Hosts(tmp_path, pins, stack, {"hooks": hooks})
        yield made
        made.pair.tidy()
        made.pair.assert_clean()


@pytest.fixture
def volume(loop_device: Callable[..., LoopDevice]) -> tuple[str, str]:
    source, target = loop_device(SIZE).path, loop_device(SIZE).path
    content.fill(source, 1)
    disks.soil(target, 2)
    return source, target


def reboot(directory: Path, **changes: Any) -> None:
    """Let what the source's agent has written down be of another boot; and be changed."""
    journal = Journal(directory / "source")
    try:
        ((role, name, record),) = journal.load()
        assert record["boot_id"] == record["step_boot_id"] == boot_id()
        earlier = dict.fromkeys(("boot_id", "step_boot_id"), "an earlier boot")
        journal.save(role, name, record | earlier | changes)
    finally:
        journal.close()


def history(directory: Path) -> list[dict[str, Any]]:
    journal = Journal(directory / "source")
    try:
        ((_, _, record),) = journal.load()
        found: list[dict[str, Any]] = record["history"]
        return found
    finally:
        journal.close()


def quiesced(hosts: Hosts, directory: Path, volume: tuple[str, str]) -> str:
    """Start a migration; its agent is dead, and its quiesce hook has ended well since."""
    name = hosts.pair.start("--cutover", "auto", "--max-downtime", "20s", volumes=[volume])
    eventually((directory / "asked").exists, bool)
    hosts.end("source", signal.SIGKILL)
    (directory / "go").touch()
    eventually((directory / "source" / "hooks" / f"{name}-quiesce" / "result").exists, bool)
    return name


def wait_for_stop(hosts: Hosts, name: str, reason: str) -> None:
    shown = hosts.source.wait(name, until=_has_landed)
    assert (shown["owner"], shown["cutover_step"]) == ("source", "stopped"), shown
    assert shown["last_refusal"]["reason"] == reason


def _has_landed(shown: Shown) -> bool:
    return shown["cutover_step"] in ("stopped", "done")


def cut_over_by_hand(hosts: Hosts, name: str, volume: tuple[str, str]) -> None:
    """The VM was booted with its host, and wrote; a person powers it down once more."""
    content.fill(volume[0], 3)
    hosts.source.wait(name, "SYNCING", "CONVERGED")
    assert hosts.source.ask("cutover", name, "--force")["state"] == "CUT_OVER"
    disks.assert_equal(*volume)


@pytest.mark.parametrize("changes", [{}, {"step_boot_id": ""}], ids=["", "older agent"])
def test_a_vm_that_was_powered_down_by_a_hook(
    hosts: Hosts, volume: tuple[str, str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    name = quiesced(hosts, tmp_path, volume)
    reboot(tmp_path, **changes)
    hosts.start("source")
    wait_for_stop(hosts, name, "HOOK_INTERRUPTED")
    assert not (tmp_path / "booted").exists()
    cut_over_by_hand(hosts, name, volume)


def test_a_vm_that_was_off_from_the_start(
    hosts: Hosts, volume: tuple[str, str], tmp_path: Path
) -> None:
    name = hosts.pair.start("--cold", "--bandwidth-limit", "1M", volumes=[volume])
    hosts.source.wait(name, "SEEDING")
    hosts.end("source", signal.SIGKILL)
    reboot(tmp_path)
    hosts.start("source")
    wait_for_stop(hosts, name, "HOST_REBOOTED")
    hosts.source.ask("update", name, "--bandwidth-limit", "0")
    cut_over_by_hand(hosts, name, volume)


def test_a_release_that_was_not_answered(
    hosts: Hosts, volume: tuple[str, str], tmp_path: Path
) -> None:
    """Fenced until the target says that it does not own; also by an agent once more started."""
    name = quiesced(hosts, tmp_path, volume)
    hosts.end("target", signal.SIGKILL)
    entries = history(tmp_path)
    asked = {"state": "CUTTING_OVER", "at_seconds": entries[-1]["at_seconds"]}
    reboot(tmp_path, history=[*entries, asked], releasing=True, step="cutting over")
    hosts.start("source")
    shown = eventually(lambda: hosts.source.show(name), lambda now: now["trouble"] != "")
    assert (shown["owner"], shown["cutover_step"]) == ("nobody yet", "cutting over")
    assert disks.is_fenced(volume[0])
    hosts.end("source", signal.SIGKILL)
    hosts.start("source")
    assert disks.is_fenced(volume[0])
    hosts.start("target")
    wait_for_stop(hosts, name, "HOOK_INTERRUPTED")
    assert not (tmp_path / "booted").exists()
    cut_over_by_hand(hosts, name, volume)


def test_a_release_whose_answer_was_lost(
    hosts: Hosts, volume: tuple[str, str], tmp_path: Path
) -> None:
    """The target owns: its VM is booted there, whatever the source's host was through."""
    (tmp_path / "go").touch()
    name = hosts.pair.start("--cutover", "auto", "--max-downtime", "20s", volumes=[volume])
    hosts.source.wait(name, until=_has_landed)
    hosts.end("source", signal.SIGKILL)
    entries = history(tmp_path)
    assert entries[-1]["state"] == "CUT_OVER"
    reboot(tmp_path, history=entries[:-1], step="cutting over", attempt=0)
    disks.unfence(volume[0])  # as a reboot does
    hosts.start("source")
    assert disks.is_fenced(volume[0])
    shown = hosts.source.wait(name, until=_has_landed)
    assert (shown["owner"], shown["cutover_step"]) == ("target", "done"), shown
    assert (tmp_path / "booted").exists()
    disks.assert_equal(*volume)
