"""Moving a disk that is being written to: against QEMU's blockdev-mirror in both modes.

The guest writes from before the start until some seconds after the target has caught up
(converged; ready), or until the time for that is over. Then it is powered off, and the clock of
the downtime runs until the target is equal and durable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import live_figures, mirror, qemu
from benchmarks.agents import Agent, pair
from benchmarks.contender import OURS
from benchmarks.devices import (
    GIB,
    MIB,
    check_equal,
    discard,
    fill_mixed,
    flush,
    loop_device,
    require_devices,
    require_ebpf,
)
from benchmarks.guest import Disk, Guest, guest
from benchmarks.live_figures import Lived
from benchmarks.measure import Figure, Options
from benchmarks.moves import migration
from benchmarks.qemu import Setting

NAME = "live"
TITLE = "move of a disk under 4 KiB random writes, 90% of them to an eighth of it"
RATES_MIB = (5, 20, 80)
_CATCH_UP_SECONDS = 120.0
"""How long a mirror may take to be ready once nothing is written any more."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What all contenders of a run have in common."""

    source: str
    target: str
    size_bytes: int
    rate_bytes: int
    warm_seconds: float
    before_seconds: float
    limit_seconds: float
    after_seconds: float


@dataclass(slots=True)
class Watch:
    """The moments of a run, in seconds since the epoch."""

    guest: Guest
    begun: float = field(default_factory=time.time)
    started: float = 0.0
    caught_up: float = 0.0


Contender = Callable[[Stage], Lived]


def measure(options: Options) -> Iterator[Figure]:
    """Yield, for each rate: time, bytes, downtime, and what the guest noticed."""
    size = options.pick(2 * GIB, 16 * MIB)
    require_devices(2 * size + GIB)
    require_ebpf()
    mirror.require_mirror()
    times = (1.0, 1.0, 5.0, 1.0) if options.quick else (1.0, 3.0, 40.0, 3.0)
    rates = RATES_MIB[:1] if options.quick else RATES_MIB
    runs: dict[int, dict[str, list[Lived]]] = {rate: {} for rate in rates}
    with (
        qemu.nodelay_library() as library,
        loop_device(size, fill_mixed) as source,
        loop_device(size) as target,
        pair(source, target) as ends,
    ):
        contenders = {OURS: _ours(ends), **_mirrors(library)}
        for turn in range(options.repeat(3)):
            for rate in rates:
                stage = Stage(source, target, size, rate * MIB, *times)
                for name in _rotated([*contenders], turn):
                    discard(target)
                    runs[rate].setdefault(name, []).append(contenders[name](stage))
    for rate in rates:
        yield from live_figures.figures(rate, size, runs[rate])


def _rotated(names: list[str], turn: int) -> list[str]:
    start = turn % len(names)
    return names[start:] + names[:start]


def _ours(ends: tuple[Agent, Agent]) -> Contender:
    def live(stage: Stage) -> Lived:
        with guest(Disk.of_device(stage.source, stage.size_bytes), stage.rate_bytes) as writer:
            watch = _warm(writer, stage)
            with migration(*ends, stage.source, stage.target) as move:
                ready: float | None = None
                with suppress(TimeoutError):
                    ready = move.converged_seconds(stage.limit_seconds)
                seed = move.seed_seconds()
                _linger(watch, stage)
                writer.power_off()
                ended = time.monotonic()
                before = move.look().progress.sent_bytes
                done = move.cut_over().progress
                downtime = time.monotonic() - ended
                check_equal(stage.source, stage.target)
            throughput = stage.size_bytes / seed
            return _lived(
                watch,
                ready,
                done.sent_bytes,
                downtime,
                left_seconds=(done.sent_bytes - before) / throughput,
                parts=live_figures.parts(done.downtime_parts),
            )

    return live


def _mirrors(library: Path) -> dict[str, Contender]:
    found = {}
    for mode in mirror.MODES:
        for suffix, setting in (("", Setting()), ("+nodelay", Setting(library))):
            found[f"{mode}{suffix}"] = _mirror(mode, setting)
    return found


def _mirror(mode: str, setting: Setting) -> Contender:
    compared: list[Stage] = []

    def live(stage: Stage) -> Lived:
        with mirror.mirror(stage.source, stage.target, stage.size_bytes, setting) as job:
            with guest(job.disk, stage.rate_bytes) as writer:
                watch = _warm(writer, stage)
                job.start(mode)
                is_ready = job.wait(stage.limit_seconds)
                ready = time.time() - watch.started if is_ready else None
                _linger(watch, stage)
                writer.power_off()
                ended = time.monotonic()
                if not job.wait(_CATCH_UP_SECONDS):
                    raise RuntimeError(f"{mode} is not ready though nothing is written")
                job.finish(_CATCH_UP_SECONDS)
                flush(stage.target)
                downtime = time.monotonic() - ended
                sent = job.sent_bytes()
                lived = _lived(watch, ready, sent, downtime)
            if not compared:  # once is enough: what is measured is not our correctness
                check_equal(stage.source, stage.target)
                compared.append(stage)
            return lived

    return live


def _warm(writer: Guest, stage: Stage) -> Watch:
    """Let the guest write alone for a while; the move starts when this returns."""
    time.sleep(stage.warm_seconds)
    watch = Watch(writer)
    time.sleep(stage.before_seconds)
    watch.started = time.time()
    return watch


def _linger(watch: Watch, stage: Stage) -> None:
    watch.caught_up = time.time()
    time.sleep(stage.after_seconds)


def _lived(
    watch: Watch,
    ready: float | None,
    sent_bytes: int,
    downtime: float,
    *,
    left_seconds: float = 0.0,
    parts: Sequence[tuple[str, float]] = (),
) -> Lived:
    before = watch.guest.latencies(watch.begun, watch.started)
    during = watch.guest.latencies(watch.started, watch.caught_up)
    return Lived(
        ready_seconds=ready,
        sent_bytes=sent_bytes,
        downtime_seconds=downtime,
        left_seconds=left_seconds,
        parts=tuple(parts),
        iops=(before.iops, during.iops),
        p99_seconds=(before.percentile_seconds(0.99), during.percentile_seconds(0.99)),
    )
