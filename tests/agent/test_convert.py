"""The domain's values and their messages say the same."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from warmsync.v1 import migration_pb2 as pb
from warmsync.v1 import migration_service_pb2 as service

from agent.errors import FailedPrecondition, InvalidArgument
from agent.migration import (
    CarrierKind,
    Comparison,
    DowntimeParts,
    Event,
    GuestThrottle,
    Migration,
    Mismatch,
    Mode,
    Owner,
    Plan,
    Progress,
    Resize,
    Role,
    Scheme,
    Step,
    UnreadRange,
    Volume,
)
from agent.rpc.convert import id_of, to_comparison, to_message, to_plan, to_resize
from agent.rpc.errors import from_status
from agent.state import State
from agent.view import describe, owner_name, step_name

VOLUMES = (
    Volume("/dev/a", "/dev/b", 1 << 30, 4096),
    Volume("/dev/c", "/dev/d", 1 << 20, 65536, 4096),
)
PLAN = Plan(
    "web1",
    "peer:7070",
    VOLUMES,
    Scheme.EBPF,
    8192,
    0.25,
    1 << 20,
    carrier=CarrierKind.TCP,
    compress=True,
    guest_throttle=GuestThrottle("/vm", 7),
    resize=True,
    mode=Mode.AUTO,
    cold=True,
)
NUMBERS = replace(
    Progress(1, 2, 3, 4, 5, 6, 7.5, 8.5, 0.5, None, DowntimeParts(), True, "wait", 9, 10),
    quiesce_seconds=1.5,
    boot_seconds=2.5,
    downtime_saved_seconds=-3.5,
)
SEEN = Migration(
    plan=PLAN,
    role=Role.SOURCE,
    state=State.SYNCING,
    scheme=Scheme.EBPF,
    scheme_reason="block devices",
    progress=NUMBERS,
    history=(Event(State.PENDING, 1_700_000_000.25), Event(State.SYNCING, 1_700_000_001.5)),
    carrier="tcp",
    carrier_detail="4 connections",
)


def test_a_plan_there_and_back() -> None:
    """What a migration says of its plan, asked for again, is the same plan."""
    asked = service.CreateMigrationRequest(migration_id="web1", migration=to_message(SEEN))
    bare = tuple(Volume(volume.source, volume.target) for volume in VOLUMES)
    assert to_plan(asked, "chosen") == replace(PLAN, volumes=bare)


def test_what_is_absent_is_the_default() -> None:
    plan = to_plan(service.CreateMigrationRequest(), "chosen")
    assert plan == Plan("chosen", "", ())
    zero = service.CreateMigrationRequest(migration=pb.Migration(max_downtime_seconds=0.0))
    assert to_plan(zero, "chosen").max_downtime_seconds == 0.0
    empty = pb.Migration(guest_throttle=pb.GuestThrottle())
    asked = service.CreateMigrationRequest(migration=empty)
    assert to_plan(asked, "chosen").guest_throttle == GuestThrottle("", 0)
    assert not to_message(replace(SEEN, plan=plan)).HasField("guest_throttle")


@pytest.mark.parametrize("scheme", list(Scheme))
def test_trackers(scheme: Scheme) -> None:
    message = to_message(replace(SEEN, scheme=scheme))
    assert pb.Tracker.Name(message.tracker) == f"TRACKER_{scheme.upper()}"
    asked = service.CreateMigrationRequest(migration=message)
    assert to_plan(asked, "x").scheme is scheme


def test_a_tracker_of_the_future_is_refused() -> None:
    asked = service.CreateMigrationRequest(migration=pb.Migration(tracker=99))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument) as caught:
        to_plan(asked, "x")
    assert caught.value.reason == "INVALID_TRACKER"


@pytest.mark.parametrize("state", list(State))
def test_states(state: State) -> None:
    assert pb.State.Name(to_message(replace(SEEN, state=state)).state) == f"STATE_{state}"


def test_every_number_arrives() -> None:
    progress = to_message(SEEN).progress
    for field in fields(Progress):
        if field.name not in ("downtime_seconds", "downtime_parts", "resizes"):
            assert getattr(progress, field.name) == getattr(NUMBERS, field.name), field.name
    assert not progress.HasField("downtime_seconds")
    assert not progress.HasField("downtime_parts")


def test_owners_and_steps() -> None:
    for owner in Owner:
        message = to_message(replace(SEEN, owner=owner))
        assert owner_name(message) == describe(message)["owner"] == owner
    for step in Step:
        message = to_message(replace(SEEN, step=step))
        assert step_name(message) == describe(message)["cutover_step"] == step


def test_a_mode_that_is_none() -> None:
    asked = service.CreateMigrationRequest(migration=pb.Migration(cutover=99))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument) as caught:
        to_plan(asked, "x")
    assert caught.value.reason == "INVALID_CUTOVER"


def test_the_parts_of_the_downtime() -> None:
    parts = DowntimeParts(*(float(n) for n in range(1, len(fields(DowntimeParts)) + 1)))
    seen = replace(SEEN, progress=replace(NUMBERS, downtime_seconds=28.0, downtime_parts=parts))
    message = to_message(seen).progress
    assert message.downtime_seconds == 28.0
    for field in fields(DowntimeParts):
        assert getattr(message.downtime_parts, f"{field.name}_seconds") == getattr(
            parts, field.name
        )


def test_what_came_of_a_resize_there_and_back() -> None:
    resizes = (
        Resize("xfs", 1, 2, 0.5, None, True),
        Resize(error=FailedPrecondition("GROW_FAILED", "no", a=1)),
    )
    progress = replace(NUMBERS, resizes=resizes)
    grown, failed = to_message(replace(SEEN, progress=progress)).progress.resizes
    assert to_resize(grown) == resizes[0]
    error = to_resize(failed).error
    assert isinstance(error, FailedPrecondition)
    assert (error.reason, str(error), error.values) == ("GROW_FAILED", "no", {"a": "1"})


def test_what_was_not_measured_is_absent() -> None:
    message = to_message(replace(SEEN, progress=Progress(), scheme=None, carrier=""))
    assert not message.progress.HasField("predicted_downtime_seconds")
    assert message.tracker == pb.TRACKER_UNSPECIFIED
    assert message.carrier == pb.CARRIER_UNSPECIFIED
    assert not message.HasField("error")
    assert not message.HasField("last_refusal")


def test_names_times_and_errors() -> None:
    error = FailedPrecondition("NOT_QUIESCED", "still written to", path="/dev/a")
    message = to_message(replace(SEEN, error=error, refusal=error, incomplete=True))
    assert message.name == "migrations/web1"
    assert id_of(message.name) == "web1"
    assert message.create_time.ToMilliseconds() in (1_700_000_000_249, 1_700_000_000_250)
    assert message.update_time == message.history[-1].time
    assert message.incomplete
    for status in (message.error, message.last_refusal):
        back = from_status(status)
        assert (type(back), back.reason, back.values) == (type(error), error.reason, error.values)


@pytest.mark.parametrize("name", ["web1", "migration/web1", "/migrations/web1", ""])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InvalidArgument):
        id_of(name)


def test_comparisons() -> None:
    unread = (UnreadRange("/dev/b", 8, 9),)
    found = Comparison(1, 2, 3, 4, 7, (Mismatch("/dev/a", 5, 6),), unread, done=True)
    message = to_comparison(found)
    assert [getattr(message, name) for name in ("compared_bytes", "total_bytes")] == [1, 2]
    assert (message.pending_bytes, message.mismatched_bytes, message.done) == (3, 4, True)
    (mismatch,) = message.mismatches
    assert (mismatch.source, mismatch.offset_bytes, mismatch.length_bytes) == ("/dev/a", 5, 6)
    assert message.unread_bytes == 7
    (range_,) = message.unread
    assert (range_.source, range_.offset_bytes, range_.length_bytes) == ("/dev/b", 8, 9)
