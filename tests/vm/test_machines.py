"""Virtual machines that are moved while their guests write: all that was acknowledged is there.

One of them is in `make test`, all in `make test-vm`. docs/guests.md says what is checked.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent.qemu.power import Found, find_vms, power_down
from tests import devices
from tests.devices import LoopDevice
from tests.e2e import disks
from tests.e2e.agents import eventually
from tests.e2e.hosts import Hosts
from tests.native.tracking import bpffs
from tests.vm.guest import SECONDS, Guest, Setup
from tests.vm.machine import Machine, Plan

vm = pytest.mark.vm
pytestmark = pytest.mark.timeout(900)

BUDGET = ("--tracker", "ebpf", "--max-downtime", "20s")
SLOW = ("--bandwidth-limit", "16M")
RECORDS = 20
"""How many a guest writes at least in each part of a test."""

PLANS = {
    "ext4": Plan(),
    "ext4-writeback": Plan(cache="writeback", aio="threads"),
    "ext4-writeback-io_uring": Plan(cache="writeback"),
    "ext4-native": Plan(aio="native"),
    "ext4-partition": Plan(partitioned=True),
    "ext4-two-disks": Plan(disks=2),
    "ext4-larger-target": Plan(more_bytes=64 * disks.MIB),
    "xfs": Plan("xfs"),
    "xfs-writeback": Plan("xfs", cache="writeback", aio="threads"),
    "xfs-partition": Plan("xfs", partitioned=True),
    "xfs-two-disks": Plan("xfs", disks=2, cache="writeback"),
}
CUT = ("ext4", "ext4-writeback", "ext4-two-disks", "xfs", "xfs-two-disks")


def others(names: list[str]) -> list[object]:
    """Return all parameters, the first as it is and those after it only for `make test-vm`."""
    return [names[0], *(pytest.param(name, marks=vm) for name in names[1:])]


def migrate(hosts: Hosts, machine: Machine, guest: Guest, *words: str) -> str:
    """Start a migration of a machine that runs, and wait until it may be cut over."""
    name = hosts.pair.start(*BUDGET, *words, volumes=machine.volumes)
    converge(hosts, name)
    # What is written now can only come over by its marks.
    guest.wait_written(RECORDS)
    return name


def converge(hosts: Hosts, name: str) -> None:
    """Wait until a migration has converged."""
    shown = eventually(
        lambda: hosts.source.show(name),
        lambda now: now["state"] in ("CONVERGED", "FAILED"),
        seconds=SECONDS,
    )
    assert shown["state"] == "CONVERGED", shown
    assert shown["suspect_volumes"] == 0, shown


def cut_over(hosts: Hosts, machine: Machine, name: str) -> None:
    """Cut over a machine that is off: both sides are the same, only one can be written."""
    assert hosts.source.ask("cutover", name, "--force")["state"] == "CUT_OVER"
    for source, target in machine.volumes:
        disks.assert_equal(source, target)
        assert disks.is_fenced(source)


def assert_discarded(disk: LoopDevice) -> None:
    """The guest's discards have come down to the host's device."""
    name = disk.path.removeprefix("/dev/")
    with open(f"/sys/block/{name}/stat") as stat:
        assert int(stat.read().split()[11]) > 0


def live_on(machine: Machine, sides: list[LoopDevice]) -> None:
    """Boot on these disks; the guest finds all it was promised, writes on, ends well."""
    guest = machine.boot(sides)
    guest.wait_written(RECORDS)
    machine.end(guest)
    machine.check(sides)


@pytest.mark.parametrize("plan", others(list(PLANS)))
def test_a_machine_moves(hosts: Hosts, machines: Callable[..., Machine], plan: str) -> None:
    machine = machines(plan=PLANS[plan])
    guest = machine.boot(machine.source)
    name = migrate(hosts, machine, guest)
    machine.end(guest)
    assert_discarded(machine.source[0])
    cut_over(hosts, machine, name)
    machine.check(machine.target)
    live_on(machine, machine.target)
    assert hosts.source.ask("finish", name)["state"] == "COMPLETED"
    hosts.pair.tidy()
    hosts.pair.assert_clean()


@vm
@pytest.mark.parametrize("plan", CUT)
def test_a_machine_moves_after_a_power_cut(
    hosts: Hosts, machines: Callable[..., Machine], plan: str
) -> None:
    machine = machines(plan=PLANS[plan])
    guest = machine.boot(machine.source)
    name = migrate(hosts, machine, guest)
    machine.end(guest, cut=True)
    cut_over(hosts, machine, name)
    assert all(machine.is_dirty(disk) for disk in machine.target)
    live_on(machine, machine.target)  # its journals are replayed there
    hosts.pair.tidy()


@vm
@pytest.mark.parametrize("has_written", [False, True], ids=["no-disk", "has-written"])
def test_a_boot_that_fails_is_rolled_back(
    hosts: Hosts, machines: Callable[..., Machine], has_written: bool
) -> None:
    machine = machines()
    guest = machine.boot(machine.source)
    name = migrate(hosts, machine, guest)
    machine.end(guest)
    cut_over(hosts, machine, name)
    if has_written:
        # It was given up there: what it wrote there is not promised, nor may it be found.
        given_up = machine.boot(machine.target)
        given_up.wait_written(RECORDS)
    else:
        given_up = machine.start(machine.target, Setup(data="nvme9n1"))
        assert given_up.wait_failed() == "failed mount nvme9n1"
    given_up.cut_power()
    assert hosts.source.ask("rollback", name)["state"] == "ROLLED_BACK"
    guest = machine.boot(machine.source)
    # And it can be moved again.
    name = migrate(hosts, machine, guest)
    machine.end(guest)
    cut_over(hosts, machine, name)
    live_on(machine, machine.target)
    hosts.pair.tidy()


@vm
@pytest.mark.parametrize("state", ["SEEDING", "CONVERGED"])
@pytest.mark.parametrize("plan", ["ext4-two-disks", "xfs-writeback"])
def test_the_source_agent_is_killed_in_the_middle(
    hosts: Hosts, machines: Callable[..., Machine], plan: str, state: str
) -> None:
    machine = machines(plan=PLANS[plan])
    guest = machine.boot(machine.source)
    words = SLOW if state == "SEEDING" else ()
    name = hosts.pair.start(*BUDGET, *words, volumes=machine.volumes)
    hosts.source.wait(name, state, until=lambda now: now["state"] == state and now["bytes_sent"])
    hosts.end("source", signal.SIGKILL)
    guest.wait_written(RECORDS)  # the kernel goes on marking
    hosts.start("source")
    assert hosts.source.show(name)["resumes"] == 1
    hosts.source.ask("update", name, "--bandwidth-limit", "0")
    converge(hosts, name)
    guest.wait_written(RECORDS)
    machine.end(guest)
    cut_over(hosts, machine, name)
    machine.check(machine.target)
    live_on(machine, machine.target)
    hosts.pair.tidy()


@vm
def test_three_machines_at_once(hosts: Hosts, machines: Callable[..., Machine]) -> None:
    plans = {"a": Plan(), "b": Plan("xfs", cache="writeback"), "c": Plan(disks=2)}
    all_three = [machines(name, plan) for name, plan in plans.items()]
    guests = [machine.start(machine.source) for machine in all_three]
    for guest in guests:
        guest.wait_written(1)
    names = [hosts.pair.start(*BUDGET, volumes=machine.volumes) for machine in all_three]
    for machine, guest, name in zip(all_three, guests, names, strict=True):
        converge(hosts, name)
        guest.wait_written(RECORDS)
        machine.end(guest)
        cut_over(hosts, machine, name)
        machine.check(machine.target)
    for machine in all_three:
        live_on(machine, machine.target)
    hosts.pair.tidy()


@vm
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("partitioned", [False, True], ids=["bare", "partition"])
def test_a_machine_is_larger_on_the_other_side(
    hosts: Hosts, machines: Callable[..., Machine], kind: str, partitioned: bool
) -> None:
    machine = machines(plan=Plan(kind, partitioned=partitioned, more_bytes=64 * disks.MIB))
    guest = machine.boot(machine.source)
    name = migrate(hosts, machine, guest, "--resize")
    machine.end(guest)
    shown = hosts.source.ask("cutover", name, "--force")
    assert shown["state"] == "CUT_OVER"
    (resize,) = shown["resizes"]
    assert resize["error"] is None, resize
    assert shown["downtime_parts"]["resize_seconds"] > 0
    machine.check(machine.target)
    before, machine.size_bytes = machine.size_bytes, 0
    live_on(machine, machine.target)  # all that was promised is there
    assert machine.size_bytes > before + 32 * disks.MIB
    hosts.pair.tidy()


@vm
def test_a_machine_with_a_qcow2_disk_moves(
    tmp_path: Path, machines: Callable[..., Machine]
) -> None:
    """Its QEMU ends with the power-down: what it had marked is read from the image then."""
    machine = machines(plan=Plan(image="qcow2", cache="writeback"))
    with bpffs() as pins, devices.scratch_directory() as short, ExitStack() as stack:
        run_dir = str(short / "run")  # for sockets, whose paths are short
        settings = {"qemu": {"sockets": [f"{tmp_path}/*/qmp"], "run_dir": run_dir}}
        hosts = Hosts(tmp_path, pins, stack, settings, (f"{tmp_path}/*",))
        guest = machine.boot(machine.source)
        name = hosts.pair.start(
            "--tracker", "qemu", "--max-downtime", "20s", volumes=machine.volumes
        )
        converge(hosts, name)
        guest.wait_written(RECORDS)
        machine.end(guest)
        shown = hosts.source.ask("cutover", name, "--force")
        assert (shown["state"], shown["suspect_volumes"]) == ("CUT_OVER", 0)
        for image, target in machine.volumes:
            words = ("-f", "qcow2", "-F", "raw", image, target)
            assert "identical" in devices.run("qemu-img", "compare", *words)
        machine.check(machine.target)
        live_on(machine, machine.target)
        assert hosts.source.ask("finish", name)["state"] == "COMPLETED"


@vm
def test_the_hook_that_comes_along_powers_down(machines: Callable[..., Machine]) -> None:
    """`warmsync power-down` finds the QEMU by its block device, and waits for its end."""
    machine = machines(plan=PLANS["ext4"])
    guest = machine.boot(machine.source)
    address = str(guest.monitor)
    paths = [source for source, _ in machine.volumes]
    assert find_vms(paths, [address]) == Found([address], [])
    ended = power_down(address, SECONDS, kill=False)
    assert (ended.forced, ended.process_ended) == (False, True)
    assert guest.process.wait(SECONDS) == 0
    machine.promised |= guest.acknowledged()
    machine.check(machine.source)
    assert find_vms(paths, [address]) == Found([], paths)
