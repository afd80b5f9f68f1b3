"""Whole migrations at their source, for tests: run, waited for, and looked at at their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from agent.errors import Unavailable, WarmsyncError
from agent.journal import Journal
from agent.source import SourceMigration
from agent.state import State
from native.chunk import digests
from tests.agent.ends import Source, until
from tests.agent.rpc_helpers import run

LOST = Unavailable("PEER_LOST", "the network went away")
STOPPED = Unavailable("AGENT_STOPPED", "the agent stops")


async def reach(migration: SourceMigration, state: State) -> None:
    await until(migration.bell, lambda: migration.state is state)


async def ended(migration: SourceMigration) -> None:
    """Wait for the last ring: everything is closed by then."""
    await until(migration.bell, lambda: migration.state.is_terminal)
    task = migration._task
    assert task is not None
    await asyncio.wait([task])


async def maybe(command: Callable[[], Any]) -> None:
    """Call a command, which may be a coroutine."""
    if asyncio.iscoroutine(answer := command()):
        await answer


async def complete(end: Source, migration: SourceMigration) -> None:
    """Cut over: the target is equal. Then finish."""
    await reach(migration, State.CONVERGED)
    await migration.cut_over(force=False)
    assert end.equal()
    await migration.finish()


def assert_state(migration: SourceMigration, state: State) -> None:
    assert migration.state is state


def assert_given_up(end: Source, *, cancelled: bool = False) -> None:
    """The source is as it was found, and the target knows."""
    assert not end.is_fenced()
    assert all(tracker.stopped for tracker in end.trackers)
    assert not end.is_open()
    assert end.carrier.closed or end.carrier.events == []
    assert end.peer.calls[-1] == "close"
    assert end.peer.calls[-2].startswith("abort cancelled" if cancelled else "abort failed")


def trial(end: Source, steps: Callable[[SourceMigration], Coroutine[Any, Any, None]]) -> None:
    """Run `steps(migration)` on a migration that has started."""

    async def main() -> None:
        migration = end.migration()
        migration.start()
        await steps(migration)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert {repr(task) for task in left if task is not migration._task} == set()
        if not migration.state.is_terminal:
            await migration.close(STOPPED)

    run(main)


def show_digests(end: Source, broken: WarmsyncError | None = None) -> None:
    """Let the target say what it holds from now on; `broken`: and then fail."""

    async def theirs(token: str, volume: int) -> AsyncIterator[tuple[int, bytes]]:
        yield 0, digests(end.targets[volume].read_bytes())
        if broken is not None:
            raise broken

    end.peer.digests = theirs  # type: ignore[method-assign]


def keep_journal(end: Source, directory: Path) -> Callable[[bool], None]:
    """Give the migration a journal on disk; return what fills its disk (True), or makes room."""
    end.journal = Journal(directory)

    def fill(full: bool) -> None:
        database = end.journal._database
        assert database is not None
        database.execute(f"PRAGMA query_only = {int(full)}")

    return fill


def written_state(end: Source) -> tuple[str, bool]:
    """Return the state that is written down, and whether the fence is to be up."""
    [(_, _, record)] = end.journal.load()
    return record["history"][-1]["state"], record["releasing"]


def fail_at(event: str) -> Callable[[Source], None]:
    def arm(end: Source) -> None:
        def fails() -> None:
            raise LOST

        end.carrier.before[event] = fails

    return arm


def throw(error: Exception) -> Any:
    """Raise, where only an expression may stand."""
    raise error
