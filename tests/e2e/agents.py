"""Agents as processes, and the command that talks to them.

Each agent has a state directory, a place for its pins and a log of its own. `LIVE` are those that
run: the logs of all of them go into the report of a test that failed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from click.testing import CliRunner

from agent.cli import cli
from tests import host, ports

Shown: TypeAlias = dict[str, Any]

ROOT = Path(__file__).parents[2]
ALLOWED = ("/dev/loop*", "/dev/zram*", f"{host.SCRATCH}/warmsync-test-*/*")
SECONDS = 120.0
"""How long anything may take before the test fails; nothing is measured with it."""
POLL_SECONDS = 0.02
ENDED = frozenset({"FAILED", "CANCELLED", "ROLLED_BACK", "COMPLETED"})


@dataclass(eq=False)
class Answer:
    """How a command ended: its exit code, its object on stdout and its lines on stderr."""

    code: int
    shown: Shown
    lines: list[str]

    @property
    def error(self) -> Shown:
        """The error in the answer."""
        error = self.shown["error"]
        assert error is not None, self
        return dict(error)


@dataclass(eq=False)
class Agent:
    """One agent process. `ends_well`: it must end by itself with 0 and leave nothing behind.

    `expects`: what a line of its log has in it that surprises nobody.
    """

    name: str
    address: str
    log: Path
    pins: Path
    process: subprocess.Popen[str]
    announced: str
    flags: tuple[str, ...] = ()
    ends_well: bool = True
    expects: tuple[str, ...] = ()
    read_to: int = field(default=0)

    def run(self, *words: str) -> Answer:
        """Run a command with --json against this agent."""
        return run(*words, "--agent", self.address, *self.flags)

    def ask(self, *words: str) -> Shown:
        """Run a command that must not fail; returns its object."""
        answer = self.run(*words)
        assert answer.code == 0, (words, answer)
        return answer.shown

    def refuse(self, *words: str, reason: str, code: int = 1) -> Answer:
        """Run a command that must fail with this reason, in one line."""
        answer = self.run(*words)
        assert answer.code == code, (words, answer)
        assert answer.error["reason"] == reason, (words, answer)
        assert answer.lines[-1] == f"warmsync: error: {answer.error['message']}"
        return answer

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a command in a process of its own, for what is to happen meanwhile."""
        command = [sys.executable, "-m", "agent", *words, "--agent", self.address, *self.flags]
        return subprocess.Popen(
            [*command, "--json"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def show(self, name: str) -> Shown:
        """Return a migration."""
        return self.ask("show", name)

    def wait(self, name: str, *states: str, until: Callable[[Shown], bool] | None = None) -> Shown:
        """Wait until a migration is in one of these states (or `until` holds); return it."""
        shown: Shown = eventually(
            lambda: self.show(name),
            until or (lambda now: now["state"] in states),
            stop=lambda now: now["state"] in ENDED,
        )
        return shown

    def pinned(self) -> list[str]:
        """Return the names of all pins below this agent's directory."""
        return sorted(str(path.relative_to(self.pins)) for path in self.pins.rglob("*/*/*"))

    def held(self) -> list[str]:
        """Return the devices and image files that the process has open."""
        found = []
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                name = os.readlink(entry)
            except FileNotFoundError:
                continue
            if re.match(rf"/dev/(loop|zram)|{host.SCRATCH}/warmsync-test-.*disk", name):
                found.append(name)
        return found

    def said(self) -> str:
        """Return what was logged since this was last asked."""
        text = self.log.read_text()
        new, self.read_to = text[self.read_to :], len(text)
        return new

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)


def run(*words: str) -> Answer:
    """Run a command with --json, in this process (which is quicker than one of its own)."""
    result = CliRunner().invoke(cli, [*words, "--json"], prog_name="warmsync")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    # `watch` writes an object a line; the last one counts.
    shown = json.loads(result.stdout.splitlines()[-1]) if result.stdout else {}
    return Answer(result.exit_code, shown, result.stderr.splitlines())


LIVE: list[Agent] = []


@dataclass(eq=False)
class Pair:
    """The agents of both hosts."""

    source: Agent
    target: Agent

    def migrate(self, *words: str, volumes: Sequence[tuple[Any, Any]]) -> list[str]:
        """Return the words of a migrate command between the two."""
        pairs = [word for a, b in volumes for word in ("--volume", f"{a}:{b}")]
        return ["migrate", "--peer", self.target.address, *pairs, *words]

    def start(self, *words: str, volumes: Sequence[tuple[Any, Any]]) -> str:
        """Start a migration; returns its id."""
        return str(self.source.ask(*self.migrate(*words, volumes=volumes))["id"])

    def tidy(self) -> None:
        """End and forget all migrations at both ends."""
        for shown in self.source.ask("list")["migrations"]:
            if shown["role"] == "source" and shown["state"] not in ENDED:
                self.source.ask(
                    "rollback" if shown["state"] == "CUT_OVER" else "cancel", shown["id"]
                )
        for agent in (self.source, self.target):
            for shown in agent.ask("list")["migrations"]:
                agent.wait(shown["id"], *ENDED)
                agent.ask("delete", shown["id"])

    def assert_clean(self) -> None:
        """Nothing that was claimed, opened or pinned is left; nobody was surprised."""
        for agent in (self.source, self.target):
            assert agent.process.poll() is None, f"{agent.name} ended: {agent.log.read_text()}"
            eventually(agent.held, lambda held: not held)
            assert agent.pinned() == [], agent.name
            assert_unsurprised(agent)


def assert_unsurprised(agent: Agent) -> None:
    """No traceback in what an agent logged since this was last asked."""
    for line in agent.said().splitlines():
        if not any(sign in line for sign in agent.expects):
            assert "trace=" not in line, line
            assert "Traceback" not in line, line


def eventually(
    ask: Callable[[], Any],
    holds: Callable[[Any], bool],
    stop: Callable[[Any], bool] = lambda _: False,
    seconds: float = SECONDS,
) -> Any:
    """Ask again and again until it holds; returns the answer. Fails if it never does."""
    deadline = time.monotonic() + seconds
    while True:
        answer = ask()
        if holds(answer):
            return answer
        assert not stop(answer), f"ended otherwise: {answer}"
        assert time.monotonic() < deadline, f"not in {seconds} s: {answer}"
        time.sleep(POLL_SECONDS)


@contextmanager
def agent(
    name: str,
    directory: Path,
    pins: Path,
    *flags: str,
    listen: str = "",
    allowed: tuple[str, ...] = ALLOWED,
    command: tuple[str, ...] = (),
    client: tuple[str, ...] = (),
    settings: Mapping[str, Mapping[str, object]] | None = None,
) -> Iterator[Agent]:
    """Run an agent until the end of the block.

    `listen` is where, if not on two ports that stay free while it is down; `command` runs it
    (setpriv, say); `client` are the flags of commands that talk to it; `settings` are further ones
    of its configuration, by section.
    """
    with starting(
        name,
        directory,
        pins,
        *flags,
        listen=listen or f"127.0.0.1:{ports.free_pair()}",
        allowed=allowed,
        command=command,
        settings=settings,
    ) as (
        process,
        log,
    ):
        announced, address = _announced(process, log)
        found = Agent(name, address, log, pins, process, announced, client)
        LIVE.append(found)
        try:
            yield found
            _end(found)
        finally:
            LIVE.remove(found)


@contextmanager
def starting(
    name: str,
    directory: Path,
    pins: Path,
    *flags: str,
    listen: str,
    allowed: tuple[str, ...],
    command: tuple[str, ...],
    settings: Mapping[str, Mapping[str, object]] | None = None,
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start a process; it is killed at the end of the block if it has not ended by then."""
    file, log = directory / f"{name}.toml", directory / f"{name}.log"
    sections = [
        f"[{section}]\n"
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        for section, values in (settings or {}).items()
    ]
    file.write_text(
        f"listen = {json.dumps(listen)}\n"
        f"state_dir = {json.dumps(str(directory / name))}\n"
        f"bpffs_dir = {json.dumps(str(pins))}\n"
        f"allow_devices = {json.dumps(list(allowed))}\n" + "".join(sections)
    )
    words = [*command, sys.executable, "-m", "agent", "agent", "--config", str(file), *flags]
    with (
        log.open("a") as errors,
        subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        try:
            yield process, log
        finally:
            if process.poll() is None:
                process.kill()


def _announced(process: subprocess.Popen[str], log: Path) -> tuple[str, str]:
    """Return the line that an agent begins with, and its address in there."""
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.search(r"listening on (\S+)", line)
    assert match is not None, log.read_text()
    return line, match[1]


def _end(agent: Agent) -> None:
    """Stop an agent that still runs; it must leave nothing behind."""
    if agent.process.poll() is None:
        assert agent.stop() == 0, agent.log.read_text()
    if agent.ends_well:
        assert agent.process.returncode == 0, agent.log.read_text()
        assert agent.pinned() == []
        assert_unsurprised(agent)
