"""The domain's values as messages, and requests as the domain's values."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp
from warmsync.v1 import migration_pb2, migration_service_pb2

from agent.errors import InvalidArgument
from agent.migration import (
    CarrierKind,
    Comparison,
    Depth,
    GuestThrottle,
    Migration,
    Mode,
    Owner,
    Plan,
    Progress,
    Resize,
    Role,
    Scheme,
    Step,
    Volume,
)
from agent.rpc.errors import from_status, to_status

DEFAULT_BLOCK_BYTES = 4096
DEFAULT_DOWNTIME_SECONDS = 0.5
PREFIX = "migrations/"

_SCHEMES = {
    migration_pb2.TRACKER_UNSPECIFIED: Scheme.AUTO,
    migration_pb2.TRACKER_AUTO: Scheme.AUTO,
    migration_pb2.TRACKER_EBPF: Scheme.EBPF,
    migration_pb2.TRACKER_QEMU: Scheme.QEMU,
    migration_pb2.TRACKER_SCAN: Scheme.SCAN,
}
_TRACKERS = {scheme: number for number, scheme in _SCHEMES.items()}
_CARRIERS = {"grpc": migration_pb2.CARRIER_GRPC, "tcp": migration_pb2.CARRIER_TCP}
_CARRIER_KINDS = {
    migration_pb2.CARRIER_UNSPECIFIED: CarrierKind.AUTO,
    migration_pb2.CARRIER_GRPC: CarrierKind.GRPC,
    migration_pb2.CARRIER_TCP: CarrierKind.TCP,
}
DEPTHS = {
    migration_pb2.VERIFY_UNSPECIFIED: Depth.FULL,
    migration_pb2.VERIFY_NONE: Depth.NONE,
    migration_pb2.VERIFY_FINAL: Depth.FINAL,
    migration_pb2.VERIFY_FULL: Depth.FULL,
}
VERIFIES = {depth: number for number, depth in DEPTHS.items()}
MODES = {
    migration_pb2.CUTOVER_MODE_UNSPECIFIED: Mode.MANUAL,
    migration_pb2.CUTOVER_MODE_MANUAL: Mode.MANUAL,
    migration_pb2.CUTOVER_MODE_AUTO: Mode.AUTO,
}
_MODES_BY_NUMBER: dict[int, Mode] = {int(number): mode for number, mode in MODES.items()}
_MODES = {mode: number for number, mode in MODES.items()}
_STEPS = {
    Step.NONE: migration_pb2.CUTOVER_STEP_UNSPECIFIED,
    Step.WAITING: migration_pb2.CUTOVER_STEP_WAITING,
    Step.QUIESCING: migration_pb2.CUTOVER_STEP_QUIESCING,
    Step.CUTTING_OVER: migration_pb2.CUTOVER_STEP_CUTTING_OVER,
    Step.BOOTING: migration_pb2.CUTOVER_STEP_BOOTING,
    Step.DONE: migration_pb2.CUTOVER_STEP_DONE,
    Step.STOPPED: migration_pb2.CUTOVER_STEP_STOPPED,
}
_OWNERS = {
    Owner.SOURCE: migration_pb2.OWNER_SOURCE,
    Owner.TARGET: migration_pb2.OWNER_TARGET,
    Owner.NOBODY: migration_pb2.OWNER_NOBODY,
}
_OWNERS_BY_NUMBER = {
    int(number): owner for owner, number in _OWNERS.items() if owner is not Owner.NOBODY
}
_STATES: dict[str, migration_pb2.State] = {
    value.name.removeprefix("STATE_"): getattr(migration_pb2, value.name)
    for value in migration_pb2.State.DESCRIPTOR.values
}
_ROLES = {Role.SOURCE: migration_pb2.ROLE_SOURCE, Role.TARGET: migration_pb2.ROLE_TARGET}


def id_of(name: str) -> str:
    """Return the id in a resource name, migrations/{id}."""
    if not name.startswith(PREFIX):
        raise InvalidArgument(
            "INVALID_NAME", f"resource name {name!r} is not valid; use migrations/ID", name=name
        )
    return name.removeprefix(PREFIX)


def to_plan(request: migration_service_pb2.CreateMigrationRequest, chosen_id: str) -> Plan:
    """Return what a request asks for; 0 and unset stand for the defaults."""
    wanted = request.migration
    scheme = _SCHEMES.get(wanted.tracker)
    if scheme is None:
        raise InvalidArgument(
            "INVALID_TRACKER", f"there is no tracker {wanted.tracker}; use auto, ebpf or scan"
        )
    carrier = _CARRIER_KINDS.get(wanted.carrier)
    if carrier is None:
        raise InvalidArgument(
            "INVALID_CARRIER", f"there is no carrier {wanted.carrier}; use auto, tcp or grpc"
        )
    if wanted.verify not in DEPTHS:
        raise InvalidArgument(
            "INVALID_VERIFY", f"there is no depth {wanted.verify}; use none, final or full"
        )
    return Plan(
        mode=to_mode(wanted.cutover),
        cold=wanted.cold,
        id=request.migration_id or chosen_id,
        peer=wanted.peer,
        volumes=tuple(Volume(one.source, one.target) for one in wanted.volumes),
        scheme=scheme,
        block_size_bytes=wanted.block_size_bytes or DEFAULT_BLOCK_BYTES,
        # Absent is the default; what is there and zero can never be met, and is refused.
        max_downtime_seconds=wanted.max_downtime_seconds
        if wanted.HasField("max_downtime_seconds")
        else DEFAULT_DOWNTIME_SECONDS,
        limit_bytes_per_second=wanted.bandwidth_limit_bytes_per_second,
        carrier=carrier,
        reuse_target=wanted.reuse_target,
        verify=DEPTHS[wanted.verify],
        resize=wanted.resize,
        compress=wanted.compression == migration_pb2.COMPRESSION_ZSTD,
        guest_throttle=_to_throttle(wanted.guest_throttle)
        if wanted.HasField("guest_throttle")
        else None,
    )


def to_mode(number: int) -> Mode:
    """Return a cutover's mode. InvalidArgument for one that is not known."""
    mode: Mode | None = _MODES_BY_NUMBER.get(number)
    if mode is None:
        raise InvalidArgument(
            "INVALID_CUTOVER", f"there is no cutover mode {number}; use manual or auto"
        )
    return mode


