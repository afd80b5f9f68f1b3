"""Migrations as JSON, as a table and as a page.

Owns the names of the JSON fields, which are a contract: fields are added, never renamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2
from warmsync.v1 import migration_pb2
from warmsync.v1.migration_pb2 import Migration

from agent.errors import WarmsyncError
from agent.rpc.errors import from_status
from agent.units import format_bytes, format_rate, format_seconds

_OWNERS = {
    "source": "source",
    "target": "target",
    "nobody yet": "nobody yet: the source is fenced, the target has not said that it took over; "
    "if it never will, find out and `warmsync settle`",
}
PARTS = (
    "finish_round_seconds",
    "source_flush_seconds",
    "take_seconds",
    "send_seconds",
    "target_flush_seconds",
    "check_seconds",
    "verify_seconds",
    "resize_seconds",
    "release_seconds",
)


def migration_id(migration: Migration) -> str:
    """Return the id in a resource name."""
    return migration.name.removeprefix("migrations/")


def state_name(state: int) -> str:
    """Return "CONVERGED" for STATE_CONVERGED; a number that is unknown here as it is."""
    return _short(migration_pb2.State, state, "STATE_")


def tracker_name(migration: Migration) -> str:
    """Return "ebpf" for TRACKER_EBPF."""
    return _short(migration_pb2.Tracker, migration.tracker, "TRACKER_").lower()


def owner_name(migration: Migration) -> str:
    """Return "source", "target" or "nobody yet"."""
    name = _short(migration_pb2.Owner, migration.owner, "OWNER_").lower()
    return "nobody yet" if name == "nobody" else name


def step_name(migration: Migration) -> str:
    """Return "cutting over", say, or nothing where the agents do nothing by themselves."""
    name = _short(migration_pb2.CutoverStep, migration.cutover_step, "CUTOVER_STEP_")
    return "" if name == "UNSPECIFIED" else name.lower().replace("_", " ")


def describe_error(error: WarmsyncError) -> dict[str, Any]:
    """Return an error as JSON."""
    return {"reason": error.reason, "message": str(error), "values": error.values}


def describe(migration: Migration) -> dict[str, Any]:
    """Return a migration as JSON: all that is known of it."""
    return {
        "id": migration_id(migration),
        "state": state_name(migration.state),
        "owner": owner_name(migration),
        "cutover": _short(migration_pb2.CutoverMode, migration.cutover, "CUTOVER_MODE_").lower(),
        "cutover_step": step_name(migration),
        "cold": migration.cold,
        "role": _short(migration_pb2.Role, migration.role, "ROLE_").lower(),
        "peer": migration.peer,
        **_progress(migration),
        "volumes": [_volume(volume) for volume in migration.volumes],
        "tracker": tracker_name(migration),
        "tracker_reason": migration.tracker_reason,
        "carrier": _short(migration_pb2.Carrier, migration.carrier, "CARRIER_").lower(),
        "carrier_detail": migration.carrier_detail,
        "compression": _short(
            migration_pb2.Compression, migration.compression, "COMPRESSION_"
        ).lower(),
        "block_size_bytes": migration.block_size_bytes,
        "max_downtime_seconds": migration.max_downtime_seconds,
        "bandwidth_limit_bytes_per_second": migration.bandwidth_limit_bytes_per_second,
        "reuse_target": migration.reuse_target,
        "resize": migration.resize,
        "verify": _short(migration_pb2.Verify, migration.verify, "VERIFY_").lower(),
        "guest_throttle": _guest_throttle(migration),
        "incomplete": migration.incomplete,
        "error": _status(migration, "error"),
        "last_refusal": _status(migration, "last_refusal"),
        "history": [
            {"state": state_name(step.state), "time": _time(step.time)}
            for step in migration.history
        ],
        "create_time": _time(migration.create_time),
        "update_time": _time(migration.update_time),
    }


def _progress(migration: Migration) -> dict[str, Any]:
    progress = migration.progress
    parts = {name: getattr(progress.downtime_parts, name) for name in PARTS}
    return {
        "rounds": progress.rounds,
        "bytes_sent": progress.sent_bytes,
        "bytes_total": progress.total_bytes,
        "predicted_downtime_seconds": _optional(progress, "predicted_downtime_seconds"),
        "downtime_seconds": _optional(progress, "downtime_seconds"),
        "downtime_parts": parts if progress.HasField("downtime_parts") else None,
        "round_bytes": progress.round_bytes,
        "round_done_bytes": progress.round_done_bytes,
        "dirty_bytes": progress.dirty_bytes,
        "throughput_bytes_per_second": progress.throughput_bytes_per_second,
        "dirty_rate_bytes_per_second": progress.dirty_rate_bytes_per_second,
        "stalled": progress.stalled,
        "advice": progress.advice,
        "suspect_volumes": progress.suspect_volumes,
        "guest_limit_bytes_per_second": progress.guest_limit_bytes_per_second,
        "trouble": progress.trouble,
        "resumes": progress.resumes,
        "resumed_saved_bytes": progress.resumed_saved_bytes,
        "reconciled_bytes": progress.reconciled_bytes,
        "unproved_bytes": progress.unproved_bytes,
        "resizes": [_resize(one) for one in progress.resizes],
        "quiesce_seconds": _optional(progress, "quiesce_seconds"),
        "boot_seconds": _optional(progress, "boot_seconds"),
        "downtime_saved_seconds": _optional(progress, "downtime_saved_seconds"),
    }


def table(migrations: Sequence[Migration]) -> str:
    """Return a table with a line for each migration."""
    head = ["ID", "ROLE", "STATE", "PEER", "ROUNDS", "SENT", "SIZE", "DIRTY", "DOWNTIME"]
    return format_table([head, *(_row(describe(migration)) for migration in migrations)])


def _row(shown: dict[str, Any]) -> list[str]:
    return [
        shown["id"],
        shown["role"],
        shown["state"],
        shown["peer"] or "-",
        str(shown["rounds"]),
        format_bytes(shown["bytes_sent"]),
        format_bytes(shown["bytes_total"]),
        format_bytes(shown["dirty_bytes"]),
        _downtime(shown),
    ]


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows with their columns aligned, three spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (zip(row, widths, strict=True) for row in rows)
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in line).rstrip() for line in lines
    )


def page(migration: Migration) -> str:
    """Return all that a person may want to know, a line each."""
    shown = describe(migration)
    facts = [(label, text) for label, text in _facts(shown) if text]
    width = max(len(label) for label, _ in facts) + 1
    return "\n".join(f"{(label + ':') if label else '':<{width}}  {text}" for label, text in facts)


def _facts(shown: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Id", shown["id"]
    yield "State", shown["state"] + (" (target incomplete)" if shown["incomplete"] else "")
    yield "Owner", _OWNERS.get(shown["owner"], shown["owner"])
    cold = "cold" if shown["cold"] else ""
    auto = f"auto: {shown['cutover_step'] or 'off'}" if shown["cutover"] == "auto" else ""
    step = shown["cutover_step"] if cold and not auto else ""
    yield "Cutover", ", ".join(filter(None, (cold, auto, step)))
    yield "Role", shown["role"]
    yield "Peer", shown["peer"]
    for index, volume in enumerate(shown["volumes"]):
        size = f"{format_bytes(volume['size_bytes'])}, blocks of {volume['block_size_bytes']} B"
        if volume["cut_bytes"]:
            size += f", without the last {format_bytes(volume['cut_bytes'])}"
        yield "" if index else "Volumes", f"{volume['source']} -> {volume['target']} ({size})"
    reason = f" ({shown['tracker_reason']})" if shown["tracker_reason"] else ""
    yield "Tracker", shown["tracker"] + reason
    detail = f" ({shown['carrier_detail']})" if shown["carrier_detail"] else ""
    yield "Carrier", shown["carrier"] + detail
    limit = shown["bandwidth_limit_bytes_per_second"]
    yield "Bandwidth limit", format_rate(limit) if limit else "none"
    if throttle := shown["guest_throttle"]:
        least = format_rate(throttle["least_bytes_per_second"])
        yield "Guest throttle", f"{throttle['cgroup']}, never below {least}"
    yield from _measurements(shown)
    for label, key in (("Error", "error"), ("Last refusal", "last_refusal")):
        if shown[key]:
            yield label, f"{shown[key]['reason']}: {shown[key]['message']}"
    for index, step in enumerate(shown["history"]):
        yield "" if index else "History", f"{step['time'] or '-'}  {step['state']}"


def _measurements(shown: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "Rounds", str(shown["rounds"])
    yield "Sent", f"{format_bytes(shown['bytes_sent'])} of {format_bytes(shown['bytes_total'])}"
    yield "Dirty", format_bytes(shown["dirty_bytes"])
    yield "Throughput", format_rate(shown["throughput_bytes_per_second"])
    yield "Dirty rate", format_rate(shown["dirty_rate_bytes_per_second"])
    yield "Downtime", f"{_downtime(shown)} (budget {format_seconds(shown['max_downtime_seconds'])})"
    parts = shown["downtime_parts"] or {}
    names = {name: name.removesuffix("_seconds").replace("_", " ") for name in PARTS}
    yield "", ", ".join(f"{names[name]} {format_seconds(parts[name])}" for name in parts)
    yield from _outcome(shown)
    if shown["stalled"]:
        yield "Stalled", shown["advice"]
    if limit := shown["guest_limit_bytes_per_second"]:
        yield "Guest", f"throttled: may write {format_rate(limit)} to each disk"
    if shown["resumes"]:
        saved = format_bytes(shown["resumed_saved_bytes"])
        yield "Resumed", f"{shown['resumes']} times; the last saved sending {saved} again"
    if shown["reconciled_bytes"]:
        yield "Reconciled", f"{format_bytes(shown['reconciled_bytes'])} were equal and not sent"
    if shown["unproved_bytes"]:
        yield "Unproved", f"{format_bytes(shown['unproved_bytes'])} are to be read back"
    for index, resize in enumerate(shown["resizes"]):
        yield "" if index else "Resized", _resize_line(resize)
    if shown["trouble"]:
        yield "Trouble", shown["trouble"]
    if shown["suspect_volumes"]:
        yield "Suspect", f"{shown['suspect_volumes']} times nobody knew what differs"


def _outcome(shown: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if (saved := shown["downtime_saved_seconds"]) is not None:
        yield "Saved", f"{format_seconds(saved)} of downtime, against a cold copy"
    for name in ("quiesce", "boot"):
        if (seconds := shown[f"{name}_seconds"]) is not None:
            yield f"{name.capitalize()} hook", f"took {format_seconds(seconds)}"


def _downtime(shown: dict[str, Any]) -> str:
    if shown["downtime_seconds"] is not None:
        return format_seconds(shown["downtime_seconds"])
    predicted = shown["predicted_downtime_seconds"]
    if predicted is None:
        return "-"
    # Not predicted: its checks take as long as the guest has files, which nobody has counted.
    return f"~{format_seconds(predicted)}" + (" and the resize" if shown["resize"] else "")


def _volume(volume: migration_pb2.Volume) -> dict[str, Any]:
    return {
        "source": volume.source,
        "target": volume.target,
        "size_bytes": volume.size_bytes,
        "block_size_bytes": volume.block_size_bytes,
        "cut_bytes": volume.cut_bytes,
    }


def _resize(resize: migration_pb2.Resize) -> dict[str, Any]:
    return {
        "file_system": resize.file_system,
        "before_bytes": resize.before_bytes,
        "after_bytes": resize.after_bytes,
        "seconds": resize.seconds,
        "table_moved": resize.table_moved,
        "error": _status(resize, "error"),
    }


def _resize_line(shown: dict[str, Any]) -> str:
    return _growth(shown) + ("; its partition table was moved" if shown["table_moved"] else "")


def _growth(shown: dict[str, Any]) -> str:
    if error := shown["error"]:
        return f"no, {error['reason']}: {error['message']}"
    if shown["after_bytes"] == shown["before_bytes"]:
        return "no, there was no room"
    sizes = f"{format_bytes(shown['before_bytes'])} to {format_bytes(shown['after_bytes'])}"
    return f"{shown['file_system']} from {sizes} in {format_seconds(shown['seconds'])}"


def _guest_throttle(migration: Migration) -> dict[str, Any] | None:
    if not migration.HasField("guest_throttle"):
        return None
    throttle = migration.guest_throttle
    return {
        "cgroup": throttle.cgroup,
        "least_bytes_per_second": throttle.least_bytes_per_second,
    }


def _status(message: Migration | migration_pb2.Resize, name: str) -> dict[str, Any] | None:
    if not message.HasField(name):
        return None
    status: status_pb2.Status = getattr(message, name)
    return describe_error(from_status(status))


def _optional(message: Any, name: str) -> float | None:
    return getattr(message, name) if message.HasField(name) else None


def _time(stamp: Timestamp) -> str | None:
    return stamp.ToJsonString() if stamp.seconds or stamp.nanos else None


def _short(kind: Any, number: int, prefix: str) -> str:
    if number not in kind.values():  # from an agent newer than this command
        return str(number)
    return str(kind.Name(number)).removeprefix(prefix)
