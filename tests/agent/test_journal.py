"""The journal: what was told is kept, or was not told."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.errors import ResourceExhausted, Unavailable
from agent.journal import Journal
from agent.migration import Role


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
