"""The field: two agents, a network between them, disks with a writer on them."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests import guest
from tests.e2e import agents, disks
from tests.e2e.agents import ALLOWED, Agent, Answer, Shown
from tests.e2e.disks import MIB
from tests.e2e.test_transport import Authority
from tests.gauntlet.host import Host
from tests.gauntlet.proxy import Proxy
from tests.gauntlet.schedule import WRITERS, Schedule
from tests.gauntlet.volumes import Volume, guest_disk, make_volume

SECONDS = 60.0
"""How long anything may take before it counts as a hang; nothing is measured with it."""

RETRIES = ("PEER_UNREACHABLE", "DEADLINE_EXCEEDED", "AGENT_STOPPED", "TLS_HANDSHAKE_FAILED")

GONE = "GONE"
"""The state of a migration that its agent has forgotten."""


class BreachError(AssertionError):
    """The product has not kept its word."""


class Field:
    """What one schedule is played on."""

    def __init__(
        self, plan: Schedule, directory: Path, pins: Path, stack: ExitStack, breach: str
    ) -> None:
        self.plan = plan
        self._directory, self._pins, self._stack = directory, pins, stack
        authority = Authority(directory / "ca")
        self._flags = {name: authority.flags(name) for name in ("source", "target", "client")}
        self.volumes: list[Volume] = [make_volume(stack, plan, i) for i in range(len(plan.volumes))]
        self.hosts = {name: Host(directory, name, plan, breach) for name in ("source", "target")}
        self._agents = stack.enter_context(ExitStack())  # ends before its devices
        self.source = self._start("source", f"127.0.0.1:{_free_ports()}")
        self.target = self._start("target", f"127.0.0.1:{_free_ports()}")
        port = int(self.target.address.rpartition(":")[2])
        self.proxy = Proxy("127.0.0.2", "127.0.0.1", (port, port + 1))
        stack.callback(self.proxy.close)
        self.peer = f"127.0.0.2:{port}"
        self.writers: list[subprocess.Popen[str]] = []

    def _start(self, name: str, listen: str) -> Agent:
        running = agents.agent(
            name,
            self._directory,
            self._pins / name,
            *(self._flags[name] if self.plan.tls else ()),
            listen=listen,
            allowed=ALLOWED,
            command=self.hosts[name].command,
            client=self._flags["client"] if self.plan.tls else (),
            settings={"transfer": {"checkpoint_bytes": MIB}},
        )
        return self._agents.enter_context(running)

    def boot(self) -> None:
        """Let the writers begin."""
        options = (*WRITERS[self.plan.writer], "--rate=4m,4m,4m", "--time_based", "--runtime=900")
        for volume in self.volumes:
            path, start = guest_disk(volume, self.plan)
            size = disks.size_of(volume.source) // 4096 * 4096
            if self.plan.writer == "verify":  # every block is to have its header
                guest.finish(guest.fio(path, "--rw=write", *WRITERS["verify"][1:]))
            limit = () if self.plan.writer == "verify" else (f"--size={size}", f"--offset={start}")
            writer = guest.boot(path, *options, *limit, f"--randseed={self.plan.seed}")
            self.writers.append(writer)
            self._stack.callback(guest.destroy, writer)

    def power_off(self) -> None:
        """End the writers."""
        for writer in self.writers:
            # A cutover under a running guest may fence it for a moment: it has errors then.
            with suppress(AssertionError) if "cutover early" in self.plan.kinds else ExitStack():
                guest.power_off(writer)

    def agent(self, name: str) -> Agent:
        """Return the source's or the target's agent."""
        return self.source if name == "source" else self.target

    def state_dir(self, name: str) -> Path:
        """Return where an agent keeps what it knows."""
        return self._directory / name

    def end(self, name: str, number: signal.Signals) -> None:
        """End an agent."""
        agent = self.agent(name)
        agent.ends_well = False
        if agent.process.poll() is None:
            agent.stop(number)

    def start(self, name: str) -> None:
        """Start an agent again."""
        before = self.agent(name)
        if before.process.poll() is not None:
            setattr(self, name, self._start(name, before.address))

    def shown(self, name: str) -> Shown:
        """Return the migration at the source, as soon as its agent answers."""
        answer = self.ask(self.source, "show", name)
        if answer.code and answer.error["reason"] == "MIGRATION_NOT_FOUND":
            return {"state": GONE, "error": None}
        return dict(answer.shown)

    def ask(self, agent: Agent, *words: str) -> Answer:
        """Ask an agent that may just have been started."""
        deadline = time.monotonic() + SECONDS
        while True:
            answer = agent.run(*words)
            if answer.code and not answer.shown.get("error"):
                raise BreachError(f"{words} failed without an object: {answer}")
            error = answer.shown.get("error") or {}
            if answer.code == 0 or error.get("reason") not in RETRIES:
                return answer
            if time.monotonic() > deadline:
                raise BreachError(f"{agent.name} does not answer {words}: {answer}")
            time.sleep(0.05)

    def wait(self, name: str, *states: str) -> Shown:
        """Wait for a state; what a person is asked to do meanwhile is done."""
        deadline = time.monotonic() + SECONDS
        while True:
            shown = self.shown(name)
            if shown["state"] in (*states, GONE):
                return shown
            if shown["state"] == "PAUSED":
                self.source.run("resume", name)
            if time.monotonic() > deadline:
                raise BreachError(f"hangs: not {states} within {SECONDS:.0f} s: {shown}")
            time.sleep(0.05)


@contextmanager
def field(plan: Schedule, directory: Path, pins: Path, breach: str = "") -> Iterator[Field]:
    """Everything that a schedule needs, gone at the end whatever happens."""
    with ExitStack() as stack:
        yield Field(plan, directory, pins, stack, breach)


def _free_ports() -> int:
    """Return a port that is free together with the one after it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue
