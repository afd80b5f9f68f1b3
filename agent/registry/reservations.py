"""Which ids and which devices are taken, by migrations that have not ended, at either end.

Owns that no device is in two migrations of one agent, and how many there may be. Opens nothing.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from agent.device import identities
from agent.errors import AlreadyExists, FailedPrecondition, ResourceExhausted
from agent.migration import Identity, Role


class Reservations:
    """One agent's; `limit` migrations at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Those of migrations that have not ended, and of ids being created.
        self._taken: dict[tuple[Role, str], list[Identity]] = {}

    def reserve(self, role: Role, name: str, existing: Container[str]) -> None:
        """Reserve an id. AlreadyExists, ResourceExhausted TOO_MANY_MIGRATIONS."""
        if name in existing or (role, name) in self._taken:
            raise AlreadyExists(
                "MIGRATION_EXISTS",
                f"there is a migration {name!r} already; choose another id, or delete it once it "
                "has ended",
                id=name,
            )
        if len(self._taken) >= self._limit:
            raise ResourceExhausted(
                "TOO_MANY_MIGRATIONS",
                f"this agent has {len(self._taken)} migrations under way, its limit; wait for one "
                "to end or raise limits.max_migrations",
                limit=self._limit,
            )
        self._taken[role, name] = []

    def take(self, role: Role, name: str, wanted: list[Identity]) -> None:
        """Take devices for an id. FailedPrecondition DEVICE_IN_MIGRATION."""
        for (other_role, other), held in self._taken.items():
            if (other_role, other) != (role, name):
                for one in wanted:
                    if any(one.overlaps(taken) for taken in held):
                        raise FailedPrecondition(
                            "DEVICE_IN_MIGRATION",
                            f"migration {other} has the device already ({one.device}); "
                            "end that one first",
                            id=other,
                            device=one.device,
                        )
        self._taken[role, name] = wanted

    def restore(self, role: Role, name: str, paths: Iterable[str]) -> None:
        """Take again what a migration had, whatever else is taken; nothing for what is gone."""
        self._taken[role, name] = [one for path in paths for one in _identities(path)]

    def free(self, role: Role, name: str) -> None:
        """Give back what an id has; nothing if it has nothing."""
        self._taken.pop((role, name), None)


def _identities(path: str) -> tuple[Identity, ...]:
    """Return what a path really is now; nothing if it is not there."""
    try:
        return identities(path)
    except OSError:
        return ()
