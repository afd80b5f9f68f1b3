"""The judge judged: the guest's program, here on the host, tells whatever is not as it promised."""

from __future__ import annotations

import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import devices
from tests.e2e.agents import eventually
from tests.vm.guest import FAILED, Records, records_of
from tests.vm.initramfs import Boot
from tests.vm.machine import Machine, Plan

RECORD_BYTES, BLOCK_BYTES = 1000, 4096


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, for the host."""
    if shutil.which("cc") is None:
        pytest.skip("no cc installed")
    made = tmp_path_factory.mktemp("program") / "program"
    devices.run("cc", "-O2", "-o", made, Path(__file__).with_name("program.c"))
    return made


class Database:
    """The program's two directories, and what it said in its last run."""

    def __init__(self, program: Path, directory: Path) -> None:
        self._program = program
        self.log_directory, self.data_directory = directory / "log", directory / "data"
        self.log_directory.mkdir()
        self.data_directory.mkdir()
        self.log, self.data = self.log_directory / "log", self.data_directory / "data"
        self.output = directory / "output"

    @contextmanager
    def running(self, seed: int = 1) -> Iterator[subprocess.Popen[bytes]]:
        words = [self._program, self.log_directory, self.data_directory, seed, 1]
        command = [str(word) for word in words]
        with self.output.open("wb") as output, subprocess.Popen(command, stdout=output) as process:
            try:
                yield process
            finally:
                process.kill()

    def write(self, count: int, end: signal.Signals = signal.SIGTERM, seed: int = 1) -> None:
        """Run it until it has acknowledged so many records."""
        with self.running(seed) as process:
            eventually(lambda: len(self.acknowledged()), lambda now: now >= count)
            process.send_signal(end)
            assert process.wait() == (0 if end is signal.SIGTERM else -end)

    def complaint(self) -> str:
        """Run it on what it cannot find well; returns what it says."""
        with self.running() as process:
            assert process.wait() == 1, self.said()
        return str(FAILED.findall(self.said())[0])

    def said(self) -> str:
        return self.output.read_text().rpartition("\n")[0] + "\n"

    def acknowledged(self) -> Records:
        return records_of("ack", self.said())

    def found(self) -> Records:
        return records_of("found", self.said())

    def blocks_of_last(self) -> tuple[int, ...]:
        """Return the blocks of the last record, which are written again at the start."""
        last = self.log.read_bytes()[-RECORD_BYTES:]
        return struct.unpack_from("4I", last, 24)

    def a_block(self, written_by: Callable[[int], bool]) -> int:
        """Return a block whose record's number is one of these, but not of the last record."""
        data = self.data.read_bytes()
        numbers = {
            index: struct.unpack_from("Q", data, index * BLOCK_BYTES + 8)[0]
            for index in range(len(data) // BLOCK_BYTES)
        }
        last = self.blocks_of_last()
        return next(i for i, number in numbers.items() if written_by(number) and i not in last)


@pytest.fixture
def database(program: Path) -> Iterator[Database]:
    with devices.scratch_directory() as directory:
        made = Database(program, directory)
        made.write(30)
        yield made


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_what_was_acknowledged_is_found(database: Database) -> None:
    promised = database.acknowledged()
    assert list(promised) == list(range(1, len(promised) + 1))
    database.write(10, seed=2)
    assert database.found() == promised
    assert min(database.acknowledged()) == len(promised) + 1


def test_nothing_is_lost_when_it_is_killed(database: Database) -> None:
    promised = database.acknowledged()
    for seed in range(2, 8):
        database.write(seed * 3, signal.SIGKILL, seed)
        assert promised.items() <= database.found().items()
        assert len(database.found()) <= len(promised) + 1
        promised = database.found() | database.acknowledged()


def test_a_record_cut_short_is_no_complaint(database: Database) -> None:
    with database.log.open("ab") as log:
        log.write(b"WSRECORD")
    promised = database.acknowledged()
    database.write(1)
    assert database.found() == promised


def test_a_lost_record_is_told(database: Database) -> None:
    with database.log.open("r+b") as log:
        log.truncate(database.log.stat().st_size - RECORD_BYTES)
    assert "the log ends at" in database.complaint()


@pytest.mark.parametrize("offset", [0, 8, 500, 999])
def test_a_damaged_record_is_told(database: Database, offset: int) -> None:
    flip(database.log, 12 * RECORD_BYTES + offset)
    assert database.complaint().endswith("bytes after record 12")


@pytest.mark.parametrize("offset", [0, 16, 2000, 4095])
def test_a_damaged_block_is_told(database: Database, offset: int) -> None:
    block = database.a_block(lambda number: 0 < number < 20)
    flip(database.data, block * BLOCK_BYTES + offset)
    assert database.complaint().startswith(f"bad block {block}: ")


def test_a_block_of_before_is_told(database: Database) -> None:
    before, count = database.data.read_bytes(), len(database.acknowledged())
    database.write(10, seed=2)
    block = database.a_block(lambda number: count < number)
    with database.data.open("r+b") as data:
        data.seek(block * BLOCK_BYTES)
        data.write(before[block * BLOCK_BYTES :][:BLOCK_BYTES])
    assert database.complaint().startswith(f"bad block {block}: old of record ")


@pytest.mark.parametrize(
    ("older", "complaint"), [("log", "the log ends at"), ("data", ": old of record ")]
)
def test_disks_of_two_moments_are_told(database: Database, older: str, complaint: str) -> None:
    path: Path = getattr(database, older)
    before = path.read_bytes()
    database.write(10, seed=2)
    path.write_bytes(before)
    assert complaint in database.complaint()


def test_blocks_of_another_run_are_told(database: Database) -> None:
    log, data = database.log.read_bytes(), database.data.read_bytes()
    database.write(20, seed=2)
    rolled_back = database.data.read_bytes()
    database.log.write_bytes(log)
    database.data.write_bytes(data)
    database.write(30, seed=3)
    database.data.write_bytes(rolled_back)
    assert database.complaint().startswith("bad block ")


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        ({1: "a"}, r"lost \[2\]"),
        ({1: "a", 2: "x"}, r"lost \[2\]"),
        ({1: "a", 2: "b", 3: "c", 4: "d"}, r"of nobody: \[3, 4\]"),
    ],
)
def test_a_broken_promise_is_told(found: Records, complaint: str, tmp_path: Path) -> None:
    made = Machine("vm", Plan(), Boot(tmp_path, tmp_path), tmp_path, [], [], ExitStack())
    made.promised = {1: "a", 2: "b"}
    with pytest.raises(AssertionError, match=complaint):
        made.assert_kept(found)
    made.assert_kept({1: "a", 2: "b", 3: "c"})
    assert len(made.promised) == 3
