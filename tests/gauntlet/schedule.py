"""A schedule: all that a seed decides. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass

FAULTS = {
    "kill source": 4.0,
    "kill target": 4.0,
    "kill both": 1.0,
    "stop source": 2.0,
    "stop target": 2.0,
    "freeze source": 2.0,
    "freeze target": 2.0,
    "cut": 3.0,
    "hold": 1.0,
    "hold requests": 1.5,
    "hold answers": 1.5,
    "outage": 1.5,
    "delay": 1.0,
    "garble": 1.5,
    "garble much": 1.0,
    "stranger": 1.0,
    "intruder": 1.0,
    "pause": 1.0,
    "limit": 1.0,
    "cutover early": 1.5,
    "clock source": 1.0,
    "clock target": 1.0,
    "target EIO": 2.0,
    "target stalls": 1.5,
    "target full": 1.5,
    "target disk lost": 2.0,
    "target disk replaced": 1.5,
    "target power cut": 3.0,
    "target forgets": 1.0,
    "source EIO": 1.5,
    "source stalls": 1.5,
    "source reboot": 1.5,
    "source forgets": 0.4,
    "cancel": 0.4,
}
"""What can happen, and how often; docs/reliability.md says what each is."""

_BEFORE = ("cutover early", "target full", "target disk replaced")
"""What happens only while the guest runs: a disk that was just released is not put in its place."""

CUTOVER_FAULTS = ("none", "none", "target filled", *(one for one in FAULTS if one not in _BEFORE))
"""What happens a moment after the cutover was asked for, each as often as any other."""

_IDLE = ("source EIO", "source stalls", "target filled")
"""Nothing is read or written in a rollback or finish, so that it would not be noticed."""

ENDING_FAULTS = tuple(one for one in CUTOVER_FAULTS if one not in _IDLE)
"""What happens a moment after the rollback was asked for, or the finish."""

FRAGILE = (
    "target EIO",
    "target stalls",
    "target disk lost",
    "target disk replaced",
    "target power cut",
)
"""Faults that ask for a `fragile` target; those of the source ask for such a source."""

_OF_OTHERS = {"source EIO", "source stalls", "target full", "target filled"}
"""Faults of devices that do not suit a smaller target: sectors have to be of one size."""

VERIFY = ("none", "final", "full")
"""What the agents compare at the cutover; the judge compares every byte."""

SHORT_SECONDS = 0.5
"""How long the release is asked for again in some schedules: shorter than what is thrown at it."""

QEMU_FAULTS = {"source EIO": "source QEMU dies", "source stalls": "source QEMU restarts"}
"""What happens instead to the sources of the `qemu` tracker: with a guest that begins again."""

IMAGES = ("qcow2", "raw")
"""Kinds of sources that are in a machine, see `machine`; fio has what its guest sees."""

WRITERS = {
    "random": ("--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k"),
    "discards": ("--rw=randtrimwrite", "--bs=4096"),
    "buffered": ("--direct=0", "--ioengine=psync", "--rw=randwrite", "--bs=4096", "--fsync=64"),
    "verify": ("--rw=randwrite", "--bs=4096", "--size=7m", "--verify=crc32c", "--do_verify=0"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` after `delay_seconds`; `seconds` is how long it lasts, if it does."""

    kind: str
    delay_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Disks:
    """A volume: kinds of both devices, the source's size, whether the target's is the same."""

    source: str
    target: str
    size_bytes: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """One migration and what is thrown at it.

    `qemu_exits`: the machine ends when its guest is powered off. `verify`: one of VERIFY.
    `smaller`: the source is half empty, and the targets end where that half does.
    `release_seconds`: how long the release is asked for again, if not as long as in the product.
    """

    seed: int
    volumes: tuple[Disks, ...]
    writer: str
    tracker: str
    carrier: str
    tls: bool
    reuse_target: bool
    whole_disk: bool
    faults: tuple[Fault, ...]
    cutover: Fault
    ending: str
    ending_fault: Fault
    qemu_exits: bool
    smaller: bool
    verify: str
    release_seconds: float | None

    @property
    def kinds(self) -> set[str]:
        """Return all kinds of faults in it."""
        return {one.kind for one in (*self.faults, self.cutover, self.ending_fault)}

    @property
    def is_hasty(self) -> bool:
        """Whether a cutover is also asked for when all has converged and the guest still runs.

        Not of files and images: whoever has one open writes on when its permission is gone.
        """
        files = any(one.source in ("file", *IMAGES) for one in self.volumes)
        return "cutover early" in self.kinds and not files

    def __str__(self) -> str:
        """Return it in a line."""
        what = ", ".join(one.kind for one in self.faults)
        disks = "+".join(f"{one.source}:{one.target}" for one in self.volumes)
        how = [self.tracker, self.carrier]
        how += [w for w, yes in (("tls", self.tls), ("reuse", self.reuse_target)) if yes]
        how += [w for w, yes in (("whole", self.whole_disk), ("exits", self.qemu_exits)) if yes]
        how += ["smaller"] if self.smaller else []
        how += [f"verify={self.verify}", *(["hurried"] if self.release_seconds else [])]
        return (
            f"seed {self.seed}: {disks} {' '.join(how)} {self.writer}; {what}; cutover: "
            f"{self.cutover.kind}; {self.ending}: {self.ending_fault.kind}"
        )


