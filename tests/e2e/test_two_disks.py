"""A database with its log on one disk and its data on another: never torn between the two.

Its power is cut at a random moment; after the cutover both targets are of that one moment.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import content
from tests.content import Disk
from tests.devices import LoopDevice
from tests.e2e import disks
from tests.e2e.agents import Pair, eventually
from tests.e2e.disks import MIB

SIZE = 16 * MIB
SLOTS = 512
RECORD = 4096

DATABASE = f"""
import os, sys
log, data = (os.open(path, os.O_RDWR) for path in sys.argv[1:])
number = 0
while True:
    number += 1
    record = number.to_bytes(8, "little") * {RECORD // 8}
    for disk, spread in ((log, 1), (data, 37)):
        os.pwrite(disk, record, number * spread % {SLOTS} * {RECORD})
        os.fsync(disk)
    print(number, flush=True)
"""


def _records(path: str, spread: int) -> dict[int, int]:
    """Return, for each slot of a record's number, the last whole record in it."""
    found = {}
    with Disk(path) as disk:
        for slot in range(SLOTS):
            record = disk.read(slot * spread % SLOTS * RECORD, RECORD)
            number = int.from_bytes(record[:8], "little")
            assert record == number.to_bytes(8, "little") * (RECORD // 8), (path, slot)
            found[slot] = number
    return found


@pytest.fixture
def volumes(loop_device: Callable[..., LoopDevice]) -> list[tuple[str, str]]:
    made = [(loop_device(SIZE).path, loop_device(SIZE).path) for _ in range(2)]
    for source, target in made:
        content.fill(source, 1)
        with Disk(source, writable=True) as disk:
            for offset in range(0, SLOTS * RECORD, MIB):
                disk.write(offset, bytes(MIB))
            os.fsync(disk.fd)
        disks.soil(target, 2)
    return made


@pytest.fixture
def database(volumes: list[tuple[str, str]], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (tmp_path / "acknowledged").open("wb") as said:
        words = [sys.executable, "-c", DATABASE, *(source for source, _ in volumes)]
        process = subprocess.Popen(words, stdout=said)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("tracker", ["ebpf", "scan"])
def test_log_and_data_are_of_one_moment(
    pair: Pair,
    volumes: list[tuple[str, str]],
    database: subprocess.Popen[bytes],
    tmp_path: Path,
    tracker: str,
) -> None:
    words = ("--tracker", tracker, "--max-downtime", "5s", "--wait", "converged")
    name = pair.start(*words, volumes=volumes)
    said = tmp_path / "acknowledged"
    eventually(lambda: said.read_bytes().count(b"\n"), lambda lines: lines > SLOTS)
    time.sleep(random.random() / 4)
    database.send_signal(signal.SIGKILL)
    database.wait()
    pair.source.ask("cutover", name, "--force")
    acknowledged = int(said.read_text().split()[-1])
    log, data = _records(volumes[0][1], 1), _records(volumes[1][1], 37)
    newest, applied = max(log.values()), max(data.values())
    assert acknowledged <= applied <= newest <= applied + 1, (acknowledged, applied, newest)
    assert newest > SLOTS  # it was busy all the time
    for number in range(newest - SLOTS + 1, newest + 1):
        assert log[number % SLOTS] == number
        if number <= applied:
            assert data[number % SLOTS] in (number, number + SLOTS)
    for source, target in volumes:
        disks.assert_equal(source, target)
