"""What is to be evacuated, read from a TOML or JSON file."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Machine:
    """A virtual machine, the agent it goes to, and its disks: (source, target)."""

    name: str
    peer: str
    volumes: tuple[tuple[str, str], ...]

    def migration(self, attempt: int) -> str:
        """Return the id of an attempt, from 1: after a restart the same, so nothing is remembered.

        Each has its own, as both agents remember the ids of those that ended.
        """
        return f"evacuate-{self.name}" if attempt == 1 else f"evacuate-{self.name}-{attempt}"


@dataclass(frozen=True, slots=True)
class Evacuation:
    """All that has to leave one host. `tls` is empty, or has the files cert, key and ca."""

    source: str
    power_down: tuple[str, ...]
    boot: tuple[str, ...]
    machines: tuple[Machine, ...]
    tls: dict[str, str]
    at_once: int = 2
    tries: int = 3
    max_downtime_seconds: float = 0.5


def load(path: Path) -> Evacuation:
    """Return the evacuation in a file. KeyError, TypeError or ValueError for one that is none."""
    text = path.read_text()
    found: dict[str, Any] = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    machines = tuple(
        Machine(one["name"], one["peer"], tuple((a, b) for a, b in one["volumes"]))
        for one in found["vm"]
    )
    return Evacuation(
        source=found["source"],
        power_down=tuple(found["power_down"]),
        boot=tuple(found["boot"]),
        machines=machines,
        tls=found.get("tls", {}),
        at_once=found.get("at_once", 2),
        tries=found.get("tries", 3),
        max_downtime_seconds=found.get("max_downtime_seconds", 0.5),
    )
