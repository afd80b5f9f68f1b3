"""The demo as people run it: a process that exits 0 only if all is well, and leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests import devices

ROOT = Path(__file__).parents[1]
# Scratch goes where a test can see what is left of it; `spoil` breaks something on purpose.
PLAY = """
import os, sys
from pathlib import Path
from examples.demo import demo, disks
disks.MEMORY = Path(sys.argv[1])
compare = demo.compare
{spoil}
sys.exit(demo.main(["--size", "64M", *sys.argv[2:]]))
"""
# One byte of the target; then a byte of the same write of fio on both, which cmp cannot notice.
SPOIL_COPIES = """
def flip(disk, offset):
    os.chmod(disk.path, 0o600)  # the fence of a file
    with open(disk.path, "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)
def spoiled(source, target, guest):
    flip(target, target.size_bytes - 1)
    print("exit code", compare(source, target, guest))
    flip(target, target.size_bytes - 1)
    log = Path(source.path).with_name("writes.log").read_text().splitlines()
    written = next(line.split() for line in log if " write " in line)
    for disk in (source, target):
        flip(disk, int(written[-2]) + 2000)
    return compare(source, target, guest)
demo.compare = spoiled
"""
NEVER_CONVERGES = 'demo.MAX_DOWNTIME["scan"] = "1us"; demo.TIMEOUT = "2s"'


@pytest.fixture
def scratch() -> Iterator[Path]:
    devices.require("fio")
    with devices.scratch_directory() as directory:
        yield directory


def _command(scratch: Path, *options: str, spoil: str = "") -> list[str]:
    return [sys.executable, "-c", PLAY.format(spoil=spoil), str(scratch), *options]


def _play(
    scratch: Path, *options: str, spoil: str = "", path: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if path is None else {"PATH": path})
    command = _command(scratch, *options, spoil=spoil)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    _check_clean(scratch)
    return done


def _check_clean(scratch: Path) -> None:
    assert list(scratch.iterdir()) == []
    left = [
        process.info
        for process in psutil.process_iter(["cmdline", "cwd"])
        if str(scratch) in f"{process.info['cmdline']} {process.info['cwd']}"
    ]
    assert left == []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # another worker's, which is gone by now
            assert str(scratch) not in file.read_text()


def test_image_files(scratch: Path) -> None:
    done = _play(scratch, "--images")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tracker scan on image files: as was asked for" in done.stdout
    assert re.search(r"byte compare +equal, all 64\.0 MiB\n", done.stdout)
    assert re.search(r"fio's verification +all \d+ blocks", done.stdout)


def test_loop_devices(scratch: Path) -> None:
    devices.require("loop", "bpf")
    done = _play(scratch)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tracker ebpf\n" in done.stdout
    assert re.search(r"downtime +\d", done.stdout)
    assert re.search(r"byte compare +equal", done.stdout)
    for name in re.findall(r"/dev/(loop\d+)", done.stdout.splitlines()[0]):
        system = Path("/sys/block") / name
        # Unless somebody has the number by now, the fence must be gone with the demo.
        assert (system / "loop").exists() or (system / "ro").read_text() == "0\n"


def test_spoiled_copies(scratch: Path) -> None:
    done = _play(scratch, "--images", spoil=SPOIL_COPIES)
    assert re.search(r"byte compare .* differ: byte 67108864.*\nexit code 1\n", done.stdout)
    assert re.search(r"byte compare +equal", done.stdout)
    assert "fio does not find its writes on the target" in done.stderr
    assert done.returncode == 1


def test_never_converged(scratch: Path) -> None:
    done = _play(scratch, "--images", spoil=NEVER_CONVERGES)
    assert done.returncode == 1
    assert "warmsync migrate ended with exit code 3" in done.stderr


def test_no_fio(scratch: Path) -> None:
    done = _play(scratch, "--images", path=str(scratch))
    assert (done.returncode, done.stdout) == (1, "")
    assert "fio, is not installed" in done.stderr


def test_interrupted(scratch: Path) -> None:
    command = _command(scratch, "--images", spoil=NEVER_CONVERGES.replace("2s", "60s"))
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as demo:
        assert demo.stdout is not None
        assert any("SYNCING" in line for line in demo.stdout)
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
        rest = demo.stdout.read()
    assert demo.returncode == 130, rest
    assert "interrupted; all is cleaned up" in rest
    _check_clean(scratch)
