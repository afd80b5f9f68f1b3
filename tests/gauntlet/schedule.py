"""A schedule: all that a seed decides. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass

FAULTS = (
    "kill source",
    "kill target",
    "kill both",
    "stop source",
    "stop target",
    "freeze source",
    "freeze target",
    "cut",
    "hold",
    "hold answers",
    "delay",
    "garble",
    "pause",
    "limit",
    "target EIO",
    "target forgets",
    "cancel",
)
"""What can happen. The last two are rare: they end or begin everything."""

WEIGHTS = (4, 4, 1, 2, 2, 2, 2, 4, 2, 2, 1, 2, 1, 1, 2, 1, 0.4)

CUTOVER_FAULTS = ("none", "kill source", "kill target", "kill both", "cut", "hold answers")
"""What happens a moment after the cutover was asked for."""

WRITERS = {
    "random": ("--rw=randwrite", "--bsrange=4k-64k", "--blockalign=4k"),
    "discards": ("--rw=randtrimwrite", "--bs=4096"),
    "buffered": ("--direct=0", "--ioengine=psync", "--rw=randwrite", "--bs=4096", "--fsync=64"),
    "verify": ("--rw=randwrite", "--bs=4096", "--size=8m", "--verify=crc32c", "--do_verify=0"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` after `delay_seconds`; `seconds` is how long it lasts, if it does."""

    kind: str
    delay_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Schedule:
    """One migration and what is thrown at it."""

    seed: int
    sources: tuple[str, ...]
    sizes_mib: tuple[int, ...]
    writer: str
    tracker: str
    carrier: str
    tls: bool
    faults: tuple[Fault, ...]
    cutover_fault: str
    cutover_delay_seconds: float
    ending: str

    def __str__(self) -> str:
        """Return it in a line."""
        what = ", ".join(one.kind for one in self.faults) or "nothing"
        return (
            f"seed {self.seed}: {'+'.join(self.sources)} {self.tracker} {self.carrier}"
            f"{' tls' if self.tls else ''} {self.writer}; {what}; cutover: {self.cutover_fault}; "
            f"{self.ending}"
        )


def schedule(seed: int) -> Schedule:
    """Return the schedule of a seed."""
    rng = random.Random(seed)
    count = rng.choice((1, 1, 1, 2, 3))
    tracker = rng.choice(("ebpf", "ebpf", "scan"))
    kinds = ("loop", "loop4k", "partition") + (("file",) if tracker == "scan" else ())
    sources = tuple(rng.choice(kinds) for _ in range(count))
    writers = [name for name in WRITERS if name != "discards" or "file" not in sources]
    tls = rng.random() < 0.4
    faults = rng.choices(FAULTS, WEIGHTS, k=rng.randint(1, 4))
    return Schedule(
        seed=seed,
        sources=sources,
        sizes_mib=tuple(rng.choice((8, 16, 32)) for _ in sources),
        writer=rng.choice(writers),
        tracker=tracker,
        carrier=rng.choice(("tcp", "tcp", "grpc")),
        tls=tls,
        faults=tuple(Fault(kind, rng.uniform(0.0, 0.8), rng.uniform(0.2, 2.0)) for kind in faults),
        cutover_fault=rng.choice(CUTOVER_FAULTS),
        cutover_delay_seconds=rng.choice((0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.2))),
        ending=rng.choice(("rollback", "finish")),
    )
