"""The brake: put on, tightened, undone whatever happened meanwhile, by the next agent too."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from agent import brake as brake_module
from agent.brake import Brake, find_brake, undo_left_behind
from agent.cgroup import V1_FILE, V2_FILE, Cgroup
from agent.errors import FailedPrecondition, InvalidArgument
from agent.migration import GuestThrottle
from native.blockio import BlockDevice
from tests import cgroups, devices
from tests.agent.fake_cgroups import FakeKernel, install, make, opened
from tests.devices import LoopDevice

A, B = "8:0", "8:16"
MIB = 1 << 20


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    return install(monkeypatch)


@pytest.fixture(params=[V1_FILE, V2_FILE])
def cgroup(request: pytest.FixtureRequest, tmp_path: Path, kernel: FakeKernel) -> Cgroup:
    return opened(make(tmp_path / "vm", request.param))


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "state" / "brakes" / "web.1.json"


@pytest.fixture
def brake(cgroup: Cgroup, journal: Path) -> Brake:
    return Brake(cgroup, [A, B], journal)


def limits(cgroup: Cgroup) -> tuple[int, int]:
    return cgroup.read(A), cgroup.read(B)


def test_on_tighter_and_off(brake: Brake, cgroup: Cgroup, journal: Path) -> None:
    brake.prove()
    assert not journal.exists()
    brake.limit(400)
    assert limits(cgroup) == (400, 400)
    brake.limit(200)
    assert limits(cgroup) == (200, 200)
    assert journal.exists()
    brake.lift()
    assert limits(cgroup) == (0, 0)
    assert list(journal.parent.iterdir()) == []
    brake.lift()
    brake.limit(100)  # and on again, after a pause
    brake.lift()
    assert limits(cgroup) == (0, 0)


def test_an_operators_limit_comes_back_and_is_never_raised(brake: Brake, cgroup: Cgroup) -> None:
    cgroup.write(A, 300)
    brake.limit(400)
    assert limits(cgroup) == (300, 400)
    brake.limit(200)
    assert limits(cgroup) == (200, 200)
    brake.lift()
    assert limits(cgroup) == (300, 0)


def test_an_operator_who_decides_meanwhile_wins(brake: Brake, cgroup: Cgroup) -> None:
    brake.limit(400)
    cgroup.write(A, 700)
    brake.lift()
    assert limits(cgroup) == (700, 0)
    brake.limit(400)
    cgroup.write(A, 50)
    cgroup.write(B, 0)
    brake.limit(200)
    assert limits(cgroup) == (50, 200)
    brake.lift()
    assert limits(cgroup) == (50, 0)


def test_the_journal_is_written_before_the_limit(
    brake: Brake, cgroup: Cgroup, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []
    write = Cgroup.write

    def watched(cgroup: Cgroup, disk: str, limit: int) -> None:
        seen.append((journal.exists(), limit))
        write(cgroup, disk, limit)

    monkeypatch.setattr(Cgroup, "write", watched)
    brake.limit(400)
    assert seen == [(True, 400)] * 2


def test_without_a_journal_there_is_no_limit(brake: Brake, cgroup: Cgroup, journal: Path) -> None:
    journal.parent.parent.write_text("in the way")
    with pytest.raises(NotADirectoryError):
        brake.limit(400)
    assert limits(cgroup) == (0, 0)
    brake.lift()


@pytest.mark.parametrize("killed_at", range(6))
def test_the_next_agent_undoes_what_a_killed_one_left(
    cgroup: Cgroup,
    journal: Path,
    killed_at: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Killed before its first, second, ... write; an operator's limit stood on one disk."""

    class Killed(BaseException):
        pass

    cgroup.write(B, 150)
    write, left = Cgroup.write, killed_at

    def dying(cgroup: Cgroup, disk: str, limit: int) -> None:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        write(cgroup, disk, limit)

    monkeypatch.setattr(Cgroup, "write", dying)
    brake = Brake(cgroup, [A, B], journal)

    def tighten() -> None:
        for limit in (400, 200, 100, 50):
            brake.limit(limit)

    with pytest.raises(Killed):
        tighten()
    monkeypatch.setattr(Cgroup, "write", write)
    with caplog.at_level(logging.WARNING):
        undo_left_behind(journal.parent)
    assert limits(cgroup) == (0, 150)
    assert list(journal.parent.iterdir()) == []
    assert "lifted a guest's limit" in caplog.text
    assert "another limit" not in caplog.text
    undo_left_behind(journal.parent)
    assert limits(cgroup) == (0, 150)


