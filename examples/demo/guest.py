"""The demo's guest: fio writes to the source, and later looks for its writes on the target.

fio puts a header with offset, length and CRC32C into each 4 KiB block it writes, and logs where
it wrote. On the target each of those blocks must be there, at its place and whole. That it is also
the *newest* version of the block is what the byte compare shows.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from examples.demo.disks import DemoFailed, Disk

# Discards go to the last eighth of the disk, writes to all the rest: who discards a block does
# not expect to find it. Three of four writes hit the hot sixteenth at the start.
WORKLOAD = """\
[global]
thread
filename={path}
direct={direct}
time_based
runtime=1d

[writes]
ioengine=libaio
iodepth=8
rw=randwrite
bs=4k
size={written_bytes}
random_distribution=zoned_abs:75/{hot_bytes}:25/{cold_bytes}
norandommap
serialize_overlap=1
rate=20m
verify=crc32c
do_verify=0
write_iolog=writes.log

[discards]
ioengine={discard_engine}
rw=randtrim
bs=64k
offset={written_bytes}
size={discarded_bytes}
rate_iops=20
"""
VERIFICATION = """\
[verify]
filename={path}
direct={direct}
ioengine=libaio
iodepth=16
rw=read
verify=crc32c
verify_fatal=1
read_iolog=reads.log
replay_no_stall=1
"""
STOPPED_BY_SIGNAL = 128
STOP_SECONDS = 30.0


class Guest:
    """fio at work on a disk."""

    def __init__(self, disk: Disk, directory: Path) -> None:
        self._directory = directory
        job, self._report = directory / "guest.fio", directory / "guest.log"
        unit = disk.size_bytes // 16
        job.write_text(
            WORKLOAD.format(
                path=disk.path,
                direct=int(_knows_direct_io(disk)),
                written_bytes=14 * unit,
                hot_bytes=unit,
                cold_bytes=13 * unit,
                discarded_bytes=2 * unit,
                discard_engine="sync" if disk.is_device else "falloc",
            )
        )
        with self._report.open("wb") as report:
            # A session of its own: Ctrl-C must not stop it before the demo does.
            self._fio = subprocess.Popen(
                ["fio", job.name],
                cwd=directory,
                stdout=report,
                stderr=report,
                start_new_session=True,
            )

    def check_writing(self) -> None:
        """Raise DemoFailed if it does not write any more."""
        if self._fio.poll() is not None:
            raise DemoFailed(f"fio ended by itself:\n{self._report.read_text()}")

    def power_down(self) -> None:
        """Stop: what was submitted is finished, nothing is written after this."""
        self.check_writing()
        self._fio.send_signal(signal.SIGINT)
        if self._fio.wait(STOP_SECONDS) != STOPPED_BY_SIGNAL:
            raise DemoFailed(f"fio failed:\n{self._report.read_text()}")

    def kill(self) -> None:
        """End it however it is."""
        if self._fio.poll() is None:
            os.killpg(self._fio.pid, signal.SIGKILL)
            self._fio.wait()

    def find_writes(self, disk: Disk) -> int:
        """Let fio verify on `disk` each block that was written; return how many. DemoFailed."""
        log = (self._directory / "writes.log").read_text().splitlines()
        entries = [line.split() for line in log]
        # "TIME FILE write OFFSET LENGTH"; older versions of the log have no time.
        written = sorted({int(entry[-2]) for entry in entries if entry[-3:-2] == ["write"]})
        if not written:
            raise DemoFailed("fio logged no writes")
        reads = [f"{disk.path} read {offset} 4096" for offset in written]
        lines = ["fio version 2 iolog", f"{disk.path} add", f"{disk.path} open", *reads]
        (self._directory / "reads.log").write_text("\n".join([*lines, f"{disk.path} close", ""]))
        job = self._directory / "verify.fio"
        job.write_text(VERIFICATION.format(path=disk.path, direct=int(_knows_direct_io(disk))))
        done = subprocess.run(
            ["fio", job.name], cwd=self._directory, capture_output=True, text=True, check=False
        )
        if done.returncode != 0 or f"total={len(written)}," not in done.stdout:
            raise DemoFailed(f"fio does not find its writes on the target:\n{done.stderr}")
        return len(written)


def check_fio() -> None:
    """Raise DemoFailed if there is no fio."""
    if shutil.which("fio") is None:
        raise DemoFailed("the guest, fio, is not installed (apt-get install fio)")


@contextmanager
def boot(disk: Disk, directory: Path) -> Iterator[Guest]:
    """Start the guest; it is dead afterwards, whatever happens."""
    guest = Guest(disk, directory)
    try:
        yield guest
    finally:
        guest.kill()


def _knows_direct_io(disk: Disk) -> bool:
    try:
        os.close(os.open(disk.path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True
