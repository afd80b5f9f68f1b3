"""A migration that was found possible on both hosts, before it is driven. A value, nothing more."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.brake import Brake
from agent.disk import SourceDisk
from agent.hook import HookRun, no_hook
from agent.migration import Plan, Scheme
from agent.peer import Peer, SessionRequest
from agent.record import SourceRecord
from agent.signer import Signer


@dataclass(frozen=True, slots=True)
class Prepared:
    """A migration that was found possible on both hosts: tracked here, claimed there.

    `restored` is what the agent before this one wrote down; `suspect` why its marks are not
    believed, if they are not.
    """

    plan: Plan
    scheme: Scheme
    scheme_reason: str
    disks: list[SourceDisk]
    peer: Peer
    secret: str
    request: SessionRequest
    signer: Signer
    brake: Brake | None = None
    restored: SourceRecord | None = None
    suspect: str = ""
    quiesce: HookRun = field(default_factory=no_hook)
