"""Powering a VM down: found by its disk, asked, and ended by force only where that is allowed."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from agent.cli import cli
from agent.errors import FailedPrecondition, Unavailable
from agent.qemu import power
from agent.qemu.power import Found, find_vms, power_down
from tests import devices
from tests.qemus import Qemu


@pytest.fixture
def deaf(make_disk: Callable[..., Qemu]) -> Qemu:
    """A machine whose firmware knows no power button."""
    devices.require("qemu-system")
    qemu = make_disk()
    qemu.start_machine()
    return qemu


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["power-down", *args])


def test_it_is_found_by_its_disk(deaf: Qemu, tmp_path: Path) -> None:
    alias = tmp_path / "alias"
    alias.symlink_to(deaf.image)
    assert find_vms([str(alias)], [deaf.socket]) == Found([deaf.socket], [])
    found = find_vms([str(deaf.image), "/dev/null"], [deaf.socket])
    assert found == Found([deaf.socket], ["/dev/null"])


def test_a_disk_without_a_path_is_found_by_its_node(deaf: Qemu) -> None:
    here = find_vms([f"{deaf.socket}/disk", str(deaf.image)], [deaf.socket])
    assert here == Found([deaf.socket], [])
    other = f"{deaf.socket}/other"
    assert find_vms([other], [deaf.socket]) == Found([], [other])


def test_a_socket_that_is_no_qmp(
    deaf: Qemu, tmp_path: Path, resources: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(power, "PATIENCE_SECONDS", 3.0)
    mute = str(tmp_path / "mute")
    listening = resources.enter_context(socket.socket(socket.AF_UNIX))
    listening.bind(mute)
    listening.listen()
    assert find_vms([str(deaf.image)], [mute, deaf.socket]) == Found([deaf.socket], [])
    with pytest.raises(Unavailable) as caught:
        find_vms(["/dev/null"], [mute, deaf.socket])
    assert caught.value.reason == "QMP_UNREACHABLE"


def test_a_guest_that_refuses(deaf: Qemu) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        power_down(deaf.socket, 1.0, kill=False)
    assert caught.value.reason == "GUEST_STILL_ON"
    assert deaf.process is not None
    assert deaf.process.poll() is None
    ended = power_down(deaf.socket, 1.0, kill=True)
    assert (ended.forced, ended.process_ended) == (True, True)
    assert deaf.process.wait(20) == 0  # it was asked to quit


def test_a_qemu_that_even_a_kill_does_not_end(deaf: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel holds it, as it waits for storage."""
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda process, number: None)
    monkeypatch.setattr(power, "_QUIT_SECONDS", 0.2)
    assert deaf.process is not None
    deaf.process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(power, "converse", lambda address, work, patience: None)
    monkeypatch.setattr(power, "_is_off", lambda address: False)
    with pytest.raises(FailedPrecondition, match="SIGKILL") as caught:
        power_down(deaf.socket, 0.1, kill=True)
    assert caught.value.reason == "GUEST_STILL_ON"


def test_a_guest_that_is_off_already(deaf: Qemu) -> None:
    deaf.kill()
    words = ["--socket", deaf.socket, str(deaf.image)]
    assert run(*words).exit_code == 1
    done = run(*words, "--allow-off", "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"powered_down": []})


def test_what_is_on_is_powered_down_even_if_another_disk_is_missing(deaf: Qemu) -> None:
    """As where a VM has one of two volumes open: it is not off."""
    words = ["--socket", deaf.socket, str(deaf.image), "/dev/null", "--seconds", "1s"]
    missing = run(*words)
    assert (missing.exit_code, "has /dev/null open" in missing.stderr) == (1, True)
    refused = run(*words, "--allow-off")
    assert (refused.exit_code, "is still on" in refused.stderr) == (1, True)
    assert deaf.process is not None
    assert deaf.process.poll() is None
    done = run(*words, "--allow-off", "--kill", "--json")
    assert done.exit_code == 0, done.output
    assert [one["socket"] for one in json.loads(done.stdout)["powered_down"]] == [deaf.socket]
    assert deaf.process.wait(20) == 0


def test_as_a_hook_it_takes_the_disks_of_the_migration(
    deaf: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--socket", deaf.socket).exit_code == 2
    monkeypatch.setenv("WARMSYNC_VOLUMES", "1")
    monkeypatch.setenv("WARMSYNC_VOLUME_0", str(deaf.image))
    pattern = str(Path(deaf.socket).with_name("*.sock"))
    refused = run("--socket", pattern, "--seconds", "1s")
    assert (refused.exit_code, "is still on" in refused.stderr) == (1, True)
    done = run("--socket", pattern, "--seconds", "1s", "--kill")
    assert done.exit_code == 0, done.output
    assert "ended by force" in done.stdout
