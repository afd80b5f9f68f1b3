"""The example's controller, as a process, against two agents: it is killed, and goes on."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from examples.controller import controller as controller_module
from tests import content
from tests.devices import LoopDevice
from tests.e2e import disks
from tests.e2e.agents import ROOT, SECONDS, Pair, eventually
from tests.e2e.disks import MIB

SIZE = 8 * MIB
GUEST = """
import os, sys, time
path, off = sys.argv[1:]
fd, number = os.open(path, os.O_RDWR), 0
while not os.path.exists(off):
    number += 1
    os.pwrite(fd, number.to_bytes(8, "little") * 512, number % 64 * 4096)
    os.fsync(fd)
    time.sleep(0.002)
os.close(fd)
"""
POWER_DOWN = """#!/bin/sh
echo "off $1" >> {0}/calls
while test -e {0}/hold; do sleep 0.05; done
touch {0}/$1.off
while kill -0 $(cat {0}/$1.pid) 2> /dev/null && ! grep -q zombie /proc/$(cat {0}/$1.pid)/status
do sleep 0.05; done
"""
BOOT = """#!/bin/sh
echo "on $1" >> {0}/calls
"""


class Rack:
    """VMs of a source host, the commands that act on them, and the plan to evacuate them."""

    def __init__(self, directory: Path, pair: Pair, stack: ExitStack) -> None:
        self.directory = directory
        self.pair = pair
        self._stack = stack
        self.machines: list[dict[str, Any]] = []
        self.calls = directory / "calls"
        self.calls.touch()
        self.plan = directory / "plan.json"
        for name, text in (("power-down", POWER_DOWN), ("boot", BOOT)):
            self.script(name, text.format(directory))

    def script(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text)
        (self.directory / name).chmod(0o755)

    def add(self, name: str, volumes: list[tuple[str, str]]) -> None:
        """Add a VM that writes to the first of its disks."""
        words = [sys.executable, "-c", GUEST, volumes[0][0], str(self.directory / f"{name}.off")]
        process = self._stack.enter_context(subprocess.Popen(words))
        self._stack.callback(process.kill)
        (self.directory / f"{name}.pid").write_text(str(process.pid))
        peer = self.pair.target.address
        self.machines.append({"name": name, "peer": peer, "volumes": volumes})

    def start(self) -> subprocess.Popen[str]:
        """Start the controller."""
        plan = {
            "source": self.pair.source.address,
            "at_once": 2,
            "tries": 2,
            "max_downtime_seconds": 20,
            "power_down": [str(self.directory / "power-down")],
            "boot": [str(self.directory / "boot")],
            "vm": self.machines,
        }
        self.plan.write_text(json.dumps(plan))
        process = subprocess.Popen(
            [sys.executable, "-m", "examples.controller.controller", str(self.plan)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._stack.callback(_end, process)
        return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


@pytest.fixture
def rack(tmp_path: Path, pair: Pair, resources: ExitStack) -> Iterator[Rack]:
    with ExitStack() as stack:
        yield Rack(tmp_path, pair, stack)


@pytest.fixture
def make_volume(loop_device: Callable[..., LoopDevice]) -> Callable[[], tuple[str, str]]:
    def make() -> tuple[str, str]:
        source, target = loop_device(SIZE).path, loop_device(SIZE).path
        content.fill(source, 1)
        disks.soil(target, 2)
        return source, target

    return make


def test_killed_in_the_middle_it_goes_on(
    rack: Rack, make_volume: Callable[[], tuple[str, str]]
) -> None:
    """While it powers the first one down; each is moved whole, booted, and finished."""
    rack.add("web1", [make_volume()])
    rack.add("web2", [make_volume()])
    rack.add("db1", [make_volume(), make_volume()])
    (rack.directory / "hold").touch()
    first = rack.start()
    eventually(rack.calls.read_text, lambda calls: "off" in calls)
    first.kill()
    (rack.directory / "hold").unlink()
    out, _ = first.communicate()  # once the power-down has ended as well
    assert "powering down" in out
    assert "evacuated" not in out
    second = rack.start()
    out, _ = second.communicate(timeout=2 * SECONDS)
    assert second.returncode == 0, out
    assert "found under way" in out
    assert out.count("evacuated") == 3
    for vm in rack.machines:
        shown = rack.pair.source.show(f"evacuate-{vm['name']}")
        assert (shown["state"], shown["owner"]) == ("COMPLETED", "target")
        assert rack.calls.read_text().count(f"on {vm['name']}") == 1
        for source, target in vm["volumes"]:
            disks.assert_equal(source, target)
    # Once more: nothing is left to do.
    again = rack.start()
    out, _ = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, out
    assert rack.calls.read_text().count("on ") == 3


def test_a_machine_that_stays_on_is_left_behind(
    rack: Rack, make_volume: Callable[[], tuple[str, str]]
) -> None:
    source, target = make_volume()
    rack.add("web1", [(source, target)])
    rack.script("power-down", "#!/bin/sh\nexit 0\n")
    controller = rack.start()
    out, _ = controller.communicate(timeout=2 * SECONDS)
    assert controller.returncode == 1, out
    assert "LEFT BEHIND" in out
    assert rack.pair.source.show("evacuate-web1")["owner"] == "source"
    disks.assert_writable(source)


def test_what_failed_is_begun_anew(rack: Rack, make_volume: Callable[[], tuple[str, str]]) -> None:
    source, target = make_volume()
    rack.add("web1", [(source, target)])
    (rack.directory / "hold").touch()
    controller = rack.start()
    eventually(rack.calls.read_text, lambda calls: "off" in calls)
    rack.pair.source.ask("cancel", "evacuate-web1")
    (rack.directory / "hold").unlink()
    out, _ = controller.communicate(timeout=2 * SECONDS)
    assert controller.returncode == 0, out
    assert "CANCELLED" in out
    disks.assert_equal(source, target)


def test_what_its_source_has_forgotten_is_not_written_over(
    rack: Rack, make_volume: Callable[[], tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The VM runs on the target, and its disk there is as free as any other."""
    source, target = make_volume()
    rack.add("web1", [(source, target)])
    controller = rack.start()
    out, _ = controller.communicate(timeout=2 * SECONDS)
    assert controller.returncode == 0, out
    rack.pair.source.ask("delete", "evacuate-web1")
    content.fill(target, 3)
    before = content.read_all(target)
    monkeypatch.setattr(controller_module, "UNSEEN_SECONDS", 1.0)
    assert asyncio.run(controller_module.main(str(rack.plan))) == 1
    assert rack.pair.source.ask("list")["migrations"] == []
    assert content.read_all(target) == before
