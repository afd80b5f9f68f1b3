"""The link to the target: made for the first time, and again after each loss.

Owns what both agree on before anything is sent: the durable generation, who owns the disks, and
whether the target still knows what it had. When to try again is `agent.source.patience`.
"""

from __future__ import annotations

from dataclasses import replace

from agent.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    WarmsyncError,
    is_from_transport,
)
from agent.migration import Owner
from agent.peer import Resumed
from agent.sender import Sender
from agent.source.books import Books
from agent.source.cutover import unknown_owner
from agent.source.doubts import Doubts
from agent.source.handover import Handover
from agent.source.prepared import Prepared
from agent.state import State


class Link:
    """One migration's."""

    def __init__(
        self,
        prepared: Prepared,
        books: Books,
        sender: Sender,
        doubts: Doubts,
        handover: Handover,
    ) -> None:
        self._peer = prepared.peer
        self._request = prepared.request
        self._books = books
        self._sender = sender
        self._doubts = doubts
        self._handover = handover
        # The session of a migration that an earlier agent began is not new to the target.
        self._is_known = prepared.restored is not None

    async def connect(self) -> None:
        """Reach the target: for the first time, or again."""
        is_known, self._is_known = self._is_known, True
        if is_known:
            await self._agree()
        if self._books.state is not State.CUT_OVER:
            request = self._sender.carrier_request(self._books.plan)
            self._sender.use(await self._peer.open_carrier(self._books.token, request))
            self._sender.note(trouble="")

    async def _agree(self) -> None:
        """Agree with the target on what is durable, and on who owns the disks."""
        books = self._books
        books.epoch += 1
        books.write_down()
        resumed = await self._resume()
        if resumed.released:
            await self._handover.hear_of_release(resumed.certificate)
            return
        await self._doubts.agree(resumed.generation)
        if books.state is State.CUTTING_OVER and not books.wants_cutover:
            await self._handover.stay_owner()

    async def _resume(self) -> Resumed:
        """Return what the target says of its session, or of one anew."""
        books = self._books
        try:
            return await self._peer.resume(books.secret, books.epoch)
        except WarmsyncError as error:
            if error.reason == "SESSION_NOT_FOUND":  # damage on the way says nothing of it
                return await self._reopen()
            if error.values.get("owner") == Owner.SOURCE and books.cutover is not None:
                books.cutover.releasing = False  # an answer: it has not been released
            if error.reason == "SOURCE_LOST":  # it has given us up: no other try will help
                raise FailedPrecondition("SOURCE_LOST", str(error)) from error
            raise

    async def _reopen(self) -> Resumed:
        """The target knows nothing of us: claim its devices again; it has nothing of ours.

        If the answer is lost, the next `resume` finds a session that says so too.
        """
        books = self._books
        if books.is_releasing:
            raise unknown_owner(self._peer.address)
        try:
            asked = replace(self._request, secret=books.secret, epoch=books.epoch)
            await self._peer.open_session(asked)
        except (FailedPrecondition, InvalidArgument, NotFound) as error:
            if is_from_transport(error):
                raise
            raise FailedPrecondition(
                "TARGET_NOT_CLAIMED",
                f"the target's agent has lost its state and cannot claim the devices again: {error}"
                "; then resume",
                **error.values,
            ) from error
        return Resumed(generation=0, released=False)
