"""Hooks as real processes: how they end, how long they may take, who finds them again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent import hook as hook_module
from agent.errors import FailedPrecondition
from agent.hook import Hook, HookRun, values_of
from tests.e2e.agents import eventually

Make = Callable[..., HookRun]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a hook of a script's lines."""
    monkeypatch.setattr(hook_module, "_TERM_SECONDS", 0.3)

    def hook(text: str, limit_seconds: float = 30.0) -> HookRun:
        path = tmp_path / "hook"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        found = Hook("quiesce", "source", (str(path), "a b", "$HOME"), limit_seconds)
        return HookRun(found, tmp_path / "kept")

    return hook


def _refused(work: Any, reason: str) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as caught:
        asyncio.run(work)
    assert caught.value.reason == reason
    return caught.value


def test_a_hook_has_its_words_and_values(make: Make, tmp_path: Path) -> None:
    run = make(f'env > {tmp_path}/env; printf "%s|" "$@" > {tmp_path}/words; cat > {tmp_path}/in')
    values = values_of("web1", ["/dev/a", "/srv/b c"], peer="there:7070")
    assert asyncio.run(run.run(values)) >= 0
    found = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert (tmp_path / "words").read_text() == "a b|$HOME|"
    assert (tmp_path / "in").read_text() == ""
    assert (
        found.items()
        >= {
            "WARMSYNC_HOOK": "quiesce",
            "WARMSYNC_MIGRATION": "web1",
            "WARMSYNC_VOLUMES": "2",
            "WARMSYNC_VOLUME_0": "/dev/a",
            "WARMSYNC_VOLUME_1": "/srv/b c",
            "WARMSYNC_PEER": "there:7070",
        }.items()
    )
    assert "PYTEST_CURRENT_TEST" not in found  # nothing of the agent's own goes to it
    assert not run.is_running


@pytest.mark.parametrize(
    ("text", "detail", "said"),
    [
        ("echo no; echo way >&2; exit 7", "it ended with 7", "no way"),
        ("echo asked; sleep 60", "it had not ended after 2 s", "asked"),
        ("trap '' TERM; while :; do sleep 1; done", "it had not ended after 2 s", ""),
        ("kill -9 $PPID", "it was killed", ""),
        ("exec kill -9 $$", "it ended with 137", "Killed"),
        ("yes", "it printed more than 1 MiB", None),
    ],
    ids=["fails", "hangs", "deaf", "killed", "kills itself", "talks"],
)
def test_a_hook_that_fails(make: Make, text: str, detail: str, said: str | None) -> None:
    run = make(text, 2.0 if "not ended" in detail else 30.0)
    error = _refused(run.run({}), "HOOK_FAILED")
    assert error.values["detail"] == detail
    if said is not None:
        assert error.values["said"].endswith(said)
    assert not run.is_running
    assert f"/{run.hook.command[0].lstrip('/')}" in str(error)


@pytest.mark.parametrize(
    ("flaw", "says"),
    [
        (lambda path: path.unlink(), "cannot be found"),
        (lambda path: (path.unlink(), path.mkdir()), "is no file"),
        (lambda path: path.chmod(0o644), "is not executable"),
        (lambda path: path.chmod(0o757), "may be changed by anybody"),
    ],
    ids=["missing", "directory", "not executable", "anybody's"],
)
def test_a_hook_that_cannot_run(make: Make, flaw: Callable[[Path], object], says: str) -> None:
    run = make("exit 0")
    run.hook.check()
    flaw(Path(run.hook.command[0]))
    assert says in str(_refused(run.run({}), "HOOK_UNUSABLE"))


def test_what_a_hook_leaves_behind_in_the_background_lives_on(make: Make, tmp_path: Path) -> None:
    """As a VM does that a boot hook has started: it keeps neither the lock nor the agent."""
    run = make(f"setsid sleep 60 & echo $! > {tmp_path}/vm")
    asyncio.run(run.run({}))
    pid = int((tmp_path / "vm").read_text())
    try:
        assert not run.is_running
        os.kill(pid, 0)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_hook_is_found_again(make: Make, tmp_path: Path) -> None:
    """The agent stopped in the middle; another one waits, and has its result."""
    text = f"echo x >> {tmp_path}/runs; while ! test -e {tmp_path}/go; do sleep 0.02; done; exit 4"
    run = make(text)

    async def begin() -> None:
        task = asyncio.ensure_future(run.run({}))
        await asyncio.to_thread(eventually, (tmp_path / "runs").exists, bool)
        task.cancel()
        await asyncio.wait([task])

    async def find() -> None:
        found = asyncio.ensure_future(HookRun(run.hook, tmp_path / "kept").rejoin())
        await asyncio.sleep(0.1)
        assert not found.done()
        (tmp_path / "go").touch()
        await found

    asyncio.run(begin())
    assert run.is_running
    assert _refused(find(), "HOOK_FAILED").values["detail"] == "it ended with 4"
    _refused(HookRun(run.hook, tmp_path / "kept").rejoin(), "HOOK_FAILED")  # its end is kept
    assert (tmp_path / "runs").read_text() == "x\n"
    asyncio.run(run.stop())


def test_one_that_nobody_knows_the_end_of(make: Make, tmp_path: Path) -> None:
    run = make(f"echo $$ > {tmp_path}/pid; sleep 60")

    async def begin() -> None:
        task = asyncio.ensure_future(run.run({}))
        written = tmp_path / "pid"
        await asyncio.to_thread(
            eventually, lambda: written.exists() and written.read_text().endswith("\n"), bool
        )
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(begin())
    os.killpg(os.getpgid(int((tmp_path / "pid").read_text())), signal.SIGKILL)
    _refused(HookRun(run.hook, tmp_path / "kept").rejoin(), "HOOK_INTERRUPTED")
    run.forget()
    _refused(run.rejoin(), "HOOK_INTERRUPTED")
    asyncio.run(run.stop())


def test_stopped(make: Make) -> None:
    run = make("sleep 60 & sleep 60")

    async def main() -> None:
        task = asyncio.ensure_future(run.run({}))
        await asyncio.to_thread(eventually, lambda: run.is_running, bool)
        await run.stop()
        with pytest.raises(FailedPrecondition, match="killed"):
            await task

    asyncio.run(main())
    assert not run.is_running
