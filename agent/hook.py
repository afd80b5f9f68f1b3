"""Runs a hook: a command of this host's own configuration, once, to its end or its limit.

Owns the process and what is kept of it in the state directory, so that an agent that is started
again finds a hook that still runs, or its result, and never runs it a second time. Never takes a
path from anybody but the configuration.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent.errors import FailedPrecondition

_log = logging.getLogger(__name__)

# The shell holds the lock (its stdin) as long as it lives, and the command does not inherit it: a
# VM that it starts may outlive it. The result is there whole or not at all.
_SCRIPT = """
d=$1; shift; echo $$ > "$d/pid"
"$@" < /dev/null
echo $? > "$d/result.new" && mv "$d/result.new" "$d/result"
"""
_SAID_BYTES = 500
"""How much of its last words is told."""
_MAX_OUTPUT_BYTES = 1 << 20
"""It goes into the state directory, which must not become full."""
_LOOK_SECONDS = 0.25
_TERM_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Hook:
    """A command and its limit. `name`: quiesce or boot; `side`: whose host's it is."""

    name: str
    side: str
    command: tuple[str, ...]
    limit_seconds: float

    def check(self) -> None:
        """Raise FailedPrecondition unless it can run: HOOK_NOT_CONFIGURED, HOOK_UNUSABLE."""
        if not self.command:
            raise FailedPrecondition(
                "HOOK_NOT_CONFIGURED",
                f"the {self.side}'s agent has no {self.name} hook, which a cutover auto needs; set "
                f"[hooks] {self.name} in its configuration, or cut over by hand",
                hook=self.name,
                side=self.side,
            )
        flaw = _flaw(self.command[0])
        if flaw:
            raise FailedPrecondition(
                "HOOK_UNUSABLE",
                f"the {self.side}'s {self.name} hook {self.command[0]} {flaw}; mend it, or "
                f"[hooks] {self.name} in its configuration",
                hook=self.name,
                side=self.side,
                path=self.command[0],
            )


