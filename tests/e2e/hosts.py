"""Both hosts of a migration, whose agents are stopped, killed and started again."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from tests.e2e import agents
from tests.e2e.agents import Agent, Pair
from tests.e2e.disks import MIB

CHECKPOINT = 1 * MIB


class Hosts:
    """Two agents that can be stopped, killed and started again, each on its own port."""

    def __init__(
        self,
        directory: Path,
        pins: Path,
        stack: ExitStack,
        settings: Mapping[str, Mapping[str, object]] | None = None,
        allowed: tuple[str, ...] = (),
    ) -> None:
        self._settings = {"transfer": {"checkpoint_bytes": CHECKPOINT}} | dict(settings or {})
        self._allowed = (*agents.ALLOWED, *allowed)
        self._directory = directory
        self._pins = pins
        self._stack = stack
        self.source = self._start("source")
        self.target = self._start("target")

    @property
    def pair(self) -> Pair:
        return Pair(self.source, self.target)

    def _start(self, name: str, listen: str = "") -> Agent:
        running = agents.agent(
            name,
            self._directory,
            self._pins / name,
            listen=listen,
            allowed=self._allowed,
            settings=self._settings,
        )
        return self._stack.enter_context(running)

    def start(self, name: str) -> Agent:
        """Start an agent again, where it was."""
        before: Agent = getattr(self, name)
        made = self._start(name, before.address)
        setattr(self, name, made)
        return made

    def end(self, name: str, number: signal.Signals) -> None:
        """End an agent; by a signal that it obeys it must end well."""
        agent: Agent = getattr(self, name)
        agent.ends_well = False
        code = agent.stop(number)
        assert code == (-number if number is signal.SIGKILL else 0), agent.log.read_text()
