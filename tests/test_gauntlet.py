"""A short gauntlet, and that its parts do what they say. `make gauntlet` plays on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.content import Disk
from tests.devices import require, scratch_directory
from tests.gauntlet.breaches.__main__ import notice
from tests.gauntlet.breaches.rules import BREACHES
from tests.gauntlet.fragile import FragileDisk, fragile_disk
from tests.gauntlet.host import Host
from tests.gauntlet.play import play
from tests.gauntlet.schedule import CUTOVER_FAULTS, ENDING_FAULTS, FAULTS, schedule
from tests.gauntlet.tally import BROKEN, Record, append, read, table
from tests.gauntlet.volumes import enlarge, small_directory
from tests.native.tracking import bpffs

SEEDS = range(1, 9)
BLOCK = 64 << 10


@pytest.mark.parametrize("seed", SEEDS)
def test_a_schedule_is_survived(seed: int) -> None:
    require("root", "loop", "bpf", "nbdkit", "fio")
    plan = schedule(seed)
    print(plan)
    with bpffs() as pins, scratch_directory() as directory:
        how = play(plan, directory, pins, Counter())
    assert how in ("rolled back", "finished", "cancelled", "forgotten") or how.startswith("failed")


def test_a_broken_rule_is_noticed() -> None:
    require("root", "loop", "bpf", "nbdkit", "fio")
    seen = notice("4", SEEDS[0], len(SEEDS))
    assert "bytes lost" in seen.judge, f"nobody missed the flush: {seen}"


def test_each_rule_has_a_breach() -> None:
    assert {one.rule for one in BREACHES.values()} == set(range(1, 14))
    for name, breach in BREACHES.items():
        assert any(map(breach.suits, map(schedule, range(1, 60)))), name


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_applies(tmp_path: Path, name: str) -> None:
    require("root")
    host = Host(tmp_path, "source", schedule(1), name)
    run = subprocess.run([*host.command, sys.executable, "-c", ""], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_breach_that_does_not_apply_ends_the_agent(tmp_path: Path) -> None:
    require("root")
    host = Host(tmp_path, "source", schedule(1), "14")
    run = subprocess.run([*host.command, sys.executable, "-c", ""], capture_output=True, text=True)
    assert run.returncode != 0
    assert "the breach is not applied" in run.stderr


def test_only_the_schedules_that_suit_a_breach_are_played(monkeypatch: pytest.MonkeyPatch) -> None:
    played = []
    monkeypatch.setattr(
        "tests.gauntlet.breaches.__main__.play", lambda plan, *_, **__: played.append(plan.seed)
    )
    require("root", "bpf")
    seen = notice("3", 1, within=2)
    assert (played, seen.suitable, seen.seeds, seen.is_noticed) == ([34, 41], 2, 41, False)


def test_every_fault_happens() -> None:
    plans = [schedule(seed) for seed in range(400)]
    met = Counter(fault.kind for plan in plans for fault in plan.faults)
    assert set(met) == set(FAULTS)
    assert {plan.cutover.kind for plan in plans} == set(CUTOVER_FAULTS)
    assert {plan.ending_fault.kind for plan in plans} == set(ENDING_FAULTS)
    assert {plan.carrier for plan in plans} == {"tcp", "grpc"}
    assert {plan.tls for plan in plans} == {True, False}
    assert schedule(7) == schedule(7)


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_fragile_disk_loses_what_was_not_flushed(sector_size: int) -> None:
    with fragile_disk(1 << 20, sector_size) as disk:
        _write(disk, 0, b"kept", flush=True)
        _write(disk, BLOCK, b"lost", flush=False)
        assert _read(disk, BLOCK) == b"lost"
        disk.lose()
        assert (_read(disk, 0), _read(disk, BLOCK)) == (b"kept", bytes(4))


def test_a_fragile_disk_is_dead_for_who_had_it_open() -> None:
    with fragile_disk(1 << 20) as disk, Disk(disk.path, writable=True) as opened:
        disk.lose()
        with pytest.raises(OSError, match="Input/output error"):
            opened.write(0, bytes(4096))
        _write(disk, 0, b"anew", flush=True)


def test_a_fragile_disk_fails_and_stalls_on_demand() -> None:
    with fragile_disk(1 << 20) as disk:
        with disk.failing("pwrite"), pytest.raises(OSError, match="Input/output error"):
            _write(disk, 0, b"none", flush=False)
        assert _read(disk, 0) == bytes(4)
        read = [sys.executable, "-c", f"open({disk.path!r}, 'rb').read(1)"]
        with disk.stalled(), subprocess.Popen(read) as reading:
            time.sleep(0.5)
            assert reading.poll() is None
            disk._server.send_signal(signal.SIGCONT)
            assert reading.wait(20) == 0


def test_a_small_directory_is_full_until_it_is_enlarged() -> None:
    require("root")
    with small_directory() as directory:
        file = directory / "file"
        with pytest.raises(OSError, match="No space left"):
            file.write_bytes(bytes(4 << 20))
        enlarge(directory)
        file.write_bytes(bytes(4 << 20))


def test_a_host_has_a_boot_id_and_a_wall_clock_of_its_own(tmp_path: Path) -> None:
    require("root")
    plan = next(p for p in map(schedule, range(1000)) if "clock source" in p.kinds)
    host = Host(tmp_path, "source", plan)
    before = _look_at(host)
    host.set_clock(86_400)
    host.reboot()
    after = _look_at(host)
    assert before.boot != after.boot
    assert Path("/proc/sys/kernel/random/boot_id").read_text() not in (before.boot, after.boot)
    assert 86_000 < after.wall - before.wall < 87_000
    assert after.monotonic - before.monotonic < 600


def test_the_tally_adds_up(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    append(log, Record(1, "finished", 5.0, {"cut": 2}, "plan"))
    append(log, Record(2, BROKEN, 5.0, {"cut": 1, "hold": 1}, "plan", "BreachError: bytes lost"))
    text = table(read(log, log))
    assert "4 schedules" in text
    assert "8 faults" in text
    assert "6 cut" in text
    assert "--seed 2: BreachError: bytes lost" in text


class _Seen:
    def __init__(self, text: str) -> None:
        boot, wall, monotonic = text.split()
        self.boot, self.wall, self.monotonic = boot + "\n", float(wall), float(monotonic)


def _look_at(host: Host) -> _Seen:
    code = "import time; print(open('/proc/sys/kernel/random/boot_id').read().strip(), "
    code += "time.time(), time.monotonic())"
    return _Seen(subprocess.check_output([*host.command, sys.executable, "-c", code], text=True))


def _write(disk: FragileDisk, offset: int, word: bytes, *, flush: bool) -> None:
    with Disk(disk.path, writable=True) as opened:
        opened.write(offset, word.ljust(4096, b"\0"))
        if flush:
            os.fsync(opened.fd)


def _read(disk: FragileDisk, offset: int) -> bytes:
    with Disk(disk.path) as opened:
        return opened.read(offset, 4096)[:4]
