"""Programs of the host: run with a time limit, killed with the agent, what they say kept.

Owns how a program is run. What it does and which exit codes are good is for who runs it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
_END_SECONDS = 30.0
_MOST_TEXT = 300


class ToolError(Exception):
    """A program is missing, failed or took too long; says so in one line."""


@dataclass(frozen=True, slots=True)
class Tools:
    """How to run programs; `give_up` is called when one does not end in time."""

    limit_seconds: float
    give_up: Callable[[], None]

    def run(self, *command: str, good: tuple[int, ...] = (0,)) -> str:
        """Run one to its end and return what it said. ToolError."""
        code, said = self.attempt(*command)
        if code not in good:
            raise ToolError(f"{command[0]} failed (exit code {code}): {shorten(said)}")
        return said

    def attempt(self, *command: str) -> tuple[int, str]:
        """Run one to its end; return its exit code and what it said. ToolError but for the code."""
        process = _start(command)
        try:
            said, _ = process.communicate(timeout=self.limit_seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            # A process that waits for its disk cannot be killed before that has answered.
            self.give_up()
            _await(process, command)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            limit = f"{self.limit_seconds:g} s"
            raise ToolError(f"{command[0]} took more than {limit}") from error
        return process.returncode, said


def find(name: str) -> str | None:
    """Return where a program is; also where only root looks."""
    return shutil.which(name, path=_path())


def shorten(text: str) -> str:
    """Return the end of what a program said, on one line."""
    return " ".join(text.split())[-_MOST_TEXT:]


def _start(command: tuple[str, ...]) -> subprocess.Popen[str]:
    for name in ("setpriv", command[0]):
        if find(name) is None:
            raise ToolError(f"{name} is not installed")
    # The signal comes when the thread that started it ends, which waits for it.
    return subprocess.Popen(
        [str(find("setpriv")), "--pdeathsig", "KILL", "--", str(find(command[0])), *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={"PATH": _path(), "LC_ALL": "C"},
        start_new_session=True,
    )


def _await(process: subprocess.Popen[str], command: tuple[str, ...]) -> None:
    try:
        process.communicate(timeout=_END_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{command[0]} cannot be killed; see the kernel log") from error


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_PATH}"
