"""What a migration is and what is known of it: the values that the ends produce and the doors show.

Owns the words; holds no behaviour beyond small derivations. Sizes in bytes, times in seconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from agent.errors import InvalidArgument

if TYPE_CHECKING:
    from agent.errors import WarmsyncError

PROTOCOL_VERSION = 6
"""Version of what agents say to each other; both ends must have the same."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Role(StrEnum):
    """Which end an agent is."""

    SOURCE = "source"
    TARGET = "target"


class Scheme(StrEnum):
    """Ways to learn of writes."""

    AUTO = "auto"
    EBPF = "ebpf"
    QEMU = "qemu"
    SCAN = "scan"


class CarrierKind(StrEnum):
    """Ways for frames to travel; AUTO is TCP where that can be."""

    AUTO = "auto"
    TCP = "tcp"
    GRPC = "grpc"


@dataclass(frozen=True, slots=True)
class Identity:
    """A range of what a path really is on its host, so that two names of one thing are noticed."""

    device: str
    start_bytes: int
    length_bytes: int

    def overlaps(self, other: Identity) -> bool:
        """Return whether both share a byte."""
        return (
            self.device == other.device
            and self.start_bytes < other.start_bytes + other.length_bytes
            and other.start_bytes < self.start_bytes + self.length_bytes
        )


@dataclass(frozen=True, slots=True)
class Volume:
    """A source device and the target device it is copied to."""

    source: str
    target: str
    size_bytes: int = 0
    """What is copied."""
    block_size_bytes: int = 0
    cut_bytes: int = 0
    """What is left out behind it, for a smaller target, see `agent.layout.reach`."""


class Depth(StrEnum):
    """How much of both ends is compared at the cutover, before the target is released."""

    NONE = "none"
    FINAL = "final"
    """What the last round sent, read back."""
    FULL = "full"
    """Every byte: both roots."""


class Mode(StrEnum):
    """Who powers the VM down and asks for the cutover."""

    MANUAL = "manual"
    AUTO = "auto"
    """The agents, by the hooks in their own configurations."""


class Step(StrEnum):
    """How far a cutover has come that the source's agent does by itself."""

    NONE = ""
    WAITING = "waiting"
    """For convergence."""
    QUIESCING = "quiescing"
    """The source's quiesce hook powers the VM down; syncing goes on."""
    CUTTING_OVER = "cutting over"
    BOOTING = "booting"
    """The target owns the disks; its boot hook runs."""
    DONE = "done"
    STOPPED = "stopped"
    """It waits for a person: `refusal` says why."""


class Owner(StrEnum):
    """Who may write to the disks."""

    SOURCE = "source"
    TARGET = "target"
    NOBODY = "nobody yet"
    """The source is fenced, and the target has not said that it has taken over."""


@dataclass(frozen=True, slots=True)
class GuestThrottle:
    """Leave to slow the writes of a cgroup's processes, to each disk never below `least`."""

    cgroup: str
    least_bytes_per_second: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked for."""

    id: str
    peer: str
    volumes: tuple[Volume, ...]
    scheme: Scheme = Scheme.AUTO
    block_size_bytes: int = 4096
    max_downtime_seconds: float = 0.5
    limit_bytes_per_second: int = 0
    carrier: CarrierKind = CarrierKind.AUTO
    compress: bool = False
    guest_throttle: GuestThrottle | None = None
    reuse_target: bool = False
    verify: Depth = Depth.FULL
    resize: bool = False
    mode: Mode = Mode.MANUAL
    cold: bool = False
    """The VM is off: one round, and cut over at once."""

    @property
    def boots(self) -> bool:
        """Whether the target's boot hook is to run."""
        return self.mode is Mode.AUTO

    @property
    def quiesces(self) -> bool:
        """Whether the source's quiesce hook is to run."""
        return self.mode is Mode.AUTO and not self.cold


@dataclass(frozen=True, slots=True)
class DowntimeParts:
    """Where the downtime went, in seconds."""

    finish_round: float = 0.0
    source_flush: float = 0.0
    take: float = 0.0
    send: float = 0.0
    target_flush: float = 0.0
    check: float = 0.0
    verify: float = 0.0
    resize: float = 0.0
    release: float = 0.0


@dataclass(frozen=True, slots=True)
class Resize:
    """What came of the resize of one volume; sizes are those of the file system.

    With an `error` it was not grown; equal sizes without one: there was no room.
    """

    file_system: str = ""
    before_bytes: int = 0
    after_bytes: int = 0
    seconds: float = 0.0
    error: WarmsyncError | None = None
    table_moved: bool = False
    """The partition table was fitted to a smaller disk, whatever else came of it."""

    @property
    def is_changed(self) -> bool:
        """Whether the target is not what was proved any more."""
        return self.table_moved or self.after_bytes > self.before_bytes


@dataclass(frozen=True, slots=True)
class Progress:
    """Measurements so far; None where nothing was measured yet."""

    rounds: int = 0
    sent_bytes: int = 0
    total_bytes: int = 0
    round_bytes: int = 0
    round_done_bytes: int = 0
    dirty_bytes: int = 0
    throughput_bytes_per_second: float = 0.0
    dirty_rate_bytes_per_second: float = 0.0
    predicted_downtime_seconds: float | None = None
    downtime_seconds: float | None = None
    downtime_parts: DowntimeParts = field(default_factory=DowntimeParts)
    stalled: bool = False
    advice: str = ""
    suspect_volumes: int = 0
    guest_limit_bytes_per_second: int = 0
    trouble: str = ""
    resumes: int = 0
    resumed_saved_bytes: int = 0
    reconciled_bytes: int = 0
    unproved_bytes: int = 0
    resizes: tuple[Resize, ...] = ()
    quiesce_seconds: float | None = None
    boot_seconds: float | None = None
    downtime_saved_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """A state that was entered; wall-clock time in seconds since the epoch."""

    state: str
    at_seconds: float