def to_owner(number: int) -> Owner:
    """Return who is said to own. InvalidArgument for nobody."""
    owner = _OWNERS_BY_NUMBER.get(number)
    if owner is None:
        raise InvalidArgument(
            "INVALID_OWNER", f"owner {number} cannot be settled; use source or target"
        )
    return owner


def to_message(migration: Migration) -> migration_pb2.Migration:
    """Return a migration as its resource."""
    plan = migration.plan
    history = [
        migration_pb2.Transition(state=_state(event.state), time=_time(event.at_seconds))
        for event in migration.history
    ]
    message = migration_pb2.Migration(
        name=PREFIX + plan.id,
        role=_ROLES[migration.role],
        state=_state(migration.state),
        peer=plan.peer,
        volumes=[_volume(volume) for volume in plan.volumes],
        tracker_reason=migration.scheme_reason,
        block_size_bytes=plan.block_size_bytes,
        max_downtime_seconds=plan.max_downtime_seconds,
        bandwidth_limit_bytes_per_second=plan.limit_bytes_per_second,
        progress=_progress(migration.progress),
        history=history,
        create_time=history[0].time,
        update_time=history[-1].time,
        incomplete=migration.incomplete,
        carrier_detail=migration.carrier_detail,
        reuse_target=plan.reuse_target,
        verify=VERIFIES[plan.verify],
        resize=plan.resize,
        cutover=_MODES[plan.mode],
        cold=plan.cold,
        cutover_step=_STEPS[migration.step],
        owner=_OWNERS[migration.owner],
        compression=migration_pb2.COMPRESSION_ZSTD
        if plan.compress
        else migration_pb2.COMPRESSION_NONE,
    )
    if migration.scheme is not None:
        message.tracker = _TRACKERS[migration.scheme]
    if plan.guest_throttle is not None:
        message.guest_throttle.CopyFrom(_throttle(plan.guest_throttle))
    if migration.carrier:
        message.carrier = _CARRIERS[migration.carrier]
    if migration.error is not None:
        message.error.CopyFrom(to_status(migration.error))
    if migration.refusal is not None:
        message.last_refusal.CopyFrom(to_status(migration.refusal))
    return message


