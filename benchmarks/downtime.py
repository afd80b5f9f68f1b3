"""The downtime that a virtual machine sees when it is moved: each way in turn, each writer.

The guest writes, is moved, powered down and booted from the target, where it must find all that it
had acknowledged. The clock runs from its last acknowledged write to its first after the boot; the
boot is the guest's and QEMU's alone, so it is taken out and shown apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import downtime_figures
from benchmarks.agents import Agent, pair
from benchmarks.boots import Run, boot, check_kept, require_guests
from benchmarks.contender import OURS
from benchmarks.devices import (
    GIB,
    MIB,
    check_equal,
    discard,
    fill_random,
    loop_device,
    require_devices,
    require_ebpf,
    require_tools,
    run,
    scratch_directory,
)
from benchmarks.downtime_figures import COLD, DISK_GB, MIRROR, REBOOT, Host, Moved, Runs
from benchmarks.measure import Figure, Options
from benchmarks.qemu import nodelay_library
from benchmarks.tables import read_rate, table_seconds
from benchmarks.ways import Cold, Mirror, Reboot, Warm
from tests.vm import initramfs
from tests.vm.initramfs import Boot

NAME = "downtime"
TITLE = "downtime of a virtual machine that is moved while it writes, as it sees it"
PAUSES_MS = {"idle": 1000, "moderate": 50, "heavy": 0}
"""Between two records of the guest; a record is made durable twice."""
_ROOM = 40 * MIB
"""For the guest's program and the journal, beside a twentieth for tables; all else is one file."""

_LEAST = 128 * MIB
"""The guest's program needs a little less."""

Maker = Callable[[ExitStack], Reboot]


@dataclass(frozen=True, slots=True)
class Trial:
    """What is the same for disks of all sizes."""

    boot_files: Boot
    library: Path
    rounds: int
    settle_seconds: float


@dataclass(frozen=True, slots=True)
class Stage:
    """What all ways of a run have in common."""

    boot_files: Boot
    image: Path
    source: str
    target: str
    settle_seconds: float


def measure(options: Options) -> Iterator[Figure]:
    """Yield, for each writer: downtime, its parts, time, bytes; then what the model says."""
    size = options.pick(GIB, _LEAST)
    require_devices(4 * size + GIB)
    require_ebpf()
    require_guests()
    require_tools("qemu-nbd", "cc", "ss")
    pauses = {"heavy": 0} if options.quick else PAUSES_MS
    settle = 0.2 if options.quick else 2.0
    with scratch_directory() as directory, nodelay_library() as library:
        trial = Trial(initramfs.build(directory), library, options.repeat(3), settle)
        runs, host = _run(trial, size, pauses)
        # The model is fitted to one disk and held against another; if only tried, against itself.
        other = runs if options.quick else _run(trial, _LEAST, {"heavy": 0})[0]
    for writer in pauses:
        yield from downtime_figures.figures(writer, size, runs[writer])
    for writer in pauses:
        yield from downtime_figures.predictions(writer, runs[writer], host)
    yield from downtime_figures.check(runs["heavy"], other["heavy"], host)


def _run(trial: Trial, size: int, pauses: dict[str, int]) -> tuple[dict[str, Runs], Host]:
    runs: dict[str, dict[str, list[Moved]]] = {writer: {} for writer in pauses}
    with (
        _image(size) as image,
        loop_device(size) as source,
        loop_device(size) as target,
        pair(source, target) as ends,
    ):
        stage = Stage(trial.boot_files, image, source, target, trial.settle_seconds)
        ways = _ways(ends, (source, target), trial.library)
        names = [*ways]
        for turn in range(trial.rounds):
            start = turn % len(names)
            for writer, pause in pauses.items():
                for name in names[start:] + names[:start]:
                    moved = _move(stage, ways[name], pause, is_move=name != REBOOT)
                    runs[writer].setdefault(name, []).append(moved)
        host = Host(read_rate(image), table_seconds(DISK_GB * 10**9))
    ordered = {writer: {name: made[name] for name in names} for writer, made in runs.items()}
    return dict(ordered), host


def _ways(ends: tuple[Agent, Agent], disks: tuple[str, str], library: Path) -> dict[str, Maker]:
    return {
        OURS: lambda stack: Warm(ends, disks, stack),
        MIRROR: lambda stack: Mirror(disks[1], library, stack),
        COLD: lambda stack: Cold(ends, disks, stack),
        REBOOT: lambda _: Reboot(),
    }


def _move(stage: Stage, make: Maker, pause_ms: int, *, is_move: bool) -> Moved:
    """Let a new machine be moved once, and boot it from where it then is."""
    discard(stage.target)
    _restore(stage)
    with scratch_directory() as directory, ExitStack() as stack:
        way = make(stack)
        with boot(stage.boot_files, stage.source, pause_ms, 1, directory / "before") as before:
            moved = _leave(way, before, stage)
            promised = before.guest.acknowledged()
        if is_move:
            check_equal(stage.source, stage.target)
        path = stage.target if is_move else stage.source
        with boot(stage.boot_files, path, pause_ms, 2, directory / "after") as after:
            check_kept(promised, after.guest.found())
            return moved(after.boot_seconds)


def _leave(way: Reboot, before: Run, stage: Stage) -> Callable[[float], Moved]:
    time.sleep(stage.settle_seconds)
    written, writing = _written_bytes(stage.source), time.monotonic()
    time.sleep(stage.settle_seconds)
    rate = (_written_bytes(stage.source) - written) / (time.monotonic() - writing)
    started = time.monotonic()
    way.follow(before)
    before.wait_more(1)  # so that no pause of the guest's own counts as downtime
    way.power_down(before)
    is_off = time.monotonic()
    handed = way.hand_over()
    ended = time.monotonic() - handed.aside_seconds
    last = before.heard.moments[-1]
    return lambda boot_seconds: Moved(
        off_seconds=is_off - last,
        switch_seconds=ended - is_off,
        boot_seconds=boot_seconds,
        move_seconds=ended - started,
        write_bytes_per_second=rate,
        handed=handed,
    )


def _written_bytes(path: str) -> int:
    """Return what has been written to a device since it was made (the kernel's counters)."""
    fields = Path("/sys/block", Path(path).name, "stat").read_text().split()
    return int(fields[6]) * 512


@contextmanager
def _image(size_bytes: int) -> Iterator[Path]:
    """An ext4 that is nearly full, with nothing left for the guest's kernel to make ready."""
    with scratch_directory() as directory:
        content, image = directory / "content", directory / "image"
        content.mkdir()
        (content / "filler").touch()
        fill_random(content / "filler", size_bytes * 19 // 20 - _ROOM)
        now = "lazy_itable_init=0,lazy_journal_init=0"
        run("mkfs.ext4", "-qF", "-E", now, "-d", str(content), str(image), f"{size_bytes >> 10}k")
        (content / "filler").unlink()
        yield image


def _restore(stage: Stage) -> None:
    """Give the source the disk of a new machine."""
    discard(stage.source)
    words = ("bs=1M", "oflag=direct", "conv=sparse", "status=none")
    run("dd", f"if={stage.image}", f"of={stage.source}", *words)
