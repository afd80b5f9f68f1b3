"""Progress of a migration for people: a live picture on a terminal, lines elsewhere.

Fed with Migration messages as they come from WatchMigration; asks nothing and decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from warmsync.v1 import migration_pb2
from warmsync.v1.migration_pb2 import Migration

from agent.units import format_bytes, format_rate, format_seconds
from agent.view import migration_id, owner_name, state_name, step_name, tracker_name

LINE_INTERVAL_SECONDS = 1.0
# Without any event: shows that it lives, and how far the round is.
IDLE_INTERVAL_SECONDS = 10.0
BAR_WIDTH = 40
_HANDING_OVER = (migration_pb2.STATE_CUTTING_OVER, migration_pb2.STATE_CUT_OVER)

_STYLES = {"CONVERGED": "green", "CUT_OVER": "green", "COMPLETED": "green", "FAILED": "red"}


class Display(Protocol):
    """Shows one migration; leave the `with` block to see the last state."""

    def update(self, migration: Migration) -> None:
        """Take the newest state."""

    def __enter__(self) -> Self:
        """Begin to show."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Show the last state and end."""


def open_display(console: Console) -> Display:
    """Return the display that suits the console."""
    return LiveDisplay(console) if console.is_terminal else LineDisplay(console)


class LiveDisplay:
    """A picture that stays in place."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=8)

    def update(self, migration: Migration) -> None:
        """Take the newest state."""
        self._live.update(picture(migration))

    def __enter__(self) -> Self:
        """Begin to show."""
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Show the last state and give the terminal back."""
        self._live.stop()


class LineDisplay:
    """A line when something worth saying changed, at most one a second; at once who owns."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._said: tuple[Any, ...] | None = None
        self._said_at = 0.0
        self._urgent: tuple[int, int] = (0, 0)
        self._newest: Migration | None = None

    def update(self, migration: Migration) -> None:
        """Take the newest state, and say it if it is time to."""
        self._newest = migration
        silence = self._clock() - self._said_at
        news = _worth_saying(migration) != self._said and silence >= LINE_INTERVAL_SECONDS
        news = news or _urgent(migration) != self._urgent
        if self._said is None or news or silence >= IDLE_INTERVAL_SECONDS:
            self._say(migration)

    def __enter__(self) -> Self:
        """Begin to show."""
        return self

    def __exit__(self, *_: object) -> None:
        """Say what was held back."""
        if self._newest is not None and _worth_saying(self._newest) != self._said:
            self._say(self._newest)

    def _say(self, migration: Migration) -> None:
        self._said, self._said_at = _worth_saying(migration), self._clock()
        self._urgent = _urgent(migration)
        self._console.print(line(migration), markup=False, highlight=False, soft_wrap=True)


class ShareDisplay:
    """How much of something is done: a bar on a terminal, a line for each tenth elsewhere."""

    def __init__(self, console: Console, what: str) -> None:
        self._console = console
        self._what = what
        self._tenth = 0
        self._live = Live(console=console, refresh_per_second=8) if console.is_terminal else None

    def update(self, done_bytes: int, total_bytes: int) -> None:
        """Take the newest numbers."""
        share = min(1.0, done_bytes / total_bytes) if total_bytes else 1.0
        text = f"{self._what} {format_bytes(done_bytes)} of {format_bytes(total_bytes)}"
        if self._live is not None:
            row = Table.grid(padding=(0, 2))
            row.add_row(ProgressBar(total=1.0, completed=share, width=BAR_WIDTH), text)
            self._live.update(row)
        elif int(share * 10) > self._tenth:
            self._tenth = int(share * 10)
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        """Begin to show."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()