def to_comparison(found: Comparison) -> migration_service_pb2.VerifyMigrationResponse:
    """Return the progress of a comparison."""
    return migration_service_pb2.VerifyMigrationResponse(
        compared_bytes=found.compared_bytes,
        total_bytes=found.total_bytes,
        pending_bytes=found.pending_bytes,
        mismatched_bytes=found.mismatched_bytes,
        mismatches=[
            migration_service_pb2.Mismatch(
                source=one.source, offset_bytes=one.offset_bytes, length_bytes=one.length_bytes
            )
            for one in found.mismatches
        ],
        done=found.done,
        unread_bytes=found.unread_bytes,
        unread=[
            migration_service_pb2.UnreadRange(
                source=one.source, offset_bytes=one.offset_bytes, length_bytes=one.length_bytes
            )
            for one in found.unread
        ],
    )


def _progress(progress: Progress) -> migration_pb2.Progress:
    parts = progress.downtime_parts
    message = migration_pb2.Progress(
        rounds=progress.rounds,
        sent_bytes=progress.sent_bytes,
        total_bytes=progress.total_bytes,
        round_bytes=progress.round_bytes,
        round_done_bytes=progress.round_done_bytes,
        dirty_bytes=progress.dirty_bytes,
        throughput_bytes_per_second=progress.throughput_bytes_per_second,
        dirty_rate_bytes_per_second=progress.dirty_rate_bytes_per_second,
        predicted_downtime_seconds=progress.predicted_downtime_seconds,
        downtime_seconds=progress.downtime_seconds,
        stalled=progress.stalled,
        advice=progress.advice,
        suspect_volumes=progress.suspect_volumes,
        guest_limit_bytes_per_second=progress.guest_limit_bytes_per_second,
        trouble=progress.trouble,
        resumes=progress.resumes,
        resumed_saved_bytes=progress.resumed_saved_bytes,
        reconciled_bytes=progress.reconciled_bytes,
        unproved_bytes=progress.unproved_bytes,
        resizes=[resize_message(one) for one in progress.resizes],
        quiesce_seconds=progress.quiesce_seconds,
        boot_seconds=progress.boot_seconds,
        downtime_saved_seconds=progress.downtime_saved_seconds,
    )
    if progress.downtime_seconds is not None:
        message.downtime_parts.CopyFrom(
            migration_pb2.DowntimeParts(
                finish_round_seconds=parts.finish_round,
                source_flush_seconds=parts.source_flush,
                take_seconds=parts.take,
                send_seconds=parts.send,
                target_flush_seconds=parts.target_flush,
                check_seconds=parts.check,
                verify_seconds=parts.verify,
                resize_seconds=parts.resize,
                release_seconds=parts.release,
            )
        )
    return message


def resize_message(resize: Resize) -> migration_pb2.Resize:
    """Return what came of a resize as its message."""
    message = migration_pb2.Resize(
        file_system=resize.file_system,
        before_bytes=resize.before_bytes,
        after_bytes=resize.after_bytes,
        seconds=resize.seconds,
        table_moved=resize.table_moved,
    )
    if resize.error is not None:
        message.error.CopyFrom(to_status(resize.error))
    return message


def to_resize(message: migration_pb2.Resize) -> Resize:
    """Return what came of a resize, of its message."""
    return Resize(
        message.file_system,
        message.before_bytes,
        message.after_bytes,
        message.seconds,
        from_status(message.error) if message.HasField("error") else None,
        message.table_moved,
    )


def _to_throttle(message: migration_pb2.GuestThrottle) -> GuestThrottle:
    return GuestThrottle(message.cgroup, message.least_bytes_per_second)


def _throttle(throttle: GuestThrottle) -> migration_pb2.GuestThrottle:
    return migration_pb2.GuestThrottle(
        cgroup=throttle.cgroup, least_bytes_per_second=throttle.least_bytes_per_second
    )


def _volume(volume: Volume) -> migration_pb2.Volume:
    return migration_pb2.Volume(
        source=volume.source,
        target=volume.target,
        size_bytes=volume.size_bytes,
        block_size_bytes=volume.block_size_bytes,
        cut_bytes=volume.cut_bytes,
    )


def _state(name: str) -> migration_pb2.State:
    return _STATES[name]


def _time(at_seconds: float) -> Timestamp:
    time = Timestamp()
    time.FromNanoseconds(round(at_seconds * 1e9))
    return time
