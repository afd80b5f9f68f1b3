"""The cutover's order: at each step exactly one side may be written (rules 6 and 12)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import astuple
from types import SimpleNamespace

import pytest

from agent import disk as disk_module
from agent.certificate import verify
from agent.disk import SourceDisk
from agent.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WarmsyncError,
)
from agent.migration import Depth
from agent.peer import Proof
from agent.source import cutover as cutover_module
from agent.source.cutover import Cutover
from agent.tracker import Take
from native.bitmap import DirtyBitmap
from tests.agent.ends import SIZE, Source
from tests.agent.rpc_helpers import run

GONE = Unavailable("PEER_UNREACHABLE", "no answer")


@pytest.fixture
def fences(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened to fences, in order, over all disks."""
    seen: list[str] = []
    fence, unfence = SourceDisk.fence, SourceDisk.unfence

    def noted_fence(disk: SourceDisk) -> None:
        seen.append("fence")
        fence(disk)

    def noted_unfence(disk: SourceDisk) -> None:
        seen.append("unfence")
        unfence(disk)

    monkeypatch.setattr(SourceDisk, "fence", noted_fence)
    monkeypatch.setattr(SourceDisk, "unfence", noted_unfence)
    return seen


async def seeded(end: Source) -> Cutover:
    sender = end.sender()
    await sender.send_seed(await sender.take(flush=False))
    end.carrier.events.clear()
    return end.cutover()


def releases(end: Source) -> list[str]:
    return [call for call in end.peer.calls if call.startswith("release")]


async def refusal(cutover: Cutover) -> WarmsyncError:
    with pytest.raises(WarmsyncError) as caught:
        await cutover.run()
    return caught.value


def test_a_quiet_source_is_handed_over(end: Source, fences: list[str]) -> None:
    async def main() -> None:
        cutover = await seeded(end)
        end.write(8192, b"last words")
        end.peer.before["release"] = lambda: order.append(f"release, fenced {end.is_fenced()}")
        order: list[str] = []
        await cutover.run()
        assert end.equal()
        assert order == ["release, fenced True"]
        assert end.peer.calls == ["prove 2", "release 2"]
        assert fences == ["fence", "fence"]
        assert cutover.releasing

    run(main)


def test_marks_before_the_fence_refuse(end: Source, fences: list[str]) -> None:
    """The guest writes while the last round is on its way: the fence never goes up."""

    async def main() -> None:
        cutover = await seeded(end)
        end.carrier.before["flush 2"] = lambda: end.write(0, b"still running")
        error = await refusal(cutover)
        assert error.reason == "NOT_QUIESCED"
        assert error.values["path"] == str(end.images[0])
        assert (fences, releases(end), cutover.releasing) == ([], [], False)
        # What was written meanwhile is not forgotten.
        sender = end.sender()
        await sender.send_dirty(await sender.take(flush=True))
        assert end.equal()

    run(main)


