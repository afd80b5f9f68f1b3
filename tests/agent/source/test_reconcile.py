"""What is found equal is not sent; all else is, also what is written meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import DataLoss, FailedPrecondition
from agent.source import SourceMigration
from agent.source import cutover as cutover_module
from agent.source.reconcile import equal_runs, reconcile
from agent.state import State
from native.chunk import CHUNK_BYTES, DIGEST_BYTES, digests
from tests.agent.ends import SIZE, Source
from tests.agent.migrations import LOST, reach, trial
from tests.agent.rpc_helpers import run


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=40), st.integers(0, 3))
def test_equal_runs(pairs: list[tuple[int, int]], missing: int) -> None:
    ours = b"".join(bytes([a]) * DIGEST_BYTES for a, _ in pairs)
    theirs = b"".join(bytes([b]) * DIGEST_BYTES for _, b in pairs)
    theirs = theirs[: max(len(theirs) - missing * DIGEST_BYTES, 0)]
    found = [i for first, count in equal_runs(ours, theirs) for i in range(first, first + count)]
    known = len(theirs) // DIGEST_BYTES
    assert found == [i for i, (a, b) in enumerate(pairs) if a == b and i < known]


def test_only_what_differs_stays_pending(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    for image, target in zip(end.images, end.targets, strict=True):
        target.write_bytes(image.read_bytes())
    with end.targets[1].open("r+b") as file:
        file.seek(3 * CHUNK_BYTES + 5)
        file.write(b"older")

    async def theirs(token: str, volume: int) -> AsyncIterator[tuple[int, bytes]]:
        end.write(0, b"while it is compared", volume=0)
        yield 0, digests(end.targets[volume].read_bytes())

    monkeypatch.setattr(end.peer, "digests", theirs)

    async def main() -> None:
        sender = end.sender()
        steps = [step async for step in reconcile(sender, end.workshop, end.peer, "token")]
        assert steps[-1][0] == 2 * SIZE
        first, second = (disk.pending for disk in end.disks)
        assert [*second.extents()] == [(3 * CHUNK_BYTES, CHUNK_BYTES)]
        # Read before the write or after it: it is marked, and comes with the next take.
        assert first.count_bytes() in (0, CHUNK_BYTES)
        await sender.take(flush=False)
        assert first.is_marked(0)
        await sender.send_seed(await sender.take(flush=False))
        assert end.equal()

    run(main)


def test_what_was_released_is_not_compared_any_more(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marks were lost in a reboot, and only then the target says that it owns."""
    monkeypatch.setattr(cutover_module, "RELEASE_SECONDS", -1.0)

    async def steps(migration: SourceMigration) -> None:
        await reach(migration, State.CONVERGED)
        end.peer.errors["release"] = [LOST]
        end.peer.errors["digests"] = [DataLoss("TARGET_IO_ERROR", "the new owner has it")]
        end.peer.gates["resume"] = asyncio.Event()
        with pytest.raises(FailedPrecondition):
            await migration.cut_over(force=False)
        await end.peer.until("resume")
        await migration._course._doubts.forget_target("the host was restarted")
        end.peer.released = True
        end.peer.gates["resume"].set()
        await reach(migration, State.CUT_OVER)
        await migration.finish()
        assert migration.snapshot().error is None
        assert "digests" not in end.peer.calls

    trial(end, steps)
