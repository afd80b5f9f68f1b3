"""The delivery of one session's devices: proved, grown if that was asked for, released.

Owns what this end signs: only what it knows of its own bytes, read back after the last write. From
the release on the target owns; what was grown and not released is not what was acknowledged.
"""

from __future__ import annotations

import asyncio

from agent.certificate import Certificate, Signature, signature_of, verify
from agent.certificate import dump as dump_certificate
from agent.certificate.statement import Statement, parse_statement
from agent.device import io_error
from agent.errors import FailedPrecondition
from agent.journal import NOT_KEPT
from agent.migration import Depth, Resize, Role
from agent.peer import Proof
from agent.signer import Signer
from agent.state import Event, State
from agent.target.holding import Holding
from agent.target.intake import Intake
from agent.target.ledger import Ledger


class Delivery:
    """One session's."""

    def __init__(self, ledger: Ledger, holding: Holding, intake: Intake, signer: Signer) -> None:
        self._ledger = ledger
        self._holding = holding
        self._intake = intake
        self._signer = signer

    async def prove(self, generation: int) -> tuple[Proof, ...]:
        """Return what was read back of each volume, all after this generation and no later one."""
        holding = self._holding
        self._check_releasable(generation)
        if self._ledger.resizing:
            raise _not_proven(self._ledger.id)
        if holding.proof is None:
            try:
                proof = await holding.witness.prove()
            except OSError as error:
                raise io_error("target", error) from error
            except ValueError as error:  # the devices were closed meanwhile
                raise self._ledger.shut() from error
            self._check_releasable(generation)
            holding.proof = proof
        return holding.proof

    async def resize(self, generation: int) -> tuple[Resize, ...]:
        """Grow what is on the devices, as they were proved. May be repeated until the release.

        FailedPrecondition NOT_PROVEN, DataLoss GROW_NOT_UNDONE. Whatever comes of it, nothing is
        received any more before the source has come back; then it has to compare.
        """
        holding = self._holding
        if self._ledger.state is State.CUT_OVER:
            return self._ledger.progress.resizes
        self._check_releasable(generation)
        if not self._is_proven:
            raise _not_proven(self._ledger.id)
        if holding.grown is None:
            holding.grown = asyncio.ensure_future(self._grow())
            holding.grown.add_done_callback(lambda done: done.cancelled() or done.exception())
        # It goes on if the caller hangs up.
        return await asyncio.shield(holding.grown)

    async def _grow(self) -> tuple[Resize, ...]:
        ledger, holding = self._ledger, self._holding
        async with holding.changing:
            epoch = ledger.epoch
            await self._intake.cut_streams()
            ledger.resizing = True
            try:
                ledger.write_down()
            except NOT_KEPT:
                ledger.resizing = False
                raise
            resizes = await asyncio.shield(holding.growth.start(tuple(holding.devices)))
            self._check_releasable(ledger.generation)
            if epoch != ledger.epoch:
                raise ledger.superseded()
            ledger.note(resizes=resizes)
            ledger.write_down()
            ledger.bell.ring()
            return resizes

    def release(self, generation: int, statement: bytes, signature: Signature) -> Signature:
        """Hand over: the claim is dropped so that the VM can boot. May be repeated.

        `statement` is what the source has signed; returns this end's signature. FailedPrecondition
        NOT_PROVEN unless it says what was read back here, and nothing was written since.
        """
        ledger = self._ledger
        # Ended by a person meanwhile, who has seen the release that its source has not.
        if ledger.state in (State.CUT_OVER, State.COMPLETED):
            return signature_of(ledger.certificate.encode(), Role.TARGET)
        self._check_releasable(generation)
        self._intake.join()
        said = parse_statement(statement)
        self._check_statement(said)
        own = self._signer.sign(said, Role.TARGET)
        certificate = Certificate(said, (signature, own))
        verify(certificate, {})
        ledger.certificate = dump_certificate(certificate).decode()
        try:
            ledger.move(Event.CUT_OVER, Event.RELEASE)
        except NOT_KEPT:
            ledger.certificate = ""
            raise
        self._intake.close()
        self._holding.give_back()
        return own

    @property
    def _is_proven(self) -> bool:
        """Whether what was read back is what is there: nothing was written since."""
        holding = self._holding
        settled = not self._intake.is_writing and holding.witness.is_settled
        return holding.proof is not None and settled

    def _check_releasable(self, generation: int) -> None:
        ledger = self._ledger
        if ledger.state is not State.SYNCING or generation != ledger.generation:
            raise FailedPrecondition(
                "NOT_RELEASABLE",
                f"migration {ledger.id} is {ledger.state} at generation {ledger.generation} here, "
                f"not at {generation}; cancel it and start a new one",
                id=ledger.id,
                generation=ledger.generation,
            )

    def _check_statement(self, said: Statement) -> None:
        """What this end signs is what it knows: its own bytes, read back after the last write."""
        ledger = self._ledger
        plan = ledger.plan
        volumes = zip(plan.volumes, said.volumes, self._holding.proof or (), strict=False)
        full = plan.verify is Depth.FULL
        if (
            not self._is_proven
            or (said.migration, said.generation) != (ledger.id, ledger.generation)
            or said.depth is not plan.verify
            or len(said.volumes) != len(plan.volumes)
            or not all(
                (one.target_path, one.size_bytes) == (volume.target, volume.size_bytes)
                and one.compared_bytes == proof.compared_bytes
                and one.target_root == (proof.root if full else None)
                for volume, one, proof in volumes
            )
        ):
            raise _not_proven(ledger.id)


def _not_proven(name: str) -> FailedPrecondition:
    return FailedPrecondition(
        "NOT_PROVEN",
        f"what the source says of migration {name} is not what was read back here; cut over again",
        id=name,
    )
