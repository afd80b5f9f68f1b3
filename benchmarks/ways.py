"""Ways for a virtual machine to get to the other host: warmsync, a cold copy, QEMU's mirror.

Each follows the guest while it runs, powers it down, and hands its disk over. Owns what happens
between the last acknowledged write and the moment at which the target may be booted from.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from warmsync.v1 import migration_pb2 as pb

from benchmarks import live_figures
from benchmarks.agents import Agent
from benchmarks.boots import SECONDS, Run
from benchmarks.devices import flush
from benchmarks.mirror import JOB, finish, received_bytes
from benchmarks.moves import is_handed_over, migration
from benchmarks.qemu import Setting, nbd_server

_FOLLOW_SECONDS = 60.0
_COPY_SECONDS = 600.0
_POLL_SECONDS = 0.02
"""How often a cold copy is looked at: there is no guest to disturb, and each wait counts."""


@dataclass(frozen=True, slots=True)
class Handed:
    """How a disk was handed over. `aside_seconds` were spent on counting, not on handing over.

    `left_bytes` were sent with the guest off, `unread_bytes` were still to be read back for the
    proof; `copy_seconds` is the full copy's; `foretold_seconds` is what the agent said beforehand.
    """

    sent_bytes: int = 0
    left_bytes: int = 0
    unread_bytes: int = 0
    copy_seconds: float = 0.0
    aside_seconds: float = 0.0
    foretold_seconds: float = 0.0
    parts: tuple[tuple[str, float], ...] = ()

    def part(self, name: str) -> float:
        """Return how long one part took, 0 if there is none of that name."""
        return dict(self.parts).get(name, 0.0)


class Reboot:
    """No move: the machine boots where it was. What is lost with that, every way loses."""

    def follow(self, run: Run) -> None:
        """Return when the guest may be powered down."""
        self._monitor = run.monitor()

    def power_down(self, run: Run) -> None:
        """Press the power button; returns when the guest is off."""
        self._monitor.execute("system_powerdown")
        run.await_end()
        self._monitor.close()

    def hand_over(self) -> Handed:
        """Return when the machine may be booted."""
        return Handed()


class Cold(Reboot):
    """The guest is off before the first byte is copied; by our agents, with the proof."""

    def __init__(self, ends: tuple[Agent, Agent], disks: tuple[str, str], stack: ExitStack) -> None:
        self._ends, self._disks, self._stack = ends, disks, stack

    def hand_over(self) -> Handed:
        """Copy all; the agent cuts over by itself."""
        move = self._stack.enter_context(migration(*self._ends, *self._disks, cold=True))
        found = move.wait(is_handed_over, _COPY_SECONDS, _POLL_SECONDS)
        sent = found.progress.sent_bytes
        return Handed(sent, sent, copy_seconds=move.copy_seconds(), parts=_parts(found))


class Warm(Reboot):
    """Ours: until converged with the default budget, or until the time for that is over."""

    def __init__(self, ends: tuple[Agent, Agent], disks: tuple[str, str], stack: ExitStack) -> None:
        self._ends, self._disks, self._stack = ends, disks, stack

    def follow(self, run: Run) -> None:
        """Migrate."""
        super().follow(run)
        self._move = self._stack.enter_context(migration(*self._ends, *self._disks))
        with suppress(TimeoutError):
            self._move.converged_seconds(_FOLLOW_SECONDS)
        self._foretold = self._move.look().progress.predicted_downtime_seconds

    def hand_over(self) -> Handed:
        """Cut over."""
        started = time.monotonic()
        before = self._move.look().progress
        aside = time.monotonic() - started
        done = self._move.cut_over()
        sent = done.progress.sent_bytes
        return Handed(
            sent,
            left_bytes=sent - before.sent_bytes,
            unread_bytes=before.unproved_bytes,
            copy_seconds=self._move.copy_seconds(),
            aside_seconds=aside,
            foretold_seconds=self._foretold,
            parts=_parts(done),
        )


class Mirror(Reboot):
    """blockdev-mirror in the machine's own QEMU, to qemu-nbd over TCP, then the power button.

    QEMU is told to stay when the guest is off, as the job would otherwise end with it, unfinished.
    """

    def __init__(self, target: str, library: Path, stack: ExitStack) -> None:
        self._target = target
        self._server = stack.enter_context(ExitStack())
        # It runs before the clock does, as our agents.
        server = nbd_server(target, Setting(library))
        _, self._port = self._server.enter_context(server)

    def follow(self, run: Run) -> None:
        """Mirror until the target has caught up."""
        super().follow(run)
        started = time.monotonic()
        monitor = self._monitor
        monitor.execute("set-action", shutdown="pause")
        server = {"type": "inet", "host": "127.0.0.1", "port": str(self._port)}
        there = {"node_name": "target", "server": server, "cache": {"direct": True}}
        monitor.execute("blockdev-add", driver="nbd", **there)
        what = {"device": "disk1", "target": "target", "sync": "full"}
        monitor.execute("blockdev-mirror", job_id=JOB, **what)
        if not monitor.wait("BLOCK_JOB_READY", SECONDS):
            raise RuntimeError(f"the mirror is not ready after {SECONDS} s")
        self._copied = time.monotonic() - started

    def power_down(self, run: Run) -> None:  # noqa: ARG002
        """Press the power button; returns when the guest is off, QEMU with its job still there."""
        self._monitor.execute("system_powerdown")
        if not self._monitor.wait("SHUTDOWN", SECONDS):
            raise TimeoutError(f"the guest is not off after {SECONDS} s")

    def hand_over(self) -> Handed:
        """Let the job end, and the target's server."""
        (job,) = self._monitor.execute("query-block-jobs")
        finish(self._monitor, SECONDS)
        counting = time.monotonic()
        sent = received_bytes(self._port)
        aside = time.monotonic() - counting
        self._server.close()
        flush(self._target)
        self._monitor.close()
        return Handed(sent, job["len"] - job["offset"], 0, self._copied, aside)


def _parts(found: pb.Migration) -> tuple[tuple[str, float], ...]:
    return tuple(live_figures.parts(found.progress.downtime_parts))