def test_nothing_to_undo(tmp_path: Path) -> None:
    undo_left_behind(tmp_path / "absent")
    (tmp_path / "half.new").write_text("{")
    undo_left_behind(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_limits_do_not_outlive_the_boot(
    brake: Brake, cgroup: Cgroup, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brake.limit(400)
    monkeypatch.setattr(brake_module, "boot_id", lambda: "another")
    undo_left_behind(journal.parent)
    assert limits(cgroup) == (400, 400)  # somebody else's by now
    assert not journal.exists()


def test_a_cgroup_that_vanished_is_no_error(brake: Brake, cgroup: Cgroup, journal: Path) -> None:
    brake.limit(400)
    Path(cgroup.path).rename(f"{cgroup.path}.gone")
    brake.lift()
    assert not journal.exists()
    with pytest.raises(FileNotFoundError):
        brake.limit(400)


def test_a_disk_that_vanished_is_no_error(
    brake: Brake, cgroup: Cgroup, journal: Path, kernel: FakeKernel
) -> None:
    brake.limit(400)
    kernel.refuses[A] = errno.ENODEV
    undo_left_behind(journal.parent)
    assert cgroup.read(B) == 0
    assert not journal.exists()


def test_what_cannot_be_undone_is_tried_again(
    brake: Brake,
    cgroup: Cgroup,
    journal: Path,
    kernel: FakeKernel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    brake.limit(400)
    kernel.refuses[A] = errno.EACCES
    with pytest.raises(PermissionError):
        brake.lift()
    assert limits(cgroup) == (400, 0)
    undo_left_behind(journal.parent)
    assert "guest still throttled id=web.1" in caplog.text
    assert journal.exists()
    kernel.refuses.clear()
    brake.lift()
    assert limits(cgroup) == (0, 0)
    assert not journal.exists()


def test_what_an_earlier_migration_could_not_undo_is_no_operators(
    brake: Brake, cgroup: Cgroup, journal: Path
) -> None:
    brake.limit(400)
    again = Brake(cgroup, [A, B], journal)
    again.limit(800)
    assert limits(cgroup) == (800, 800)
    again.lift()
    assert limits(cgroup) == (0, 0)


def test_a_damaged_journal_is_put_aside(journal: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal.parent.mkdir(parents=True)
    for text in ("", "{", "[]", json.dumps({"boot": "x"})):
        journal.write_text(text)
        undo_left_behind(journal.parent)
        assert "journal of a throttled guest is damaged" in caplog.text
        assert [path.name for path in journal.parent.iterdir()] == ["web.1.damaged"]
        caplog.clear()


def test_the_same_limits_are_the_same_identities(cgroup: Cgroup, journal: Path) -> None:
    one, other = (Brake(cgroup, disks, journal) for disks in ([A, B], [B]))
    assert any(a.overlaps(b) for a in one.identities for b in other.identities)
    third = Brake(cgroup, ["8:32"], journal)
    assert not any(a.overlaps(b) for a in one.identities for b in third.identities)


def test_a_file_is_refused(
    tmp_path: Path, kernel: FakeKernel, image_file: Callable[..., Path]
) -> None:
    path = image_file(4096)
    with BlockDevice(str(path)) as device, pytest.raises(InvalidArgument) as caught:
        find_brake(
            GuestThrottle(str(make(tmp_path / "vm")), 1), [device], (f"{tmp_path}/*",), tmp_path
        )
    assert caught.value.reason == "THROTTLE_UNSUITABLE"
    assert str(path) in str(caught.value)


# The real kernel.


@pytest.fixture
def real(resources: ExitStack) -> cgroups.BlkioCgroup:
    return resources.enter_context(cgroups.blkio_cgroup())


@pytest.fixture
def resident(resources: ExitStack, real: cgroups.BlkioCgroup) -> None:
    resources.enter_context(cgroups.resident(real))


def found(real: cgroups.BlkioCgroup, journal: Path, *paths: str) -> Brake:
    with ExitStack() as stack:
        opened = [stack.enter_context(BlockDevice(path)) for path in paths]
        wanted = GuestThrottle(str(real.path), MIB)
        return find_brake(wanted, opened, (str(real.path),), journal)


def write_in(cgroup: cgroups.BlkioCgroup, path: str, size_mib: int) -> float:
    """Write to a device from within a cgroup; returns the seconds that dd measured."""
    command = f"echo $$ > {cgroup.path}/cgroup.procs; exec dd if=/dev/zero of={path} bs=256K "
    command += f"count={4 * size_mib} oflag=direct"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    return float(done.stderr.rpartition(" copied, ")[2].split()[0])


@pytest.mark.usefixtures("resident")
def test_writes_slow_down_and_are_as_fast_as_before_afterwards(
    real: cgroups.BlkioCgroup, journal: Path, loop_device: Callable[..., LoopDevice]
) -> None:
    path = loop_device(16 * MIB).path
    brake = found(real, journal, path)
    brake.prove()
    assert real.limits() == {}
    brake.limit(4 * MIB)
    assert real.limits() == {cgroups.number_of(path): 4 * MIB}
    slow = write_in(real, path, 4)
    brake.lift()
    assert real.limits() == {}
    # Not how fast, but which of them: 4 MiB at 4 MiB/s take a second, less one slice. What else
    # the machine does may slow a free run as well, but hardly five.
    assert slow > 0.5
    assert any(write_in(real, path, 4) < slow / 3 for _ in range(5))


@pytest.mark.usefixtures("resident")
def test_partitions_of_one_disk_are_one_limit(
    real: cgroups.BlkioCgroup, journal: Path, loop_device: Callable[..., LoopDevice]
) -> None:
    disk = loop_device(16 * MIB, partitions=True)
    brake = found(real, journal, *disk.partitions)
    brake.limit(MIB)
    assert real.limits() == {cgroups.number_of(disk.path): MIB}
    undo_left_behind(journal.parent)
    assert real.limits() == {}
    brake.lift()


@pytest.mark.usefixtures("resident")
def test_a_limit_of_a_device_that_was_detached_is_undone(
    real: cgroups.BlkioCgroup, journal: Path
) -> None:
    with devices.loop_device(MIB) as disk:
        number = cgroups.number_of(disk.path)
        found(real, journal, disk.path).limit(MIB)
    assert real.limits() == {number: MIB}  # the kernel keeps it for the number's next user
    undo_left_behind(journal.parent)
    assert real.limits() == {}


def test_a_real_cgroup_that_was_removed(
    journal: Path, loop_device: Callable[..., LoopDevice]
) -> None:
    path = loop_device(MIB).path
    with cgroups.blkio_cgroup() as real, cgroups.resident(real):
        brake = found(real, journal, path)
        brake.limit(MIB)
    brake.lift()
    assert not journal.exists()


def test_an_empty_real_cgroup_is_refused(
    real: cgroups.BlkioCgroup, journal: Path, loop_device: Callable[..., LoopDevice]
) -> None:
    with pytest.raises(FailedPrecondition, match="nothing runs"):
        found(real, journal, loop_device(MIB).path)
