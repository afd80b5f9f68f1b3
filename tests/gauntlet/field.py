"""The field: two agents, a network between them, disks with a writer on them; and the judge."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests import content, devices, guest
from tests.e2e import agents, disks
from tests.e2e.agents import ALLOWED, ENDED, Agent, Answer, Shown
from tests.e2e.disks import MIB
from tests.e2e.test_transport import Authority
from tests.gauntlet.proxy import Proxy
from tests.gauntlet.schedule import WRITERS, Fault, Schedule

SECONDS = 60.0
"""How long anything may take before it counts as a hang; nothing is measured with it."""

RETRIES = ("PEER_UNREACHABLE", "DEADLINE_EXCEEDED", "AGENT_STOPPED")


class BreachError(AssertionError):
    """The product has not kept its word."""


class Field:
    """What one schedule is played on."""

    def __init__(self, plan: Schedule, directory: Path, pins: Path, stack: ExitStack) -> None:
        self.plan = plan
        self._directory, self._pins, self._stack = directory, pins, stack
        authority = Authority(directory / "ca")
        self._flags = {name: authority.flags(name) for name in ("source", "target", "client")}
        self.faulty: devices.FaultyDevice | None = None
        self.volumes = [self._volume(i) for i in range(len(plan.sources))]
        self._agents = stack.enter_context(ExitStack())  # ends before its devices
        self.source = self._start("source", "127.0.0.1:0")
        self.target = self._start("target", "127.0.0.1:0")
        port = int(self.target.address.rpartition(":")[2])
        self.proxy = Proxy("127.0.0.2", "127.0.0.1", (port, port + 1))
        stack.callback(self.proxy.close)
        self.peer = f"127.0.0.2:{port}"
        self.writers: list[subprocess.Popen[str]] = []

    def _volume(self, index: int) -> tuple[str, str]:
        plan, stack = self.plan, self._stack
        size = plan.sizes_mib[index] * MIB
        source = disks.KINDS[plan.sources[index]](stack, size)
        if index == 0 and any(fault.kind == "target EIO" for fault in plan.faults):
            self.faulty = stack.enter_context(devices.faulty_device(2 * size + MIB, 4096))
            target = self.faulty.path
        else:
            target = disks.KINDS["loop4k"](stack, 2 * size + MIB)
        content.fill(source, plan.seed + index)
        disks.soil(target, plan.seed + 100 + index)
        return source, target

    def _start(self, name: str, listen: str) -> Agent:
        port = _free_ports() if listen.endswith(":0") else 0
        where = f"127.0.0.1:{port}" if port else listen
        flags = self._flags[name] if self.plan.tls else ()
        client = self._flags["client"] if self.plan.tls else ()
        running = agents.agent(
            name,
            self._directory,
            self._pins / name,
            *flags,
            listen=where,
            allowed=ALLOWED,
            client=client,
            settings={"transfer": {"checkpoint_bytes": MIB}},
        )
        return self._agents.enter_context(running)

    def boot(self) -> None:
        """Let the writers begin."""
        options = (*WRITERS[self.plan.writer], "--rate=4m,4m,4m", "--time_based", "--runtime=900")
        for path, _ in self.volumes:
            if self.plan.writer == "verify":  # every block is to have its header
                guest.finish(guest.fio(path, "--rw=write", *WRITERS["verify"][1:]))
            size = disks.size_of(path) // 4096 * 4096
            limit = () if self.plan.writer == "verify" else (f"--size={size}",)
            writer = guest.boot(path, *options, *limit, f"--randseed={self.plan.seed}")
            self.writers.append(writer)
            self._stack.callback(guest.destroy, writer)

    def power_off(self) -> None:
        """End the writers."""
        for writer in self.writers:
            guest.power_off(writer)

    def end(self, name: str, number: signal.Signals) -> None:
        """End an agent."""
        agent: Agent = getattr(self, name)
        agent.ends_well = False
        if agent.process.poll() is None:
            agent.stop(number)

    def start(self, name: str) -> None:
        """Start an agent again."""
        before: Agent = getattr(self, name)
        if before.process.poll() is not None:
            setattr(self, name, self._start(name, before.address))

    def strike(self, fault: Fault, name: str) -> None:
        """Let a fault happen, and pass."""
        time.sleep(fault.delay_seconds)
        kind, _, who = fault.kind.partition(" ")
        if kind in ("kill", "stop"):
            self._strike_agents(kind, who, fault.seconds / 4)
        elif kind == "freeze":
            agent: Agent = getattr(self, who)
            agent.process.send_signal(signal.SIGSTOP)
            time.sleep(fault.seconds)
            agent.process.send_signal(signal.SIGCONT)
        elif kind == "target":
            self._strike_target(fault)
        elif kind in ("pause", "limit", "cancel"):
            self._command(fault, name)
        else:
            self._strike_network(fault)

    def _strike_agents(self, kind: str, who: str, seconds: float) -> None:
        both = ("source", "target") if who == "both" else (who,)
        for one in both:
            self.end(one, signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        time.sleep(seconds)
        for one in both:
            self.start(one)

    def _strike_network(self, fault: Fault) -> None:
        proxy = self.proxy
        match fault.kind:
            case "cut":
                proxy.cut()
            case "hold" | "hold answers":
                hold = proxy.hold if fault.kind == "hold" else proxy.hold_answers
                hold(held=True)
                time.sleep(fault.seconds)
                hold(held=False)
            case "delay":
                proxy.delay(0.05)
                time.sleep(fault.seconds)
                proxy.delay(0.0)
            case "garble":
                proxy.garble(1)
            case _:
                raise ValueError(fault.kind)

    def _command(self, fault: Fault, name: str) -> None:
        if fault.kind == "pause":
            self.source.run("pause", name)
            time.sleep(fault.seconds / 4)
            self.source.run("resume", name)
        elif fault.kind == "limit":
            self.source.run("update", name, "--bandwidth-limit", "4M")
        else:
            self.source.run("cancel", name)

    def _strike_target(self, fault: Fault) -> None:
        if fault.kind == "target forgets":
            self.end("target", signal.SIGKILL)
            for path in (self._directory / "target").glob("journal.db*"):
                path.unlink()
            self.start("target")
        elif self.faulty is not None:
            with self.faulty.failing("pwrite"):
                time.sleep(fault.seconds / 2)

    def shown(self, name: str) -> Shown:
        """Return the migration at the source, as soon as its agent answers."""
        return dict(self.ask(self.source, "show", name).shown)

    def ask(self, agent: Agent, *words: str) -> Answer:
        """Ask an agent that may just have been started."""
        deadline = time.monotonic() + SECONDS
        while True:
            answer = agent.run(*words)
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
            if shown["state"] in states:
                return shown
            if shown["state"] == "PAUSED":
                self.source.run("resume", name)
            if time.monotonic() > deadline:
                raise BreachError(f"hangs: not {states} within {SECONDS:.0f} s: {shown}")
            time.sleep(0.05)

    def cut_over(self, name: str, *, strikes: bool) -> Shown:
        """Ask for the cutover, and perhaps strike a moment later."""
        plan = self.plan
        asking = self.source.start("cutover", name, "--force")
        if strikes and plan.cutover_fault != "none":
            time.sleep(plan.cutover_delay_seconds)
            self.strike(Fault(plan.cutover_fault, 0.0, 1.0), name)
        with suppress(subprocess.TimeoutExpired):
            asking.communicate(timeout=SECONDS)
        asking.kill()
        asking.communicate()
        self.proxy.heal()
        return self.wait(name, "CUT_OVER", "CONVERGED", *ENDED)

    def judge(self, name: str, shown: Shown) -> str:
        """Hold what is against what was promised; returns how it ended."""
        there = self.ask(self.target, "show", name).shown.get("state", "gone")
        if shown["state"] in ("CUT_OVER", "COMPLETED"):
            self._judge_success(shown, there)
            return "cut over"
        if shown["state"] not in ("FAILED", "CANCELLED"):
            raise BreachError(f"neither done nor failed: {shown}")
        if shown["state"] == "FAILED" and not shown["error"]:
            raise BreachError(f"failed without a word: {shown}")
        if there in ("CUT_OVER", "COMPLETED"):
            raise BreachError(f"given up, and the target is released all the same: {shown}")
        for path, _ in self.volumes:
            if disks.is_fenced(path):
                raise BreachError(f"nobody may write: {path} is fenced, the target not released")
            disks.assert_writable(path)
        if shown["state"] == "FAILED":
            print(f"failed: {shown['error']['reason']}: {shown['error']['message']}", flush=True)
            return "failed"
        return "cancelled"

    def _judge_success(self, shown: Shown, there: str) -> None:
        if there not in ("CUT_OVER", "COMPLETED"):
            raise BreachError(f"two owners, or none: source {shown['state']}, target {there}")
        for source, target in self.volumes:
            if not disks.is_fenced(source):
                raise BreachError(f"two owners: {source} is not fenced")
            if not disks.is_free(target):
                raise BreachError(f"{target} is still claimed")
            try:
                disks.assert_equal(source, target)
            except AssertionError as error:
                raise BreachError(f"bytes lost: {source}, {target}: {error}") from error
            if self.plan.writer == "verify":
                guest.finish(guest.fio(target, "--rw=read", *WRITERS["verify"][1:4]))


def play(plan: Schedule, directory: Path, pins: Path) -> str:
    """Play a schedule; returns how it ended. BreachError if the product broke a promise."""
    with field(plan, directory, pins) as ground:
        ground.boot()
        words = ["--tracker", plan.tracker, "--carrier", plan.carrier, "--max-downtime", "20s"]
        words += ["--bandwidth-limit", "16M", "--id", f"g{plan.seed}"]
        volumes = [word for pair in ground.volumes for word in ("--volume", ":".join(pair))]
        begun = ground.source.ask("migrate", "--peer", ground.peer, *volumes, *words)
        name = str(begun["id"])
        for fault in plan.faults:
            ground.strike(fault, name)
        ground.proxy.heal()
        ground.ask(ground.source, "update", name, "--bandwidth-limit", "0")
        shown = ground.wait(name, "CONVERGED", *ENDED)
        ground.power_off()
        for attempt in range(4):
            if shown["state"] in ENDED or shown["state"] == "CUT_OVER":
                break
            shown = ground.cut_over(name, strikes=attempt == 0)
        return _end(ground, name, shown)


def _end(ground: Field, name: str, shown: Shown) -> str:
    ended = ground.judge(name, shown)
    if ended == "cut over":
        answer = ground.ask(ground.source, ground.plan.ending, name)
        if answer.code != 0:
            raise BreachError(f"{ground.plan.ending} refused: {answer}")
        fenced = [disks.is_fenced(source) for source, _ in ground.volumes]
        if any(fenced) == (ground.plan.ending == "rollback"):
            raise BreachError(f"after the {ground.plan.ending} the fences are {fenced}")
    return ended


@contextmanager
def field(plan: Schedule, directory: Path, pins: Path) -> Iterator[Field]:
    """Everything that a schedule needs, gone at the end whatever happens."""
    with ExitStack() as stack:
        yield Field(plan, directory, pins, stack)


def _free_ports() -> int:
    """Return a port that is free together with the one after it."""
    import socket

    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return port
            except OSError:
                continue
