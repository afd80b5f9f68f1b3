"""Errors of the domain: each has a stable reason, the values it speaks of, and the mend.

Owns what can go wrong and how it is said. Knows no transport: `agent.rpc.errors` maps the
classes here to status codes.
"""

from __future__ import annotations


class WarmsyncError(Exception):
    """Base of all errors that an operator or a controller gets to see.

    `reason` is UPPER_SNAKE_CASE and stable; `values` are what the message speaks of; the message
    is one line that names the value and ends with the mend.
    """

    def __init__(self, reason: str, message: str, **values: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.values = {name: str(value) for name, value in values.items()}


_TRANSPORT = frozenset({"BAD_MESSAGE", "CALL_CANCELLED", "UNSUPPORTED_BY_PEER"})


def is_from_transport(error: WarmsyncError) -> bool:
    """Return whether the transport said so, and not the other agent, which may have done all."""
    return error.reason in _TRANSPORT or error.reason.startswith("PEER_")


class InvalidArgument(WarmsyncError):  # noqa: N818 - named after the condition, as its status is
    """The request is wrong whatever the state of the system."""


class NotFound(WarmsyncError):  # noqa: N818
    """Something named does not exist."""


class AlreadyExists(WarmsyncError):  # noqa: N818
    """Something of that name exists already."""


class NotAllowed(WarmsyncError):  # noqa: N818
    """This host's configuration, or the operating system, does not permit it."""


class FailedPrecondition(WarmsyncError):  # noqa: N818
    """The system is not in a state for this; it may be later."""


class ResourceExhausted(WarmsyncError):  # noqa: N818
    """A disk, a limit or a quota is full."""


class Unavailable(WarmsyncError):  # noqa: N818
    """The peer cannot be reached or went away."""


class DataLoss(WarmsyncError):  # noqa: N818
    """Data could not be read or written, or came through damaged."""


class Cancelled(WarmsyncError):  # noqa: N818
    """The migration was cancelled meanwhile."""


def agent_stopped() -> Unavailable:
    """Return the error of a call that the end of the agent met."""
    return Unavailable(
        "AGENT_STOPPED", "the agent was stopped; its migrations go on when it is started again"
    )