def schedule(seed: int) -> Schedule:
    """Return the schedule of a seed."""
    rng = random.Random(seed)
    tracker = rng.choice(("ebpf", "ebpf", "scan"))
    if random.Random(f"qemu {seed}").random() < 0.25:  # the others are as they were without
        tracker = "qemu"
    kinds = rng.choices(tuple(FAULTS), tuple(FAULTS.values()), k=rng.randint(1, 4))
    kinds = _adapt([*kinds, rng.choice(CUTOVER_FAULTS), rng.choice(ENDING_FAULTS)], tracker)
    faults = tuple(_fault(rng, kind, 0.8) for kind in kinds[:-2])
    cutover = _fault(rng, kinds[-2], rng.choice((0.03, 0.1, 0.3)))
    struck = set(kinds)
    count = rng.choice((1, 1, 1, 2, 3))
    volumes = tuple(_disks(rng, tracker, struck if i == 0 else set()) for i in range(count))
    files = any(one.source in ("file", *IMAGES) for one in volumes)
    writer = rng.choice([name for name in WRITERS if name != "discards" or not files])
    # A guest of the whole disk has another page cache, and fences of partitions do not hold it;
    # with an offset fio never comes to the writes of trimwrite.
    reuse_target = rng.random() < 0.2
    smaller = (
        tracker != "qemu"
        and writer in ("random", "buffered")
        and not reuse_target
        and not struck & _OF_OTHERS
        and rng.random() < 0.4
    )
    if smaller:
        fragile = ("fragile", "loop") if not struck & set(FRAGILE) else ("fragile",)
        volumes = tuple(Disks("loop", rng.choice(fragile), v.size_bytes, True) for v in volumes)
    elsewhere = (
        not smaller and writer == "random" and "cutover early" not in struck and tracker != "qemu"
    )
    return Schedule(
        seed=seed,
        volumes=volumes,
        writer=writer,
        tracker=tracker,
        carrier=rng.choice(("tcp", "tcp", "grpc")),
        tls=rng.random() < 0.4,
        reuse_target=reuse_target,
        whole_disk=elsewhere and rng.random() < 0.5,
        faults=faults,
        cutover=cutover,
        ending=rng.choice(("rollback", "finish")),
        ending_fault=_fault(rng, kinds[-1], 0.1),
        qemu_exits=tracker == "qemu" and rng.random() < 0.4,
        smaller=smaller,
        verify=rng.choice(VERIFY),
        release_seconds=SHORT_SECONDS if rng.random() < 0.5 else None,
    )


def _fault(rng: random.Random, kind: str, delay_seconds: float) -> Fault:
    return Fault(kind, rng.uniform(0.0, delay_seconds), rng.uniform(0.2, 2.0))


def _adapt(kinds: list[str], tracker: str) -> list[str]:
    """Put others in the place of faults that cannot be together, or not with that tracker."""
    instead = QEMU_FAULTS if tracker == "qemu" else {}
    if set(kinds) & set(FRAGILE):  # one device cannot be both
        instead = {**instead, "target full": "target EIO", "target filled": "target EIO"}
    if "cutover early" in kinds:  # that may release the disk, if the guest is idle just then
        instead = {**instead, "target disk replaced": "target disk lost"}
    return [instead.get(kind, kind) for kind in kinds]


def _disks(rng: random.Random, tracker: str, struck: set[str]) -> Disks:
    """Choose a volume; `struck`: the faults that its devices must be able to have."""
    files = ("file",) if tracker == "scan" else ()
    source = rng.choice(IMAGES if tracker == "qemu" else ("loop", "loop4k", "partition", *files))
    target = rng.choice(("loop", "loop4k", "partition", "file", "fragile", "fragile"))
    if struck & {"source EIO", "source stalls"}:
        source = "fragile"
    if struck & {"target full", "target filled"}:
        target = "small" if "target full" in struck else "roomy"
    if struck & set(FRAGILE):
        target = "fragile"
    odd_bytes = rng.choice((0, 512, 4096, 7 * 512, 63 * 1024))
    size_bytes = (rng.choice((8, 16, 32)) << 20) + odd_bytes
    return Disks(source, target, size_bytes, exact=rng.random() < 0.4)
