"""Cutovers that the agents do by themselves: hooks as shell scripts, agents as processes."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import content
from tests.devices import LoopDevice, require
from tests.e2e import agents, disks
from tests.e2e.agents import Agent, Pair, Shown, eventually
from tests.e2e.disks import MIB
from tests.native.tracking import bpffs

SIZE = 16 * MIB
Volume = tuple[str, str]

GUEST = """
import os, sys, time
path, done, pause = sys.argv[1:]
fd = os.open(path, os.O_RDWR)
number = 0
while not os.path.exists(done):
    number += 1
    os.pwrite(fd, number.to_bytes(8, "little") * 512, number % 64 * 4096)
    os.fsync(fd)
    time.sleep(float(pause))
os.close(fd)
print(number)
"""


@dataclass
class Hosts:
    """Two agents with hooks, which may be killed and started again where they were."""

    directory: Path
    pins: Path
    stack: ExitStack
    hooks: dict[str, dict[str, object]] = field(default_factory=dict)
    agents: dict[str, Agent] = field(default_factory=dict)

    @property
    def source(self) -> Agent:
        return self.agents["source"]

    @property
    def target(self) -> Agent:
        return self.agents["target"]

    @property
    def pair(self) -> Pair:
        return Pair(self.source, self.target)

    def script(self, name: str, text: str) -> Path:
        """Write a hook."""
        path = self.directory / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    def hook(self, side: str, text: str, **more: object) -> Path:
        """Give a host a hook: quiesce to the source, boot to the target."""
        name = "quiesce" if side == "source" else "boot"
        path = self.script(f"{name}-hook", text)
        self.hooks[side] = {name: [str(path)], **more}
        return path

    def start(self, *sides: str) -> None:
        """Start agents, or start them again where they were."""
        for side in sides or ("target", "source"):
            before = self.agents.get(side)
            listen = before.address if before else ""
            self.agents[side] = self.stack.enter_context(
                agents.agent(
                    side,
                    self.directory,
                    self.pins / side,
                    listen=listen,
                    settings={"hooks": self.hooks.get(side, {})},
                )
            )

    def kill(self, side: str) -> None:
        self.agents[side].ends_well = False
        assert self.agents[side].stop(signal.SIGKILL) == -signal.SIGKILL

    def calls(self, name: str) -> list[str]:
        """Return what hooks have left behind in a file, a line each."""
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []

    def migrate(self, *words: str, volumes: list[Volume]) -> str:
        return self.pair.start("--id", "web1", *words, volumes=volumes)


@pytest.fixture
def hosts(tmp_path: Path, resources: ExitStack) -> Iterator[Hosts]:
    require("root", "loop", "bpf")
    with bpffs() as pins, ExitStack() as stack:
        made = Hosts(tmp_path, pins, stack)
        made.hook("source", f'echo "quiesce $WARMSYNC_MIGRATION" >> {tmp_path}/calls')
        made.hook("target", f'echo "boot $WARMSYNC_VOLUME_0" >> {tmp_path}/calls')
        yield made
        if made.agents and all(one.process.poll() is None for one in made.agents.values()):
            made.pair.tidy()
            made.pair.assert_clean()


@pytest.fixture
def volume(loop_device: Callable[..., LoopDevice]) -> Volume:
    source, target = loop_device(SIZE).path, loop_device(SIZE).path
    content.fill(source, 1)
    disks.soil(target, 2)
    return source, target


@pytest.fixture(params=["0.01"])
def guest(
    volume: Volume, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[subprocess.Popen[str]]:
    """A guest that writes until the file `off` is there, with such pauses."""
    words = [sys.executable, "-c", GUEST, volume[0], str(tmp_path / "off"), request.param]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _owned_by(shown: Shown, owner: str, step: str) -> None:
    assert (shown["owner"], shown["cutover_step"]) == (owner, step), shown


@pytest.mark.parametrize("tracker", ["ebpf", "scan"])
def test_a_guest_is_powered_down_moved_and_booted(
    hosts: Hosts, volume: Volume, guest: subprocess.Popen[str], tracker: str
) -> None:
    """The command follows it to the end; the hooks see what they are to see, once each."""
    source, target = volume
    hosts.hook(
        "source",
        f"sleep 0.5; touch {hosts.directory}/off; while kill -0 {guest.pid} 2>/dev/null && "
        f"! grep -q zombie /proc/{guest.pid}/status; do sleep 0.05; done; "
        f'echo "$WARMSYNC_HOOK $WARMSYNC_VOLUMES $WARMSYNC_VOLUME_0" >> {hosts.directory}/calls',
    )
    hosts.hook(
        "target",
        f'blockdev --getro {source} >> {hosts.directory}/calls; head -c 1 "$WARMSYNC_VOLUME_0" '
        f"> /dev/null && echo booted >> {hosts.directory}/calls",
    )
    hosts.start()
    words = ("--id", "web1", "--tracker", tracker, "--max-downtime", "5s", "--cutover", "auto")
    answer = hosts.source.run(*hosts.pair.migrate(*words, "--wait", "end", volumes=[volume]))
    assert answer.code == 0, answer
    shown = answer.shown
    _owned_by(shown, "target", "done")
    assert (shown["id"], shown["state"]) == ("web1", "CUT_OVER")
    assert shown["quiesce_seconds"] > 0
    assert shown["boot_seconds"] > 0
    assert hosts.calls("calls") == [f"quiesce 1 {source}", "1", "booted"]
    assert any("owner source, quiescing" in line for line in answer.lines), answer.lines
    assert any("owner target" in line for line in answer.lines), answer.lines
    disks.assert_equal(source, target)
    totals = hosts.source.ask("doctor")["totals"]
    assert (totals["migrations_cut_over"], totals["moved_bytes"]) == (1, SIZE)
    assert totals["downtime_saved_seconds"] == shown["downtime_saved_seconds"]
    assert totals["downtime_seconds"] == shown["downtime_seconds"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo the guest is stubborn >&2; exit 7", "the guest is stubborn"),
        ("echo asked; sleep 60", "it had not ended after 3 s"),
    ],
    ids=["fails", "hangs"],
)
def test_a_quiesce_hook_that_fails_leaves_the_source_the_owner(
    hosts: Hosts, volume: Volume, text: str, said: str
) -> None:
    source, target = volume
    hosts.hook("source", f"echo $$ >> {hosts.directory}/pids; {text}", quiesce_seconds=3)
    hosts.start()
    words = hosts.pair.migrate(
        "--id", "web1", "--cutover", "auto", "--wait", "end", volumes=[volume]
    )
    answer = hosts.source.refuse(*words, reason="HOOK_FAILED")
    assert said in answer.error["message"], answer.error
    assert "the source owns the disks" in answer.error["message"]
    shown = hosts.source.show("web1")
    _owned_by(shown, "source", "stopped")
    assert shown["state"] in ("SYNCING", "CONVERGED")
    assert shown["last_refusal"]["reason"] == "HOOK_FAILED"
    assert not disks.is_fenced(source)
    assert not disks.is_free(target)
    assert hosts.calls("calls") == []
    for pid in hosts.calls("pids"):
        eventually(Path(f"/proc/{pid}").exists, lambda there: not there)

    # Mended, it is run again; by hand it could be cut over as well.
    hosts.hook("source", f"echo mended >> {hosts.directory}/calls")
    hosts.source.ask("update", "web1", "--cutover", "auto")
    shown = hosts.source.wait("web1", until=lambda now: now["cutover_step"] == "done")
    _owned_by(shown, "target", "done")
    assert shown["last_refusal"] is None
    assert hosts.calls("calls") == ["mended", f"boot {target}"]
    disks.assert_equal(source, target)


@pytest.mark.parametrize(
    ("side", "flaw", "reason"),
    [
        ("source", "none", "HOOK_NOT_CONFIGURED"),
        ("source", "missing", "HOOK_UNUSABLE"),
        ("source", "not executable", "HOOK_UNUSABLE"),
        ("target", "none", "HOOK_NOT_CONFIGURED"),
        ("target", "missing", "HOOK_UNUSABLE"),
        ("target", "not executable", "HOOK_UNUSABLE"),
    ],
)
def test_a_hook_that_cannot_run_is_refused_at_the_start(
    hosts: Hosts, volume: Volume, side: str, flaw: str, reason: str
) -> None:
    path = hosts.hook(side, "exit 0")
    if flaw == "none":
        hosts.hooks[side] = {}
    elif flaw == "missing":
        path.unlink()
    else:
        path.chmod(0o644)
    hosts.start()
    words = hosts.pair.migrate("--id", "web1", "--cutover", "auto", volumes=[volume])
    answer = hosts.source.refuse(*words, reason=reason)
    assert answer.error["values"]["side"] == side
    for agent in (hosts.source, hosts.target):
        assert agent.ask("list")["migrations"] == []
    assert disks.is_free(volume[1])
    # By hand it goes without.
    hosts.migrate("--wait", "converged", volumes=[volume])
    if side == "source":
        hosts.source.refuse("update", "web1", "--cutover", "auto", reason=reason)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo no such domain; exit 3", "no such domain"),
        ("exec sleep 60", "it had not ended after 3 s"),
    ],
    ids=["fails", "hangs"],
)
def test_a_boot_hook_that_fails_says_who_owns(
    hosts: Hosts, volume: Volume, text: str, said: str
) -> None:
    """The target owns, the command fails; once mended the hook is run again."""
    source, target = volume
    hosts.hook("target", text, boot_seconds=3)
    hosts.start()
    words = hosts.pair.migrate(
        "--id", "web1", "--cutover", "auto", "--wait", "end", volumes=[volume]
    )
    answer = hosts.source.refuse(*words, reason="HOOK_FAILED")
    assert said in answer.error["message"], answer.error
    assert "the target owns the disks" in answer.error["message"]
    assert (answer.shown["state"], answer.shown["owner"]) == ("CUT_OVER", "target")
    _owned_by(hosts.source.show("web1"), "target", "stopped")
    assert hosts.target.show("web1")["owner"] == "target"
    assert disks.is_fenced(source)
    hosts.hook("target", f"echo booted >> {hosts.directory}/calls")
    hosts.source.ask("update", "web1", "--cutover", "auto")
    hosts.source.wait("web1", until=lambda now: now["cutover_step"] == "done")
    assert hosts.calls("calls")[-1] == "booted"
    disks.assert_equal(source, target)


def test_after_a_failed_boot_the_source_is_had_back(hosts: Hosts, volume: Volume) -> None:
    hosts.hook("target", "exit 3")
    hosts.start()
    hosts.migrate("--cutover", "auto", volumes=[volume])
    hosts.source.wait("web1", until=lambda now: now["cutover_step"] == "stopped")
    shown = hosts.source.ask("rollback", "web1")
    assert (shown["state"], shown["owner"]) == ("ROLLED_BACK", "source")
    disks.assert_writable(volume[0])


@pytest.mark.parametrize("guest", ["0"], indirect=True)
def test_what_goes_on_writing_is_not_cut_over(
    hosts: Hosts, volume: Volume, guest: subprocess.Popen[str]
) -> None:
    """A hook that says the VM is off, and it is not: refused, nobody is booted."""
    hosts.start()
    words = ("--id", "web1", "--cutover", "auto", "--max-downtime", "5s", "--wait", "end")
    hosts.source.refuse(*hosts.pair.migrate(*words, volumes=[volume]), reason="NOT_QUIESCED")
    _owned_by(
        hosts.source.wait("web1", "SYNCING", "CONVERGED"),
        "source",
        "stopped",
    )
    assert hosts.calls("calls") == ["quiesce web1"]
    disks.assert_writable(volume[0])


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("hook", ["quiesce", "boot"])
def test_an_agent_killed_in_the_middle_of_a_hook_runs_it_once(
    hosts: Hosts, volume: Volume, side: str, hook: str
) -> None:
    """The hook outlives the agent: its result is found, nothing is run twice."""
    where = "source" if hook == "quiesce" else "target"
    text = (
        f"echo begun >> {hosts.directory}/{hook}; "
        f"while ! test -e {hosts.directory}/go; do sleep 0.05; done; "
        f"echo ended >> {hosts.directory}/{hook}"
    )
    hosts.hook(where, text)
    hosts.start()
    hosts.migrate("--cutover", "auto", volumes=[volume])
    eventually(lambda: hosts.calls(hook), lambda lines: lines == ["begun"])
    hosts.kill(side)
    if side == "target":
        hosts.start("target")
        (hosts.directory / "go").touch()
    else:
        (hosts.directory / "go").touch()
        eventually(lambda: hosts.calls(hook), lambda lines: lines == ["begun", "ended"])
        hosts.start("source")
    shown = hosts.source.wait("web1", until=lambda now: now["cutover_step"] in ("done", "stopped"))
    _owned_by(shown, "target", "done")
    assert hosts.calls(hook) == ["begun", "ended"]
    disks.assert_equal(*volume)


def test_the_time_that_the_agent_was_away_is_downtime(hosts: Hosts, volume: Volume) -> None:
    """The hook ended well, an hour before the agent came back: the VM was off all the while."""
    text = f"while ! test -e {hosts.directory}/go; do sleep 0.05; done; touch {hosts.directory}/off"
    hosts.hook("source", text)
    hosts.start()
    hosts.migrate("--cutover", "auto", volumes=[volume])
    hosts.source.wait("web1", until=lambda now: now["cutover_step"] == "quiescing")
    hosts.kill("source")
    (hosts.directory / "go").touch()
    result = hosts.directory / "source" / "hooks" / "web1-quiesce" / "result"
    eventually(result.exists, bool)
    ended = result.stat().st_mtime - 3600
    os.utime(result, (ended, ended))
    hosts.start("source")
    shown = hosts.source.wait("web1", until=lambda now: now["cutover_step"] == "done")
    assert shown["downtime_seconds"] > 3600
    assert shown["downtime_saved_seconds"] < -3000
    totals = hosts.source.ask("doctor")["totals"]
    assert totals["downtime_seconds"] == shown["downtime_seconds"]


def test_a_hook_that_died_with_its_agent_is_left_to_a_person(hosts: Hosts, volume: Volume) -> None:
    """As when the host loses power: nobody knows how far it came, so nobody runs it again."""
    hosts.hook("source", f"echo $$ >> {hosts.directory}/pids; sleep 60")
    hosts.start()
    hosts.migrate("--cutover", "auto", volumes=[volume])
    eventually(lambda: hosts.calls("pids"), bool)
    hosts.kill("source")
    os.killpg(os.getpgid(int(hosts.calls("pids")[0])), signal.SIGKILL)
    hosts.start("source")
    shown = hosts.source.wait("web1", until=lambda now: now["cutover_step"] == "stopped")
    assert shown["last_refusal"]["reason"] == "HOOK_INTERRUPTED"
    assert shown["owner"] == "source"
    assert len(hosts.calls("pids")) == 1
    # A person saw that the VM is off.
    hosts.source.wait("web1", "SYNCING", "CONVERGED")
    shown = hosts.source.ask("cutover", "web1", "--force")
    _owned_by(shown, "target", "")
    disks.assert_equal(*volume)


def test_hands_off_while_the_agents_have_theirs_on(hosts: Hosts, volume: Volume) -> None:
    """No cutover, pause or change of mode in the middle; a cancel ends the hook."""
    hosts.hook("source", f"echo $$ >> {hosts.directory}/pids; sleep 60")
    hosts.start()
    hosts.migrate("--cutover", "auto", volumes=[volume])
    eventually(lambda: hosts.calls("pids"), bool)
    for words in (("cutover", "web1", "--force"), ("pause", "web1")):
        hosts.source.refuse(*words, reason="CUTOVER_UNDER_WAY")
    hosts.source.refuse("update", "web1", "--cutover", "manual", reason="CUTOVER_UNDER_WAY")
    _owned_by(hosts.source.show("web1"), "source", "quiescing")
    hosts.source.ask("cancel", "web1")
    pid = hosts.calls("pids")[0]
    eventually(Path(f"/proc/{pid}").exists, lambda there: not there)
    disks.assert_writable(volume[0])


def test_disarmed_it_waits_for_a_person(hosts: Hosts, volume: Volume) -> None:
    hosts.start()
    hosts.migrate("--cutover", "auto", "--max-downtime", "1us", volumes=[volume])
    hosts.source.wait("web1", "SYNCING")
    _owned_by(hosts.source.show("web1"), "source", "waiting")
    hosts.source.ask("update", "web1", "--cutover", "manual")
    hosts.source.ask("update", "web1", "--max-downtime", "10s")
    shown = hosts.source.wait("web1", "CONVERGED")
    _owned_by(shown, "source", "")
    assert hosts.calls("calls") == []


@pytest.mark.parametrize("tracker", ["auto", "scan"])
def test_cold(hosts: Hosts, volume: Volume, tracker: str) -> None:
    """One round, and the target owns; nothing was asked of hooks."""
    hosts.start()
    words = ("--id", "web1", "--cold", "--tracker", tracker, "--wait", "end")
    shown = hosts.source.ask(*hosts.pair.migrate(*words, volumes=[volume]))
    _owned_by(shown, "target", "done")
    assert shown["cold"]
    assert shown["bytes_sent"] < 1.2 * SIZE
    assert shown["downtime_saved_seconds"] is None
    assert shown["downtime_seconds"] >= shown["downtime_parts"]["send_seconds"]
    assert hosts.calls("calls") == []
    disks.assert_equal(*volume)


def test_cold_and_booted(hosts: Hosts, volume: Volume) -> None:
    hosts.hooks["source"] = {}
    hosts.start()
    words = ("--id", "web1", "--cold", "--cutover", "auto", "--wait", "end")
    _owned_by(hosts.source.ask(*hosts.pair.migrate(*words, volumes=[volume])), "target", "done")
    assert hosts.calls("calls") == [f"boot {volume[1]}"]


@pytest.mark.parametrize("guest", ["0"], indirect=True)
def test_cold_is_refused_for_a_vm_that_runs(
    hosts: Hosts, volume: Volume, guest: subprocess.Popen[str]
) -> None:
    hosts.start()
    words = ("--id", "web1", "--cold", "--wait", "end")
    hosts.source.refuse(*hosts.pair.migrate(*words, volumes=[volume]), reason="NOT_QUIESCED")
    _owned_by(hosts.source.wait("web1", "SYNCING", "CONVERGED"), "source", "stopped")
    disks.assert_writable(volume[0])


def test_totals_outlive_the_agent(hosts: Hosts, volume: Volume) -> None:
    hosts.start()
    words = ("--id", "web1", "--cutover", "auto", "--wait", "end")
    shown = hosts.source.ask(*hosts.pair.migrate(*words, volumes=[volume]))
    before = hosts.source.ask("doctor")["totals"]
    assert before["migrations_started"] == before["migrations_cut_over"] == 1
    assert before["sent_bytes"] == shown["bytes_sent"]
    hosts.source.ask("rollback", "web1")
    hosts.source.ask("delete", "web1")
    hosts.kill("source")
    hosts.start("source")
    assert hosts.source.ask("doctor")["totals"] == before


def test_the_state_directory_keeps_nothing_of_hooks(hosts: Hosts, volume: Volume) -> None:
    hosts.start()
    words = ("--id", "web1", "--cutover", "auto", "--wait", "end")
    hosts.source.ask(*hosts.pair.migrate(*words, volumes=[volume]))
    kept = hosts.directory / "target" / "hooks" / "web1-boot"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    hosts.source.ask("finish", "web1")
    hosts.pair.tidy()
    assert [*(hosts.directory / "source" / "hooks").iterdir()] == []
    assert [*(hosts.directory / "target" / "hooks").iterdir()] == []
