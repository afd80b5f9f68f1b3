"""Where on the host an agent keeps what is not in its journal. Makes and removes nothing."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from agent.config import AgentConfig


@dataclass(frozen=True, slots=True)
class Places:
    """The directories. `mark` tells this agent's things on the host from those of another."""

    mark: str
    brakes: Path
    pins: Path
    volumes: Path
    digests: Path
    resizes: Path
    hooks: Path

    def hook(self, migration: str, name: str) -> Path:
        """Return where the run of a migration's hook lies."""
        return self.hooks / f"{migration}-{name}"


def places_of(config: AgentConfig) -> Places:
    """Return the places of an agent with this configuration."""
    state = Path(config.state_dir)
    mark = hashlib.sha256(os.path.realpath(config.state_dir).encode()).hexdigest()[:12]
    return Places(
        mark,
        brakes=state / "brakes",
        pins=Path(config.bpffs_dir) / mark,
        volumes=state / "volumes",
        digests=state / "targets",
        resizes=state / "resize",
        hooks=state / "hooks",
    )
