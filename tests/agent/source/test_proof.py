"""The source's part in the proof: what is predicted, what is compared, what is signed of it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.certificate.roots import level_above, root_of
from agent.errors import DataLoss, FailedPrecondition, Unavailable
from agent.migration import Depth
from agent.peer import Proof, Unread
from agent.prover import Prover
from agent.source import proof as proof_module
from agent.source.proof import SourceProof
from agent.tree import DigestTree
from native.chunk import digests
from tests.agent.ends import SIZE, Source, source
from tests.agent.migrations import LOST
from tests.agent.rpc_helpers import run

MakeEnd = Callable[[Depth], Source]


@pytest.fixture
def make_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeEnd]:
    """`make_end(depth)`: two volumes, of which nothing was read yet."""
    made = []

    def make(depth: Depth) -> Source:
        made.append(source(tmp_path, monkeypatch, volumes=2, verify=depth))
        return made[-1].__enter__()

    yield make
    for each in made:
        each.__exit__(None, None, None)


def proof_of(end: Source) -> SourceProof:
    return SourceProof(end.plan, end.sender(), end.workshop)


def equal_proofs(end: Source) -> tuple[Proof, ...]:
    """Return what a target answers that holds the same."""
    roots = [root_of(level_above(digests(path.read_bytes())), SIZE) for path in end.images]
    return tuple(Proof(SIZE, root) for root in roots)


async def proving(proof: SourceProof, end: Source) -> None:
    await proof.prove(end.peer, "token", 0.0)


def test_equal_ends_are_stated(make_end: MakeEnd) -> None:
    end = make_end(Depth.FULL)
    end.peer.proofs = equal_proofs(end)

    async def main() -> None:
        said = await proof_of(end).prove(end.peer, "token", 0.0)
        assert (said.migration, said.depth, said.generation) == ("web1", Depth.FULL, 0)
        assert said.target.host == "there"
        for volume, image, proof in zip(said.volumes, end.images, end.peer.proofs, strict=True):
            assert (volume.source_path, volume.size_bytes) == (str(image), SIZE)
            assert volume.source_root == volume.target_root == proof.root
            assert volume.compared_bytes == SIZE

    run(main)


def test_an_answer_that_was_damaged_on_the_way_is_asked_for_again(make_end: MakeEnd) -> None:
    """Found by the gauntlet: the copies were equal, and the cutover was refused."""
    end = make_end(Depth.FULL)
    right = equal_proofs(end)
    damaged = replace(right[0], root=bytes([right[0].root[0] ^ 1]) + right[0].root[1:])

    def heal() -> None:
        def arrive() -> None:
            end.peer.proofs = right

        end.peer.before["prove"] = arrive

    end.peer.proofs = (damaged, *right[1:])
    end.peer.before["prove"] = heal

    async def main() -> None:
        said = await proof_of(end).prove(end.peer, "token", 0.0)
        assert [one.target_root for one in said.volumes] == [one.root for one in right]
        assert end.peer.calls == ["prove 0", "prove 0"]

    run(main)


def test_one_volume_that_differs_is_named(make_end: MakeEnd) -> None:
    end = make_end(Depth.FULL)
    first, second = equal_proofs(end)
    end.peer.proofs = (first, replace(second, root=first.root))

    async def main() -> None:
        with pytest.raises(DataLoss) as caught:
            await proving(proof_of(end), end)
        assert caught.value.reason == "COPIES_DIFFER"
        assert caught.value.values["source"] == str(end.images[1])
        assert caught.value.values["target"] == str(end.targets[1])

    run(main)


def test_less_compared_there_is_a_difference(make_end: MakeEnd) -> None:
    end = make_end(Depth.FULL)
    first, second = equal_proofs(end)
    end.peer.proofs = (replace(first, compared_bytes=SIZE - 512), second)

    async def main() -> None:
        with pytest.raises(DataLoss, match="are not equal"):
            await proving(proof_of(end), end)

    run(main)


def test_a_target_that_proves_other_volumes(make_end: MakeEnd) -> None:
    end = make_end(Depth.FULL)
    end.peer.proofs = equal_proofs(end)[:1]

    async def main() -> None:
        with pytest.raises(FailedPrecondition) as caught:
            await proving(proof_of(end), end)
        assert caught.value.reason == "PROTOCOL_MISMATCH"

    run(main)


def test_without_a_proof_nothing_is_read(
    make_end: MakeEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = make_end(Depth.NONE)

    def never(prover: Prover) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(Prover, "settle", never)
    monkeypatch.setattr(Prover, "wake", never)

    async def main() -> None:
        proof = proof_of(end)
        assert await proof.seconds(end.peer, "token") == 0.0
        proof.read_ahead(idle=True, budget_seconds=0.0)
        assert end.peer.calls == []
        said = await proof.prove(end.peer, "token", 0.0)
        assert [one.compared_bytes for one in said.volumes] == [0, 0]
        assert [one.source_root for one in said.volumes] == [None, None]

    run(main)


def test_a_final_proof_has_no_roots(make_end: MakeEnd) -> None:
    """Only the last round is compared: here there was none."""
    end = make_end(Depth.FINAL)

    async def main() -> None:
        sender = end.sender()
        await sender.send_seed(await sender.take(flush=False))
        for disk in end.disks:
            assert disk.tree is not None
        proof = proof_of(end)
        await proof._prover.settle()
        own = await proof._prover.ask(DigestTree.prove_last)
        end.peer.proofs = tuple(Proof(*one) for one in own)
        said = await proof.prove(end.peer, "token", 0.0)
        assert [one.source_root for one in said.volumes] == [None, None]
        end.peer.proofs = tuple(replace(one, root=bytes(16)) for one in end.peer.proofs)
        with pytest.raises(DataLoss):
            await proving(proof, end)

    run(main)


def test_a_source_that_cannot_be_read(make_end: MakeEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    end = make_end(Depth.FULL)
    end.peer.proofs = equal_proofs(end)

    async def fails(prover: Prover) -> int:
        raise OSError(errno.EIO, "a scratch", str(end.images[0]))

    monkeypatch.setattr(Prover, "settle", fails)

    async def main() -> None:
        with pytest.raises(DataLoss) as caught:
            await proving(proof_of(end), end)
        assert caught.value.reason == "SOURCE_IO_ERROR"

    run(main)


def test_a_target_that_does_not_answer_ends_the_reading_here(
    make_end: MakeEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = make_end(Depth.FULL)
    end.peer.errors["prove"] = [Unavailable("PEER_LOST", "gone")]
    begun, ended = asyncio.Event(), []

    async def settle(prover: Prover) -> int:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")
        return 0

    monkeypatch.setattr(Prover, "settle", settle)

    async def main() -> None:
        end.peer.gates["prove"] = begun  # it answers once the reading has begun
        with pytest.raises(Unavailable):
            await proving(proof_of(end), end)
        assert ended == ["cancelled"]

    run(main)


def test_the_prediction_is_that_of_the_slower_end(
    make_end: MakeEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = make_end(Depth.FULL)

    async def unread(token: str) -> Unread:
        return Unread(1000, 100.0)

    monkeypatch.setattr(end.peer, "unread", unread)

    async def main() -> None:
        proof = proof_of(end)
        # All is pending: it will be read here as it is sent, and there once more.
        there = sum(disk.count_touched() for disk in end.disks) + 1000
        assert await proof.seconds(end.peer, "token") == pytest.approx(there / 100)
        assert end.sender().progress.unproved_bytes == there
        proof._prover.rate_bytes_per_second = 1.0
        assert await proof.seconds(end.peer, "token") == pytest.approx(2 * SIZE)

    run(main)


def test_what_is_stale_is_read_ahead_if_it_is_worth_it(
    make_end: MakeEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = make_end(Depth.FULL)
    woken: list[Prover] = []

    def wake(prover: Prover) -> None:
        woken.append(prover)

    monkeypatch.setattr(Prover, "wake", wake)

    async def main() -> None:
        proof = proof_of(end)
        proof._prover.rate_bytes_per_second = 2 * SIZE  # a second for all
        budget = 1 / proof_module.AHEAD_SHARE
        proof.read_ahead(idle=False, budget_seconds=budget * 1.01)
        assert not woken
        proof.read_ahead(idle=False, budget_seconds=budget * 0.99)
        proof.read_ahead(idle=True, budget_seconds=budget * 1.01)
        assert len(woken) == 2
        for disk in end.disks:
            assert disk.tree is not None
            disk.tree.stale.clear()
        proof.read_ahead(idle=True, budget_seconds=0.0)
        assert len(woken) == 2

    run(main)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof_module, "ACK_SECONDS", 0.3)
    monkeypatch.setattr(proof_module, "LOOK_SECONDS", 0.01)


@pytest.mark.usefixtures("hasty")
def test_a_target_that_reads_nothing_is_given_up(make_end: MakeEnd) -> None:
    """Its disk hangs, its agent does not; the VM is off, and its disk fenced."""
    end = make_end(Depth.FULL)
    end.peer.gates["prove"] = asyncio.Event()

    async def main() -> None:
        with pytest.raises(Unavailable, match="it read nothing of its disk") as caught:
            await proving(proof_of(end), end)
        assert caught.value.reason == "PEER_LOST"
        assert end.peer.calls.count("unread") > 1

    run(main)


@pytest.mark.usefixtures("hasty")
def test_a_slow_target_is_waited_for(make_end: MakeEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it reads; also one that does not always say so."""
    end = make_end(Depth.FULL)
    end.peer.proofs = equal_proofs(end)
    gate = end.peer.gates["prove"] = asyncio.Event()
    left = [100]

    async def unread(token: str) -> Unread:
        left[0] -= 1
        if left[0] == 0:
            gate.set()
        if left[0] % 5:
            raise LOST
        return Unread(left[0], 1.0)

    monkeypatch.setattr(end.peer, "unread", unread)

    async def main() -> None:
        await proving(proof_of(end), end)
        assert left[0] <= 0

    run(main)


def test_an_answer_is_not_kept_waiting(make_end: MakeEnd, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a question that is not answered."""
    monkeypatch.setattr(proof_module, "LOOK_SECONDS", 0.0)
    end = make_end(Depth.FULL)
    end.peer.proofs = equal_proofs(end)
    end.peer.gates = {"prove": asyncio.Event(), "unread": asyncio.Event()}

    async def main() -> None:
        said = asyncio.ensure_future(proving(proof_of(end), end))
        await end.peer.until("unread")
        end.peer.gates["prove"].set()
        await said

    run(main)
