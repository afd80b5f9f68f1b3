"""The field: two agents, a network between them, disks with a writer on them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests import guest
from tests.e2e import agents
from tests.e2e.agents import ALLOWED, Agent, Answer, Shown
from tests.e2e.disks import MIB
from tests.e2e.test_transport import Authority
from tests.gauntlet.host import Host
from tests.gauntlet.proxy import Proxy
from tests.gauntlet.schedule import WRITERS, Schedule
from tests.gauntlet.volumes import Volume, guest_disk, make_volume

SECONDS = 180.0
"""How long anything may take before it counts as a hang; nothing is measured with it."""

RETRIES = (
    "PEER_UNREACHABLE",
    "DEADLINE_EXCEEDED",
    "AGENT_STOPPED",
    "TLS_HANDSHAKE_FAILED",
    "NOT_TAKEN_UP",
)

_ASK = """
import sys
from agent.cli import cli
print("ready", flush=True)
sys.stdin.readline()
cli()
"""

GONE = "GONE"
"""The state of a migration that its agent has forgotten."""

DIFFER = "copies differ id="
"""What an agent logs of a proof that did not hold."""
_DAMAGE = {"garble much": ("DecodeError", DIFFER), "garble": ("DecodeError",)}
"""What agents may say of what was spoilt on the way, where no TLS notices it: gRPC of a message
that is none, and of a proof that differs (it is asked for twice, not twelve times)."""


def expected(plan: Schedule) -> tuple[str, ...]:
    """Return what agents may log in a schedule, see `Agent.expects`."""
    return () if plan.tls else next((_DAMAGE[one] for one in _DAMAGE if one in plan.kinds), ())


class BreachError(AssertionError):
    """The product has not kept its word."""


class Field:
    """What one schedule is played on."""

    def __init__(
        self, plan: Schedule, directory: Path, pins: Path, stack: ExitStack, breach: str
    ) -> None:
        self.plan = plan
        self.directory, self._pins, self._stack = directory, pins, stack
        authority = Authority(directory / "ca")
        self._flags = {name: authority.flags(name) for name in ("source", "target", "client")}
        self.volumes: list[Volume] = [
            make_volume(stack, plan, i, directory) for i in range(len(plan.volumes))
        ]
        self.machines = [one.machine for one in self.volumes if one.machine is not None]
        self.hosts = {name: Host(directory, name, plan, breach) for name in ("source", "target")}
        self._agents = stack.enter_context(ExitStack())  # ends before its devices
        self.source = self._start("source")
        self.target = self._start("target")
        port = int(self.target.address.rpartition(":")[2])
        self.proxy = Proxy("127.0.0.2", "127.0.0.1", (port, port + 1))
        stack.callback(self.proxy.close)
        self.peer = f"127.0.0.2:{port}"
        self.writers: list[subprocess.Popen[str]] = []

    def _start(self, name: str, listen: str = "") -> Agent:
        running = agents.agent(
            name,
            self.directory,
            self._pins / name,
            *(self._flags[name] if self.plan.tls else ()),
            listen=listen,
            allowed=(*ALLOWED, f"{self.directory}/vm*/*"),
            command=self.hosts[name].command,
            client=self._flags["client"] if self.plan.tls else (),
            settings={"transfer": {"checkpoint_bytes": MIB}, "qemu": self._qemu(name)},
        )
        agent = self._agents.enter_context(running)
        agent.expects = expected(self.plan)
        return agent

    def _qemu(self, name: str) -> dict[str, object]:
        """Return what an agent is allowed: only the source's host has machines."""
        sockets = [one.settings for one in self.machines] if name == "source" else []
        return {
            "sockets": [qmp for qmp, _ in sockets],
            "nbd_sockets": [nbd for _, nbd in sockets],
            "run_dir": str(self.directory / f"{name}-run"),
        }

    def boot(self) -> None:
        """Let the writers begin; machines that are down are started."""
        for machine in self.machines:
            machine.start()
        self.writers.clear()
        options = (*WRITERS[self.plan.writer], "--rate=4m,4m,4m", "--time_based", "--runtime=900")
        for volume in self.volumes:
            path, start, room = guest_disk(volume, self.plan)
            size = room // 4096 * 4096
            if self.plan.writer == "verify":  # every block is to have its header
                whole = ("--rw=write", "--end_fsync=1", *WRITERS["verify"][1:])
                guest.finish(guest.fio(path, *whole))
            limit = () if self.plan.writer == "verify" else (f"--size={size}", f"--offset={start}")
            writer = guest.boot(path, *options, *limit, f"--randseed={self.plan.seed}")
            self.writers.append(writer)
            self._stack.callback(guest.destroy, writer)

    def crash(self) -> None:
        """The guests end in the middle of what they do, and their machines without a word."""
        for writer in self.writers:
            guest.destroy(writer)
        for machine in self.machines:
            machine.kill()

    def power_off(self) -> None:
        """End the writers, and the machines if these are to end with their guests."""
        for writer in self.writers:
            # A cutover under a running guest may fence it for a moment: it has errors then.
            with suppress(AssertionError) if "cutover early" in self.plan.kinds else ExitStack():
                guest.power_off(writer)
        for machine in self.machines:
            if self.plan.qemu_exits:
                machine.exit()

    def agent(self, name: str) -> Agent:
        """Return the source's or the target's agent."""
        return self.source if name == "source" else self.target

    def state_dir(self, name: str) -> Path:
        """Return where an agent keeps what it knows."""
        return self.directory / name

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

    def prepare(self, *words: str) -> subprocess.Popen[str]:
        """Start a command for the source in a process of its own; a line lets it ask, at once."""
        agent = self.source
        asking = subprocess.Popen(
            [sys.executable, "-c", _ASK, *words, "--agent", agent.address, *agent.flags, "--json"],
            cwd=agents.ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert asking.stdout is not None
        if asking.stdout.readline() != "ready\n":
            raise RuntimeError(f"{words}: {asking.communicate()}")
        return asking

    def wait(self, name: str, *states: str) -> Shown:
        """Wait for a state; what a person is asked to do meanwhile is done."""
        deadline = time.monotonic() + SECONDS
        while True:
            shown = self.shown(name)
            if shown["state"] in (*states, GONE) or self.is_undecided(shown):
                return shown
            if shown["state"] == "PAUSED":
                self.source.run("resume", name)
            if time.monotonic() > deadline:
                raise BreachError(f"hangs: not {states} within {SECONDS:.0f} s: {shown}")
            time.sleep(0.05)

    def is_undecided(self, shown: Shown) -> bool:
        """Whether a person has to decide who owns: the target has lost its state in the release."""
        reason = (shown["error"] or shown["last_refusal"] or {}).get("reason")
        return (
            "target forgets" in self.plan.kinds
            and (shown["state"], reason) == ("CUTTING_OVER", "OWNER_UNKNOWN")
            and self.there(shown["id"]) == GONE
        )

    def there(self, name: str) -> str:
        """Return the migration's state at the target."""
        return str(self.ask(self.target, "show", name).shown.get("state", GONE))


@contextmanager
def field(plan: Schedule, directory: Path, pins: Path, breach: str = "") -> Iterator[Field]:
    """Everything that a schedule needs, gone at the end whatever happens."""
    with ExitStack() as stack:
        yield Field(plan, directory, pins, stack, breach)