def line(migration: Migration) -> str:
    """Return the state in one line."""
    progress = migration.progress
    facts = [
        f"{migration_id(migration)} {state_name(migration.state)}",
        *_ownership(migration),
        f"round {progress.rounds}",
        f"{round(100 * _round_share(migration))}% of {format_bytes(progress.round_bytes)}",
        f"dirty {format_bytes(progress.dirty_bytes)}",
        f"throughput {format_rate(progress.throughput_bytes_per_second)}",
        f"dirty rate {format_rate(progress.dirty_rate_bytes_per_second)}",
        _downtime(migration),
    ]
    if progress.guest_limit_bytes_per_second:
        facts.append(_guest(migration))
    if progress.stalled:
        facts.append(f"STALLED: {progress.advice}")
    return ", ".join(facts)


def picture(migration: Migration) -> Group:
    """Return the state as a picture of a few lines."""
    progress, state = migration.progress, state_name(migration.state)
    head = Text.assemble(
        (migration_id(migration), "bold"),
        "  ",
        (state, _STYLES.get(state, "yellow")),
        "".join(f"  {fact}" for fact in _ownership(migration)),
        f"  round {progress.rounds}  tracker {tracker_name(migration)}",
    )
    parts: list[Any] = [head, _bar(migration), _figures(migration)]
    if progress.guest_limit_bytes_per_second:
        parts.append(Text(_guest(migration), style="yellow"))
    if progress.stalled:
        parts.append(Text(f"stalled: {progress.advice}", style="red"))
    if migration.HasField("error"):
        parts.append(Text(migration.error.message, style="red"))
    return Group(*parts)


def _bar(migration: Migration) -> Table:
    progress = migration.progress
    row = Table.grid(padding=(0, 2))
    done, whole = format_bytes(progress.round_done_bytes), format_bytes(progress.round_bytes)
    bar = ProgressBar(total=1.0, completed=_round_share(migration), width=BAR_WIDTH)
    row.add_row(bar, f"{done} of {whole} in this round")
    return row


def _figures(migration: Migration) -> Text:
    """Two lines that fit 80 columns; padded, so that numbers do not dance."""
    progress = migration.progress
    sent = f"{format_bytes(progress.sent_bytes)} of {format_bytes(progress.total_bytes)}"
    return Text.assemble(
        f"dirty {format_bytes(progress.dirty_bytes):<10}",
        f"  throughput {format_rate(progress.throughput_bytes_per_second):<12}",
        f"  dirty rate {format_rate(progress.dirty_rate_bytes_per_second)}\n",
        (_downtime(migration), "bold"),
        f"  sent {sent}",
    )


def _ownership(migration: Migration) -> list[str]:
    """Return who owns the disks, once that can change by itself, and what is being done."""
    step = step_name(migration)
    if not step and migration.state not in _HANDING_OVER:
        return []
    return [f"owner {owner_name(migration)}", *([step] if step else [])]


def _downtime(migration: Migration) -> str:
    progress = migration.progress
    budget = f"(budget {format_seconds(migration.max_downtime_seconds)})"
    if progress.HasField("downtime_seconds"):
        return f"downtime {format_seconds(progress.downtime_seconds)} {budget}"
    if progress.HasField("predicted_downtime_seconds"):
        predicted = format_seconds(progress.predicted_downtime_seconds)
        resize = "and the resize " if migration.resize else ""
        return f"predicted downtime {predicted} {resize}{budget}"
    return f"predicted downtime not known yet {budget}"


def _guest(migration: Migration) -> str:
    return f"guest throttled to {format_rate(migration.progress.guest_limit_bytes_per_second)}"


def _round_share(migration: Migration) -> float:
    progress = migration.progress
    if progress.round_bytes <= 0:
        return 1.0
    return min(1.0, progress.round_done_bytes / progress.round_bytes)


def _urgent(migration: Migration) -> tuple[int, int]:
    return migration.owner, migration.cutover_step


def _worth_saying(migration: Migration) -> tuple[Any, ...]:
    progress = migration.progress
    return (
        migration.state,
        migration.owner,
        migration.cutover_step,
        progress.rounds,
        progress.stalled,
        progress.suspect_volumes,
        progress.guest_limit_bytes_per_second,
    )