def test_marks_after_the_fence_refuse_and_lift_it(
    end: Source, fences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was in flight when the fence went up."""
    flush = SourceDisk.flush

    def late(disk: SourceDisk) -> None:
        if fences:
            disk.tracker.mark(4096, 1)  # type: ignore[attr-defined]
        flush(disk)

    monkeypatch.setattr(SourceDisk, "flush", late)

    async def main() -> None:
        cutover = await seeded(end)
        error = await refusal(cutover)
        assert error.reason == "NOT_QUIESCED"
        assert sorted(fences) == ["fence", "fence", "unfence", "unfence"]
        assert not end.is_fenced()
        assert releases(end) == []

    run(main)


def test_a_fence_that_fails_is_lifted_everywhere(
    end: Source, fences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fence = SourceDisk.fence

    def fails(disk: SourceDisk) -> None:
        if disk is end.disks[1]:
            raise FailedPrecondition("FENCE_FAILED", "not permitted")
        fence(disk)

    monkeypatch.setattr(SourceDisk, "fence", fails)

    async def main() -> None:
        error = await refusal(await seeded(end))
        assert error.reason == "FENCE_FAILED"
        assert not end.is_fenced()
        assert releases(end) == []

    run(main)


def test_a_mounted_source_refuses_before_anything_else(
    end: Source, fences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_module, "is_claimed", lambda path: path == str(end.images[1]))

    async def main() -> None:
        cutover = await seeded(end)
        error = await refusal(cutover)
        assert error.reason == "NOT_QUIESCED"
        assert error.values["path"] == str(end.images[1])
        assert (fences, end.carrier.events, end.peer.calls) == ([], [], [])

    run(main)


def test_what_is_buffered_passes_the_tracker_before_the_take(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 6: the flush of the page cache comes first, and its writes are sent."""
    buffered = [True]
    flush = SourceDisk.flush

    def write_back(disk: SourceDisk) -> None:
        if disk is end.disks[0] and buffered.pop() if buffered else False:
            end.write(65536, b"was in the page cache")
        flush(disk)

    async def main() -> None:
        cutover = await seeded(end)
        monkeypatch.setattr(SourceDisk, "flush", write_back)
        await cutover.run()
        assert not buffered
        assert end.equal()

    run(main)


def test_an_unanswered_release_is_asked_again(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutover_module, "_RETRY_SECONDS", 0)

    async def main() -> None:
        cutover = await seeded(end)
        end.peer.errors["release"] = [GONE, GONE]
        await cutover.run()
        assert end.peer.calls == ["prove 2", *["release 2"] * 3]
        assert end.is_fenced()

    run(main)


def test_a_release_that_is_never_answered_leaves_the_owner_unknown(
    end: Source, fences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target may own the disks: the fence stays up, or both might be written."""
    monkeypatch.setattr(cutover_module, "RELEASE_SECONDS", -1.0)

    async def main() -> None:
        cutover = await seeded(end)
        end.peer.errors["release"] = [GONE]
        error = await refusal(cutover)
        assert isinstance(error, FailedPrecondition)
        assert error.reason == "OWNER_UNKNOWN"
        assert error.values == {"peer": "target:7070"}
        assert "warmsync settle" in str(error)
        assert end.is_fenced()
        assert cutover.releasing
        assert "unfence" not in fences

    run(main)


def test_a_refused_release_is_no_release(end: Source) -> None:
    async def main() -> None:
        cutover = await seeded(end)
        end.peer.errors["release"] = [FailedPrecondition("NOT_RELEASABLE", "no")]
        error = await refusal(cutover)
        assert error.reason == "NOT_RELEASABLE"
        # So whoever gives the migration up may lift the fence.
        assert not cutover.releasing

    run(main)


def test_a_refusal_after_silence_counts(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutover_module, "_RETRY_SECONDS", 0)

    async def main() -> None:
        cutover = await seeded(end)
        end.peer.errors["release"] = [GONE, FailedPrecondition("NOT_RELEASABLE", "no")]
        assert (await refusal(cutover)).reason == "NOT_RELEASABLE"
        assert not cutover.releasing

    run(main)


@pytest.mark.parametrize(
    "silence",
    [
        WarmsyncError("PEER_UNKNOWN", "the answer was spoilt"),
        WarmsyncError("CALL_CANCELLED", "the stream was reset"),
        WarmsyncError("INTERNAL", "it failed behind the release"),
        FailedPrecondition("UNKNOWN", "the answer gave no reason"),
        FailedPrecondition("OF_A_LATER_VERSION", "who knows"),
        Unavailable("STATE_NOT_KEPT", "the next start may find it released"),
    ],
    ids=lambda error: error.reason,
)
def test_what_no_target_said_is_no_refusal(
    end: Source, fences: list[str], monkeypatch: pytest.MonkeyPatch, silence: WarmsyncError
) -> None:
    """It may have been released all the same."""
    monkeypatch.setattr(cutover_module, "_RETRY_SECONDS", 0)

    async def main() -> None:
        cutover = await seeded(end)
        end.peer.errors["release"] = [silence, silence]
        await cutover.run()
        assert end.peer.calls == ["prove 2", *["release 2"] * 3]
        assert end.is_fenced()
        assert "unfence" not in fences

    run(main)


OF_ONE_REQUEST = [
    NotFound("SESSION_NOT_FOUND", "no"),
    FailedPrecondition("SESSION_SUPERSEDED", "no"),
    InvalidArgument("BAD_CUTOVER_CERTIFICATE", "damaged, or it is what the target kept"),
    DataLoss("SIGNATURE_INVALID", "damaged"),
    ResourceExhausted("STATE_NOT_KEPT", "full"),
]


@pytest.mark.parametrize("error", OF_ONE_REQUEST, ids=lambda error: error.reason)
def test_what_a_later_request_is_told_leaves_the_owner_unknown(
    end: Source, monkeypatch: pytest.MonkeyPatch, error: WarmsyncError
) -> None:
    """A session that is lost, or a request that is damaged, says nothing of the one before."""
    monkeypatch.setattr(cutover_module, "_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(cutover_module, "RELEASE_SECONDS", 0.2)

    async def main() -> None:
        cutover = await seeded(end)
        end.peer.errors["release"] = [GONE, *[error] * 100]
        assert (await refusal(cutover)).reason == "OWNER_UNKNOWN"
        assert cutover.releasing
        assert end.is_fenced()

    run(main)


@pytest.mark.parametrize("error", OF_ONE_REQUEST, ids=lambda error: error.reason)
def test_what_is_said_of_the_first_request_is_said_of_all(
    end: Source, error: WarmsyncError
) -> None:
    async def main() -> None:
        cutover = await seeded(end)
        end.peer.errors["release"] = [error]
        assert (await refusal(cutover)).reason == error.reason
        assert not cutover.releasing

    run(main)


@pytest.mark.parametrize(
    ("cheap", "takes"), [(True, ["before", "after"]), (False, ["after"])], ids=["marks", "scan"]
)
def test_a_file_is_scanned_only_once(
    end: Source,
    fences: list[str],
    monkeypatch: pytest.MonkeyPatch,
    cheap: bool,
    takes: list[str],
) -> None:
    """A fence does not hurt who has a file open, so one pass, after the fence, is enough."""
    looks: list[str] = []

    def look() -> int:
        looks.append("after" if fences else "before")
        return 0

    for tracker in end.trackers:
        monkeypatch.setattr(tracker, "looks_cheaply", cheap)
        monkeypatch.setattr(tracker, "look", look)

    async def main() -> None:
        await (await seeded(end)).run()
        assert looks == [when for when in takes for _ in end.trackers]

    run(main)


def test_the_parts_of_the_downtime_sum_up(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second later than the one before."""
    seconds = iter(range(1000))
    monkeypatch.setattr(cutover_module, "time", SimpleNamespace(monotonic=lambda: next(seconds)))

    async def main() -> None:
        cutover = await seeded(end)
        end.carrier.flush_seconds = 0.25
        await cutover.run()
        progress = end.sender().progress
        parts = progress.downtime_parts
        assert parts.target_flush == 0.25
        assert parts.send == 0.75
        assert progress.downtime_seconds is not None
        # But for the last look, at the very end.
        assert sum(astuple(parts)) == progress.downtime_seconds - 1

    run(main)


def test_a_cancelled_cutover_lifts_the_fence(end: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fence may be on its way up, on a thread that cannot be stopped."""
    import threading

    raising, gate = threading.Event(), threading.Event()
    fence = SourceDisk.fence

    def slow(disk: SourceDisk) -> None:
        raising.set()
        assert gate.wait(20)
        fence(disk)

    monkeypatch.setattr(SourceDisk, "fence", slow)

    async def main() -> None:
        cutover = await seeded(end)
        running = asyncio.create_task(cutover.run())
        assert await asyncio.to_thread(raising.wait, 20)
        running.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        gate.set()
        await asyncio.wait([running])
        assert running.cancelled()
        assert not end.is_fenced()

    run(main)


def test_a_suspect_volume_is_sent_again_in_the_cutover(
    end: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rule 8: a tracker that cannot vouch for its marks costs time, not data."""
    tracker = end.trackers[0]
    take: Callable[[DirtyBitmap], Take] = tracker.take

    def suspect(into: DirtyBitmap) -> Take:
        take(into)
        into.set_all()
        return Take(SIZE, "counters disagree")

    async def main() -> None:
        cutover = await seeded(end)
        with end.images[0].open("r+b") as file:
            file.write(b"unseen by the tracker")
        monkeypatch.setattr(tracker, "take", suspect)
        await cutover.run()
        assert end.equal()
        assert end.sender().progress.suspect_volumes == 1

    run(main)


def test_both_sign_what_was_proved(end: Source) -> None:
    async def main() -> None:
        cutover = await seeded(end)
        await cutover.run()
        assert cutover.certificate is not None
        verify(cutover.certificate, {})
        said = cutover.certificate.statement
        assert (said.generation, said.migration, said.depth) == (2, end.plan.id, Depth.NONE)

    run(main)


def test_a_proof_that_fails_hands_nothing_over(end: Source) -> None:
    async def main() -> None:
        cutover = await seeded(end)
        end.peer.proofs = (Proof(0, b""), Proof(0, b"another"))
        assert (await refusal(cutover)).reason == "COPIES_DIFFER"
        assert releases(end) == []

    run(main)
