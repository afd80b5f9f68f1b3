"""fio as the guest: writes at a given rate, and tells how long its writes took.

Owns the pattern of the writes, the same for all contenders, and when the writes have ended.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.devices import scratch_directory
from benchmarks.latency import Latencies, cut, parse
from benchmarks.processes import stop

_COARSENESS = 3
_WINDOW_MILLISECONDS = 100
_HOT_SHARE = 8
_END_SECONDS = 60.0
_MOST_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class Disk:
    """What the guest writes to: its size, and the words that tell fio how to get at it."""

    size_bytes: int
    options: Sequence[str]

    @classmethod
    def of_device(cls, path: str, size_bytes: int) -> Disk:
        """A block device of this host."""
        return cls(size_bytes, (f"--filename={path}", "--ioengine=libaio", "--direct=1"))

    @classmethod
    def of_export(cls, uri: str, size_bytes: int) -> Disk:
        """An NBD export."""
        return cls(size_bytes, ("--ioengine=nbd", f"--uri={uri}", f"--size={size_bytes}"))


class Guest:
    """A guest that runs."""

    def __init__(self, process: subprocess.Popen[bytes], directory: Path) -> None:
        self._process = process
        self._directory = directory

    def power_off(self) -> None:
        """Stop the writes; returns when the last is done.

        That is when fio's job is gone: fio itself takes up to 100 ms more to notice.
        """
        jobs = psutil.Process(self._process.pid).children()
        if not jobs or self._process.poll() is not None:
            raise RuntimeError(f"fio has ended already: {self._words()}")
        self._process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + _END_SECONDS
        while any(_lives(job) for job in jobs):
            if time.monotonic() > deadline:
                raise RuntimeError("fio does not end")
            time.sleep(0.0005)

    def latencies(self, begin_seconds: float, end_seconds: float) -> Latencies:
        """Return what completed between two moments (since the epoch), after the power-off."""
        self._process.wait(_END_SECONDS)
        # 128: ended by the signal, after what was under way.
        if self._process.returncode not in (0, 128):
            raise RuntimeError(f"fio failed: {self._words()}")
        (log,) = self._directory.glob("guest*clat_hist*.log")
        return cut(parse(log.read_text()), begin_seconds, end_seconds, _COARSENESS)

    def _words(self) -> str:
        return (self._directory / "words").read_text()


@contextmanager
def guest(disk: Disk, rate_bytes: int) -> Iterator[Guest]:
    """A guest that writes 4 KiB blocks at random: 90% to the first eighth, 10% anywhere.

    fio takes whole percents of disjoint zones: 91 to the eighth, 9 to the rest is the nearest.
    """
    hot = disk.size_bytes // _HOT_SHARE
    zones = f"zoned_abs:91/{hot}:9/{disk.size_bytes - hot}"
    command = ["fio", "--name=guest", *disk.options, "--rw=randwrite", "--bs=4k", "--iodepth=16"]
    command += [f"--rate={rate_bytes}", f"--random_distribution={zones}", "--norandommap"]
    command += ["--randrepeat=0", "--time_based", f"--runtime={_MOST_SECONDS}"]
    command += ["--write_hist_log=guest", f"--log_hist_msec={_WINDOW_MILLISECONDS}"]
    command += [f"--log_hist_coarseness={_COARSENESS}", "--log_unix_epoch=1", "--per_job_logs=0"]
    with scratch_directory() as directory, (directory / "words").open("w") as words:
        process = subprocess.Popen(command, cwd=directory, stdout=words, stderr=words)
        try:
            yield Guest(process, directory)
        finally:
            # On SIGINT fio ends its job and waits for it; killed, it would leave it behind.
            stop(process, signal.SIGINT)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
