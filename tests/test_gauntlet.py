"""A short gauntlet, and that its parts do what they say. `make gauntlet` plays on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from agent.qemu.image import Image
from agent.source import cutover
from tests.content import Disk
from tests.devices import require, scratch_directory
from tests.e2e import disks
from tests.gauntlet.breaches.__main__ import notice
from tests.gauntlet.breaches.rules import BREACHES
from tests.gauntlet.field import BreachError, Field, expected
from tests.gauntlet.fragile import FragileDisk, fragile_disk
from tests.gauntlet.host import Host
from tests.gauntlet.judge import judge_logs
from tests.gauntlet.machine import machine
from tests.gauntlet.play import play
from tests.gauntlet.proxy import Proxy
from tests.gauntlet.schedule import (
    CUTOVER_FAULTS,
    ENDING_FAULTS,
    FAULTS,
    QEMU_FAULTS,
    Schedule,
    schedule,
)
from tests.gauntlet.tally import BROKEN, Record, append, read, table
from tests.gauntlet.volumes import content_of, enlarge, fill_up, make_volume, small_directory
from tests.native.tracking import bpffs

SEEDS = (3, 6, 15, 28)
"""Quick ones that differ; others are for `make gauntlet`."""
ENDS = ("rolled back", "finished", "cancelled", "forgotten", "undecided")
BLOCK = 64 << 10


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_schedule_is_survived(seed: int) -> None:
    require("root", "loop", "bpf", "nbdkit", "fio")
    plan = schedule(seed)
    print(plan)
    with bpffs() as pins, scratch_directory() as directory:
        how = play(plan, directory, pins, Counter())
    assert how in ENDS or how.startswith("failed")


def test_what_only_the_proof_notices_is_a_breach(tmp_path: Path) -> None:
    for name in ("source", "target"):
        (tmp_path / name).write_text("level=info migration begins\n")
    agents = {
        name: SimpleNamespace(name=name, log=tmp_path / name, expects=())
        for name in ("source", "target")
    }
    ground = cast(Field, SimpleNamespace(**agents))

    def spoil(kind: str) -> None:
        plan = cast(Schedule, SimpleNamespace(kinds={kind}, tls=False))
        for agent in agents.values():
            agent.expects = expected(plan)

    spoil("delay")
    judge_logs(ground)
    (tmp_path / "source").write_text('level=error copies differ id=g1 message="1 chunk"\n')
    with pytest.raises(BreachError, match="only the proof has noticed"):
        judge_logs(ground)
    (tmp_path / "source").write_text('level=error oh trace="Traceback: KeyError"\n')
    with pytest.raises(BreachError, match="nobody expects"):
        judge_logs(ground)
    (tmp_path / "source").write_text('level=error oh trace="Traceback: DecodeError"\n')
    with pytest.raises(BreachError, match="nobody expects"):
        judge_logs(ground)
    spoil("garble")  # of a message that was spoilt
    judge_logs(ground)


def test_a_release_that_is_not_answered_for_long_is_within_reach(tmp_path: Path) -> None:
    require("root")
    code = "from agent.source import cutover; print(cutover.RELEASE_SECONDS)"
    limits = set()
    for seconds in (None, 0.5):
        host = Host(tmp_path, "source", replace(schedule(1), release_seconds=seconds))
        run = subprocess.run([*host.command, sys.executable, "-c", code], stdout=subprocess.PIPE)
        limits.add(float(run.stdout))
    assert limits == {0.5, cutover.RELEASE_SECONDS}


def test_a_smaller_target_has_room_for_what_is_used(tmp_path: Path) -> None:
    require("root", "loop", "nbdkit")
    plan = next(one for one in map(schedule, range(1000)) if one.smaller)
    with ExitStack() as stack:
        made = make_volume(stack, plan, 0, tmp_path)
        _, end = content_of(made.source, plan)
        assert end < disks.size_of(made.target) < disks.size_of(made.source)


def test_an_outage_lets_the_last_words_arrive_and_none_back() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        proxy = Proxy("127.0.0.2", "127.0.0.1", (port,))
        try:
            with socket.create_connection(("127.0.0.2", port), 5) as ours:
                theirs, _ = server.accept()
                proxy.hold_answers(held=True)
                ours.sendall(b"release")
                assert theirs.recv(7) == b"release"
                theirs.sendall(b"released")
                time.sleep(0.1)
                proxy.refuse(refusing=True)
                proxy.hold_answers(held=False)
                assert ours.recv(8) == b""
                theirs.close()
            with socket.create_connection(("127.0.0.2", port), 5) as ours:
                assert ours.recv(1) == b""
            proxy.refuse(refusing=False)
            again = socket.create_connection(("127.0.0.2", port), 5)
            with again as ours, server.accept()[0] as theirs:
                theirs.sendall(b"again")
                assert ours.recv(5) == b"again"
        finally:
            proxy.close()


@pytest.mark.timeout(900)
def test_a_broken_rule_is_noticed() -> None:
    require("root", "loop", "bpf", "nbdkit", "fio")
    # The power of a fragile target is cut in it, and both agents live: nothing else tells.
    seen = notice("4", 13, 8)
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
    assert (played, seen.suitable, seen.seeds, seen.is_noticed) == ([41, 59], 2, 59, False)


def test_every_fault_happens() -> None:
    plans = [schedule(seed) for seed in range(800)]
    met = Counter(fault.kind for plan in plans for fault in plan.faults)
    assert set(met) == {*FAULTS, *QEMU_FAULTS.values()}
    assert {plan.cutover.kind for plan in plans} >= set(CUTOVER_FAULTS)
    assert {plan.ending_fault.kind for plan in plans} == set(ENDING_FAULTS)
    assert {plan.carrier for plan in plans} == {"tcp", "grpc"}
    assert {plan.tls for plan in plans} == {True, False}
    assert {plan.tracker for plan in plans} == {"ebpf", "scan", "qemu"}
    assert {plan.verify for plan in plans} == {"none", "final", "full"}
    assert {plan.release_seconds is None for plan in plans} == {True, False}
    assert {plan.smaller for plan in plans} == {True, False}
    assert {plan.qemu_exits for plan in plans if plan.tracker == "qemu"} == {True, False}
    assert schedule(7) == schedule(7)


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_fragile_disk_loses_what_was_not_flushed(sector_size: int) -> None:
    with fragile_disk(1 << 20, sector_size) as disk:
        _write(disk, 0, b"kept", flush=True)
        _write(disk, BLOCK, b"lost", flush=False)
        assert _read(disk, BLOCK) == b"lost"
        disk.lose()
        assert (_read(disk, 0), _read(disk, BLOCK)) == (b"kept", bytes(4))


@pytest.mark.parametrize("content", [bytes(4096), b"else" * 1024])
def test_a_fragile_disk_is_replaced_by_another(content: bytes) -> None:
    with fragile_disk((1 << 20) + 512) as disk:
        _write(disk, 0, b"kept", flush=True)
        with Disk(disk.path, writable=True) as opened:
            disk.replace(content)
            with pytest.raises(OSError, match="Input/output error"):
                opened.write(0, bytes(4096))
        assert {_read(disk, 0), _read(disk, (1 << 20) - 4096)} == {content[:4]}
        with Disk(disk.path) as opened:
            assert opened.size_bytes == (1 << 20) + 512


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


def test_a_daemon_that_an_agent_leaves_is_noticed_and_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require("qemu")
    monkeypatch.setattr("tests.gauntlet.machine._QUIT_SECONDS", 0.5)
    keeper_module = pytest.importorskip("agent.qemu.keeper")
    with scratch_directory() as directory:
        up = ExitStack()
        made = up.enter_context(machine(directory / "vm0", 1 << 20, "raw"))
        made.exit()
        image = Image(made.image)
        keeper = keeper_module.Keeper(made._qemu.seat(), image, "raw")
        assert keeper.is_current
        with pytest.raises(AssertionError, match="storage daemons"):
            up.close()
        assert keeper._process.wait(20) == -signal.SIGKILL
        keeper.stop()
        image.close()


def test_a_small_directory_is_full_until_it_is_enlarged() -> None:
    require("root")
    with small_directory() as directory:
        file = directory / "file"
        with pytest.raises(OSError, match="No space left"):
            file.write_bytes(bytes(4 << 20))
        enlarge(directory)
        file.write_bytes(bytes(4 << 20))
        fill_up(directory)
        with pytest.raises(OSError, match="No space left"):
            (directory / "other").write_bytes(bytes(1 << 20))


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
    lost, told = "BreachError: bytes lost", {"cutover: OWNER_UNKNOWN": 1}
    append(log, Record(2, BROKEN, 5.0, {"cut": 1, "hold": 1}, "plan", lost, told))
    text = table(read(log, log))
    assert "4 schedules" in text
    assert "8 faults" in text
    assert "6 cut" in text
    assert "2 refusals" in text
    assert "2 cutover: OWNER_UNKNOWN" in text
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