@dataclass(frozen=True, slots=True)
class Migration:
    """A migration at one moment, as one of its ends sees it."""

    plan: Plan
    role: Role
    state: str
    scheme: Scheme | None
    scheme_reason: str
    progress: Progress
    history: tuple[Event, ...]
    error: WarmsyncError | None = None
    refusal: WarmsyncError | None = None
    incomplete: bool = False
    carrier: str = ""
    carrier_detail: str = ""
    owner: Owner = Owner.SOURCE
    step: Step = Step.NONE


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A range that differs between the two ends although nothing marked it."""

    source: str
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class UnreadRange:
    """A range of a source that cannot be read, so that nobody knows whether it is equal."""

    source: str
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a comparison of both ends has come, and what it found."""

    compared_bytes: int
    total_bytes: int
    pending_bytes: int
    mismatched_bytes: int
    unread_bytes: int
    """Of chunks that the source cannot read: not in `compared_bytes`."""
    mismatches: tuple[Mismatch, ...]
    unread: tuple[UnreadRange, ...]
    done: bool


@dataclass(frozen=True, slots=True)
class Totals:
    """Of all migrations from this host, kept across restarts. `moved_bytes` are those of the disks
    that were cut over, downtimes are of their cutovers.
    """

    migrations_started: int = 0
    migrations_cut_over: int = 0
    migrations_failed: int = 0
    sent_bytes: int = 0
    moved_bytes: int = 0
    downtime_seconds: float = 0.0
    downtime_saved_seconds: float = 0.0


def check_id(name: str) -> None:
    """Raise InvalidArgument unless `name` can be a migration's id."""
    if not _ID.fullmatch(name):
        raise InvalidArgument(
            "INVALID_ID",
            f"migration id {name!r} is not valid; "
            "use 1 to 63 letters, digits, '-', '_' or '.', starting with a letter or digit",
            id=name,
        )


def check_plan(plan: Plan) -> None:
    """Raise InvalidArgument for what is wrong with a plan whatever the hosts look like."""
    check_id(plan.id)
    if not plan.volumes:
        raise InvalidArgument("NO_VOLUMES", "no volumes given; name at least one SRC:DST")
    _check_paths(plan.volumes)
    block = plan.block_size_bytes
    if block < 4096 or block & (block - 1) or block > 16 << 20:
        raise InvalidArgument(
            "INVALID_BLOCK_SIZE",
            f"block size {block} is not valid; use a power of two from 4096 to 16777216",
            block_size_bytes=block,
        )
    if plan.compress and plan.carrier is CarrierKind.GRPC:
        raise InvalidArgument(
            "COMPRESSION_UNAVAILABLE",
            "the grpc carrier does not compress; use --carrier tcp, or --compression none",
        )
    check_budget(plan.max_downtime_seconds)
    check_limit(plan.limit_bytes_per_second)
    if plan.guest_throttle is not None:
        _check_guest_throttle(plan.guest_throttle)


def check_budget(max_downtime_seconds: float) -> None:
    """Raise InvalidArgument unless the downtime budget is above zero."""
    if not 0 < max_downtime_seconds < float("inf"):
        raise InvalidArgument(
            "INVALID_BUDGET",
            f"maximum downtime {max_downtime_seconds:g} s can never be met; "
            "use a time above zero, such as 500ms",
            max_downtime_seconds=max_downtime_seconds,
        )


def check_limit(limit_bytes_per_second: int) -> None:
    """Raise InvalidArgument for a bandwidth limit below zero (0 is none)."""
    if limit_bytes_per_second < 0:
        raise InvalidArgument(
            "INVALID_LIMIT",
            f"bandwidth limit {limit_bytes_per_second} is below zero; use 0 for no limit",
            limit_bytes_per_second=limit_bytes_per_second,
        )


def _check_guest_throttle(wanted: GuestThrottle) -> None:
    _check_absolute(wanted.cgroup)
    least = wanted.least_bytes_per_second
    if least <= 0:
        raise InvalidArgument(
            "INVALID_GUEST_THROTTLE",
            f"a guest that may be throttled to {least} bytes a second could be stopped; give the "
            "least rate that it needs, above zero",
            least_bytes_per_second=least,
        )


def _check_absolute(path: str) -> None:
    if not path.startswith("/"):
        raise InvalidArgument(
            "INVALID_PATH", f"path {path!r} is not absolute; start it with '/'", path=path
        )


def _check_paths(volumes: tuple[Volume, ...]) -> None:
    for volume in volumes:
        _check_absolute(volume.source)
        _check_absolute(volume.target)
    for side in ("source", "target"):
        paths = [getattr(volume, side) for volume in volumes]
        for path in paths:
            if paths.count(path) > 1:
                raise InvalidArgument(
                    "DUPLICATE_DEVICE",
                    f"{side} {path} is named twice in one migration; name each device once",
                    path=path,
                )
