"""Random migrations, each made of one seed: disks, guests, what happens meanwhile, how it ends."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.e2e.disks import KINDS, MIB, SECTOR_BYTES

WORKLOADS = ("random", "mixed", "buffered", "trim", "sequential", "verify", "burst")
CHANGES = ("pause", "limit", "budget")


@dataclass(frozen=True, slots=True)
class VolumePlan:
    """A volume: the kinds of its two disks, its size, what is on it and what its guest does."""

    source: str
    target: str
    size_bytes: int
    sparse: bool
    workload: str
    guest: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A whole migration. `forced`: the cutover does not wait for convergence."""

    volumes: tuple[VolumePlan, ...]
    tracker: str
    block_size_bytes: int
    changes: tuple[str, ...]
    forced: bool
    ending: str


def scenario(seed: int) -> Scenario:
    """Return the migration of a seed. Kinds and workloads take turns, so that all are met."""
    rng = random.Random(seed)
    kinds = list(KINDS)
    count = (1, 1, 2, 1, 3)[seed % 5]
    workload, source = WORKLOADS[seed % len(WORKLOADS)], kinds[seed // 2 % len(kinds)]
    volumes = [_volume(rng, source, workload, rng.choice((32, 64, 96)) // count)]
    for _ in range(count - 1):
        size = rng.choice((32, 64)) // count
        volumes.append(_volume(rng, rng.choice(kinds), rng.choice(WORKLOADS[:-1]), size))
    files = any(volume.source == "file" for volume in volumes)
    return Scenario(
        volumes=tuple(volumes),
        tracker=rng.choice(("auto", "scan") if files else ("auto", "ebpf", "ebpf", "scan")),
        block_size_bytes=rng.choice((4096, 4096, 16384, 65536, 1 << 20)),
        changes=tuple(rng.choices(CHANGES, k=rng.randrange(3))),
        forced=workload == "burst" or rng.random() < 0.2,
        ending=rng.choice(("rollback", "finish")),
    )


def _volume(rng: random.Random, source: str, workload: str, size_mib: int) -> VolumePlan:
    # A guest cannot discard parts of a file through fio.
    workload = "random" if (source, workload) == ("file", "trim") else workload
    target = rng.choice(("loop", "loop4k", "partition", "file"))
    if SECTOR_BYTES[source] > SECTOR_BYTES[target]:
        target = "loop4k"
    return VolumePlan(
        source=source,
        target=target,
        size_bytes=size_mib * MIB,
        sparse=rng.random() < 0.3,
        workload=workload,
        guest=tuple(_guest(rng, workload, SECTOR_BYTES[source])),
    )


def _guest(rng: random.Random, workload: str, sector: int) -> list[str]:
    sizes = [size for size in (512, 1024, 4096, 8192, 65536) if size >= sector]
    rate = rng.choice((1, 4, 16))
    common = ["--time_based", "--runtime=600", f"--randseed={rng.randrange(1 << 30)}"]
    options = {
        "random": ["--rw=randwrite", f"--bs={rng.choice(sizes)}"],
        "mixed": ["--rw=randrw", f"--bssplit={sector}/30:4096/40:65536/30", "--fsync=64"],
        "buffered": [*_buffered(rng), "--rw=randwrite", f"--bs={rng.choice(sizes)}"],
        "trim": ["--rw=randtrimwrite", f"--bs={rng.choice((4096, 32768))}"],
        "sequential": ["--rw=write", "--bs=64k", "--zero_buffers"],
        "verify": ["--rw=randwrite", *HEADERS, "--do_verify=0"],
        "burst": ["--rw=randwrite", "--bs=4096"],
    }
    limits = [] if workload == "burst" else [f"--rate={rate}m,{rate}m,{rate}m"]
    return [*options[workload], *limits, *common]


def _buffered(rng: random.Random) -> list[str]:
    fsync = rng.choice(("--fsync=32", "--fsync=0"))
    return ["--direct=0", "--ioengine=psync", fsync]


HEADERS = ("--bs=4096", "--size=8m", "--verify=crc32c")
"""fio's own headers in every block of the first 8 MiB: they say which block it is."""