class HookRun:
    """One run of a hook. What is kept of it is in `directory`, until `forget`."""

    def __init__(self, hook: Hook, directory: Path) -> None:
        self.hook = hook
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    async def run(self, values: Mapping[str, str]) -> float:
        """Run it to its end; returns seconds. FailedPrecondition HOOK_FAILED, HOOK_UNUSABLE.

        Nothing may be kept of a run before: `forget` comes before it is written down that this one
        begins. When cancelled (the agent stops), the hook goes on; `rejoin` finds it.
        """
        self.hook.check()
        started = time.monotonic()
        try:
            self._start(values)
        except OSError as error:
            raise self._failed(f"it cannot be started: {error.strerror}") from error
        await self._watch(self._pid())
        self._judge()
        return time.monotonic() - started

    async def rejoin(self) -> None:
        """Wait for a hook that an agent before this one has begun. HOOK_FAILED.

        FailedPrecondition HOOK_INTERRUPTED: it has not ended, and does not run any more.
        """
        while self.is_running:
            _log.info("hook found again name=%s directory=%s", self.hook.name, self._directory)
            await self._watch(self._pid())
            await asyncio.sleep(0.02)  # it may not have said yet who it is
        if not (self._directory / "result").exists():
            raise self.interrupted(
                "was under way when its agent's host or service ended, and nobody knows how far it "
                "came"
            )
        self._judge()

    def interrupted(self, how: str) -> FailedPrecondition:
        """Return the error of a hook that a person has to look after."""
        return FailedPrecondition(
            "HOOK_INTERRUPTED",
            f"the {self.hook.side}'s {self.hook.name} hook {how}; it is not run again by itself: "
            "see whether the VM is on, and where, then cut over or boot by hand, or "
            "update --cutover auto to run the hook again",
            hook=self.hook.name,
            side=self.hook.side,
        )

    @property
    def is_running(self) -> bool:
        """Whether it runs now, whoever has started it."""
        try:
            lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    @property
    def ended_at_seconds(self) -> float:
        """When it ended (wall clock), whoever saw it; now, if nothing is kept of it."""
        with suppress(OSError):
            return (self._directory / "result").stat().st_mtime
        return time.time()

    async def stop(self) -> None:
        """End it with all that it has started in its own process group. Safe at any time."""
        pid = self._pid() if self.is_running else 0
        self._reap()
        if not pid:
            return
        for number, seconds in ((signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, 1.0)):
            with suppress(ProcessLookupError):
                os.killpg(pid, number)
            deadline = time.monotonic() + seconds
            while _is_group(pid) and time.monotonic() < deadline:
                self._reap()
                await asyncio.sleep(0.02)

    def forget(self) -> None:
        """Remove what is kept of a run that has ended."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self, values: Mapping[str, str]) -> None:
        self._directory.mkdir(mode=0o700, parents=True)
        path = os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        words = ["/bin/sh", "-c", _SCRIPT, "sh", str(self._directory), *self.hook.command]
        with (
            (self._directory / "lock").open("xb") as lock,
            (self._directory / "output").open("xb") as output,
        ):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._process = subprocess.Popen(
                words,
                stdin=lock,
                stdout=output,
                stderr=output,
                cwd="/",
                env={"PATH": path, "LANG": "C.UTF-8", "WARMSYNC_HOOK": self.hook.name, **values},
                start_new_session=True,
            )
        _log.info("hook started name=%s command=%s", self.hook.name, self.hook.command[0])

    def _pid(self) -> int:
        """Return the shell's process, which leads its group. It lives while the lock is held."""
        if self._process is not None:
            return self._process.pid
        with suppress(OSError, ValueError):
            return int((self._directory / "pid").read_text())
        return 0

    async def _watch(self, pid: int) -> None:
        """Wait for its end. HOOK_FAILED for one that takes too long, or says too much."""
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        deadline = time.monotonic() + self.hook.limit_seconds
        try:
            process = os.pidfd_open(pid)
        except OSError:  # it has ended
            return
        loop.add_reader(process, ended.set)
        try:
            while not ended.is_set():
                left = deadline - time.monotonic()
                if left <= 0:
                    await self.stop()
                    raise self._failed(f"it had not ended after {self.hook.limit_seconds:g} s")
                if (self._directory / "output").stat().st_size > _MAX_OUTPUT_BYTES:
                    await self.stop()
                    raise self._failed("it printed more than 1 MiB")
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, _LOOK_SECONDS)):
                        await ended.wait()
        finally:
            loop.remove_reader(process)
            os.close(process)
            self._reap()

    def _reap(self) -> None:
        if self._process is not None:
            self._process.poll()

    def _judge(self) -> None:
        try:
            code = int((self._directory / "result").read_text())
        except (OSError, ValueError) as error:
            raise self._failed("it was killed") from error
        if code:
            raise self._failed(f"it ended with {code}")
        _log.info("hook ended well name=%s", self.hook.name)

    def _failed(self, what: str) -> FailedPrecondition:
        said = self._said()
        quoted = f' and said "{said}"' if said else ""
        if self.hook.name == "quiesce":
            owner = "the source owns the disks"
            mend = "if the VM is off, boot it there or cut over by hand (cutover --force)"
        else:
            owner = "the target owns the disks"
            mend = "boot the VM there by hand, or roll back"
        return FailedPrecondition(
            "HOOK_FAILED",
            f"the {self.hook.side}'s {self.hook.name} hook {' '.join(self.hook.command)} failed: "
            f"{what}{quoted}; {owner}: {mend}, or mend the hook and update --cutover auto to run "
            "it again",
            hook=self.hook.name,
            side=self.hook.side,
            said=said,
            detail=what,
        )

    def _said(self) -> str:
        """Return its last words, in one line."""
        try:
            with (self._directory / "output").open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - _SAID_BYTES, 0))
                return " ".join(file.read().decode(errors="replace").split())
        except OSError:
            return ""


def no_hook() -> HookRun:
    """Return the quiesce hook of a host that has none."""
    return HookRun(Hook("quiesce", "source", (), 1.0), Path("/nonexistent"))


def values_of(migration: str, paths: list[str], **others: str) -> dict[str, str]:
    """Return what a hook finds in its environment: the migration, and this host's volumes."""
    values = {"WARMSYNC_MIGRATION": migration, "WARMSYNC_VOLUMES": str(len(paths))}
    values |= {f"WARMSYNC_VOLUME_{i}": path for i, path in enumerate(paths)}
    return values | {f"WARMSYNC_{name.upper()}": text for name, text in others.items()}


def _flaw(path: str) -> str:
    try:
        found = os.stat(path)
    except OSError as error:
        return f"cannot be found ({error.strerror})"
    if not stat.S_ISREG(found.st_mode):
        return "is no file"
    if not os.access(path, os.X_OK):
        return "is not executable"
    if found.st_mode & stat.S_IWOTH:
        return "may be changed by anybody"
    return ""


def _is_group(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
