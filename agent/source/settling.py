"""What a person settles at the source: who owns the disks, where the agent cannot learn it.

Owns when that is for a person to say: never while the target answers. The end that follows is
`agent.source.ending`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from agent.errors import FailedPrecondition, NotFound, Unavailable, WarmsyncError, is_from_transport
from agent.journal import NOT_KEPT
from agent.migration import Owner
from agent.peer import Peer
from agent.source.books import Books
from agent.source.cutover import Cutover
from agent.source.ending import Ending
from agent.source.handover import Handover
from agent.state import Event, State

_log = logging.getLogger(__name__)

ASK_SECONDS = 10.0
"""How long the target is waited for before a person's word counts."""
EVENTS = {Owner.SOURCE: Event.SETTLE_SOURCE, Owner.TARGET: Event.SETTLE_TARGET}


class Settling:
    """One migration's."""

    def __init__(self, books: Books, handover: Handover, ending: Ending, peer: Peer) -> None:
        self._books = books
        self._commands = handover.commands
        self._ending = ending
        self._peer = peer

    async def settle(
        self,
        owner: Owner,
        stop: Callable[[], Awaitable[None]],
        check_staying: Callable[[], None],
    ) -> None:
        """End it as the person says; `stop` ends what drives it. Told once it is written down.

        FailedPrecondition OWNER_KNOWN where the agents know, or learn it from each other. What
        `check_staying` raises once the agent stops.
        """
        check_staying()
        async with self._commands:
            self._check(owner)
            doubted = self._doubt
            await self._check_silent()
            check_staying()  # a connection that was closed meanwhile is silent, too
            if doubted != self._doubt:  # the link was told meanwhile
                raise owner_known(
                    self._books.id, f"the target has just answered, it is {self._books.state} now"
                )
            self._enter(owner)
        await stop()
        await self._ending.settle(owner)

    @property
    def _doubt(self) -> tuple[State, Cutover | None, bool]:
        return self._books.state, self._books.cutover, self._books.is_releasing

    def _check(self, owner: Owner) -> None:
        books = self._books
        books.require(EVENTS[owner])
        if books.state is not State.CUTTING_OVER:
            return
        if not books.is_releasing:
            raise owner_known(
                books.id, "the source owns, as the target was not asked yet; wait, or cancel it"
            )
        if books.wants_cutover:
            raise FailedPrecondition(
                "CUTOVER_UNDER_WAY",
                f"migration {books.id} still asks its target for the release; wait for the end of "
                "the cutover (warmsync show)",
                id=books.id,
            )

    async def _check_silent(self) -> None:
        if not await self._answers():
            return
        at = f"the target at {self._peer.address} answers"
        if self._books.state is State.CUTTING_OVER:
            raise owner_known(self._books.id, f"{at}, and the source learns from it; wait and show")
        raise owner_known(
            self._books.id,
            f"{at}: roll back or finish; if it refuses, settle it at the target's agent first",
        )

    async def _answers(self) -> bool:
        """Return whether the target knows of the migration, whatever it says of it."""
        try:
            async with asyncio.timeout(ASK_SECONDS):
                await self._peer.unread(self._books.token)
        except (NotFound, TimeoutError):
            return False
        except Unavailable as error:
            return error.reason == "SOURCE_NOT_BACK"
        except WarmsyncError as error:
            return not (is_from_transport(error) or error.reason == "INTERNAL")
        return True

    def _enter(self, owner: Owner) -> None:
        books = self._books
        before = books.state, books.error, books.refusal
        books.error = books.refusal = None
        try:
            books.move(EVENTS[owner])
        except NOT_KEPT:
            _, books.error, books.refusal = before
            raise
        log_settled(books.id, owner, before[0])


async def ask_owner(peer: Peer, secret: str, epoch: int) -> Owner | None:
    """Return who owns by the target's word, None if it says nothing. `epoch` must be a new one.

    Not while a link asks too: the later epoch would end the other one.
    """
    try:
        async with asyncio.timeout(ASK_SECONDS):
            resumed = await peer.resume(secret, epoch)
    except TimeoutError:
        return None
    except WarmsyncError as error:  # only one that was not released says so
        return Owner.SOURCE if error.values.get("owner") == Owner.SOURCE else None
    return Owner.TARGET if resumed.released else Owner.SOURCE


def owner_known(name: str, what: str) -> FailedPrecondition:
    """Return the error for a migration of which a person has nothing to settle."""
    return FailedPrecondition(
        "OWNER_KNOWN", f"there is nothing to settle of migration {name}: {what}", id=name
    )


def log_settled(name: str, owner: Owner, before: State) -> None:
    """Say that a person has decided it, for whoever finds two owners one day."""
    _log.warning("owner settled by a person id=%s owner=%s was=%s", name, owner, before)
