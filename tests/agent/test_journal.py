"""The journal: what was told is kept, or was not told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent.errors import ResourceExhausted, Unavailable
from agent.journal import Journal
from agent.migration import Role
from tests import devices


def test_nothing_is_told_once_it_is_closed(tmp_path: Path) -> None:
    """A call that is still under way when the agent stops must not succeed and be forgotten."""
    journal = Journal(tmp_path)
    journal.save(Role.TARGET, "web1", {"kept": True})
    journal.close()
    with pytest.raises(Unavailable) as caught:
        journal.save(Role.TARGET, "web1", {"kept": False})
    assert caught.value.reason == "AGENT_STOPPED"  # the source asks the next one
    assert Journal(tmp_path).load() == [(Role.TARGET, "web1", {"kept": True})]


def test_one_without_a_directory_keeps_nothing_and_says_nothing() -> None:
    journal = Journal(None)
    journal.save(Role.TARGET, "web1", {})
    assert journal.load() == []


@pytest.mark.parametrize("role", list(Role))
def test_what_is_not_kept_says_on_which_side(tmp_path: Path, role: Role) -> None:
    """A source goes on by itself when there is room here; at its target a person has to resume."""
    journal = Journal(tmp_path)
    assert journal._database is not None
    journal._database.execute("PRAGMA query_only = 1")
    with pytest.raises(ResourceExhausted) as caught:
        journal.save(role, "web1", {})
    assert (caught.value.reason, caught.value.values["side"]) == ("STATE_NOT_KEPT", role)
    with pytest.raises(ResourceExhausted) as caught:
        journal.remove(role, "web1")
    assert caught.value.values["side"] == role


@pytest.fixture(scope="module")
def failing_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    code = Path(__file__).with_name("failing_disk.c")
    built = tmp_path_factory.mktemp("disk") / "failing_disk.so"
    devices.run("gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", code, "-o", built)
    return built


@pytest.mark.parametrize(
    ("faults", "said", "found"),
    [
        (["sync"], ["ResourceExhausted"], 0),
        (["read-only"], ["ResourceExhausted"], 0),
        (["sync, read-only"], ["Unavailable"], 1),
        (["sync, read-only", "read-only"], ["Unavailable", "Unavailable"], 1),
        (["sync, read-only", "sync"], ["Unavailable", "ResourceExhausted"], 0),
        (["sync, read-only", "as before"], ["Unavailable", ""], 0),
        (["sync, read-only", "", "read-only"], ["Unavailable", "", "ResourceExhausted"], 2),
    ],
    ids=[
        "taken back",
        "not begun",
        "in doubt",
        "still in doubt",
        "taken back later",
        "kept as before",
        "kept since",
    ],
)
def test_what_was_not_kept_is_not_found_by_the_next_start(
    failing_disk: Path, tmp_path: Path, faults: list[str], said: list[str], found: int
) -> None:
    """A commit whose fsync fails is whole in SQLite's log, and counts there once the agent is
    killed: a release that was said not to be one would be one.
    """
    command = [sys.executable, "-m", "tests.agent.failing_journal", str(tmp_path), *faults]
    environment = os.environ | {"LD_PRELOAD": str(failing_disk)}
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    lines = [f"{kind} STATE_NOT_KEPT" if kind else "kept" for kind in said]
    assert ended.stdout.splitlines() == ["kept", *lines]
    assert Journal(tmp_path).load() == [(Role.TARGET, "web1", {"number": found})]
