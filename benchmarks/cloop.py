"""The yardsticks: loops in C that do the least that a copy takes, on the same devices."""

from __future__ import annotations

import subprocess
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.compiler import build
from benchmarks.contender import Contender, Copied
from benchmarks.devices import scratch_directory
from benchmarks.processes import await_end, run_measured, stop

CONNECTIONS = 4


@contextmanager
def copy_loop() -> Iterator[Contender]:
    """The contender that copies all bytes over 4 connections, from process to process."""
    with build("copy_loop.c", "-pthread") as program:
        yield Contender("C loop", lambda source, target: _copy(program, source, target), True)


def _copy(program: Path, source: str, target: str) -> Copied:
    receive = [str(program), "receive", target, str(CONNECTIONS)]
    receiver = subprocess.Popen(receive, stdout=subprocess.PIPE, text=True)
    try:
        if receiver.stdout is None:
            raise RuntimeError("the receiver has no standard output")
        port = receiver.stdout.readline().strip()
        ran = run_measured(str(program), "send", source, str(CONNECTIONS), port)
        return Copied(ran.seconds, ran.cpu_seconds, await_end(receiver))
    finally:
        stop(receiver)
        if receiver.stdout is not None:
            receiver.stdout.close()


@contextmanager
def delta_loop() -> Iterator[Path]:
    """The path of the program that `delta_seconds` runs."""
    with build("delta_loop.c", "-pthread") as program:
        yield program


def delta_seconds(program: Path, source: str, target: str, offsets: Sequence[int]) -> float:
    """Return how long it takes to carry these 4 KiB blocks over, and to flush, in 4 threads."""
    with scratch_directory() as directory:
        file = directory / "offsets"
        file.write_bytes(array("q", offsets).tobytes())
        return float(run_measured(str(program), source, target, str(file)).output)
