"""Bad sectors under a source: the others travel, the bad ones are tried again, none is skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests import content
from tests.content import Disk
from tests.devices import LoopDevice, ScratchedDevice
from tests.e2e import disks
from tests.e2e.agents import Pair, eventually
from tests.e2e.disks import MIB
from tests.e2e.test_errors import assert_given_up

SIZE = 4 * MIB
BAD = 3 * MIB + 20480
CHUNK = 65536
EASY = ("--max-downtime", "20s")

CARRIERS = pytest.mark.parametrize("carrier", ["tcp", "grpc"])
TRACKERS = pytest.mark.parametrize("tracker", ["ebpf", "scan"])


@pytest.fixture
def source(scratched_device: Callable[..., ScratchedDevice]) -> ScratchedDevice:
    made = scratched_device(SIZE)
    disks.soil(made.path, 1)
    return made


@pytest.fixture
def target(loop_device: Callable[..., LoopDevice]) -> str:
    return loop_device(SIZE).path


def hand_over(pair: Pair, name: str, source: ScratchedDevice, target: str) -> None:
    pair.source.wait(name, "CONVERGED")
    assert pair.source.ask("cutover", name)["state"] == "CUT_OVER"
    disks.assert_equal(source.path, target)


def start(pair: Pair, source: ScratchedDevice, target: str, *words: str) -> str:
    return pair.start(*EASY, *words, volumes=[(source.path, target)])


@CARRIERS
@TRACKERS
def test_a_block_that_heals(
    pair: Pair, source: ScratchedDevice, target: str, carrier: str, tracker: str
) -> None:
    source.scratch((BAD, 1))
    name = start(pair, source, target, "--carrier", carrier, "--tracker", tracker)
    shown = eventually(lambda: pair.source.show(name), lambda now: bool(now["trouble"]))
    source.scratch()
    at = BAD if tracker == "ebpf" else BAD // CHUNK * CHUNK
    assert f"at offset {at} cannot be read (EIO" in shown["trouble"]
    assert source.path in shown["trouble"]
    assert shown["state"] in ("SEEDING", "SYNCING")
    hand_over(pair, name, source, target)
    assert pair.source.show(name)["trouble"] == ""


@CARRIERS
@TRACKERS
def test_a_block_that_does_not(
    pair: Pair, source: ScratchedDevice, target: str, carrier: str, tracker: str
) -> None:
    """The others were sent and durable all the same; the source is as it was found."""
    source.scratch((BAD, 1))
    before = source.content()
    words = ("--wait", "converged", "--carrier", carrier, "--tracker", tracker)
    request = pair.migrate(*EASY, *words, volumes=[(source.path, target)])
    answer = pair.source.refuse(*request, reason="SOURCE_IO_ERROR")
    unit = 4096 if tracker == "ebpf" else CHUNK
    at = BAD // unit * unit
    assert answer.error["values"] == {
        "path": source.path,
        "errno": "EIO",
        "side": "source",
        "offset_bytes": str(at),
        "length_bytes": str(unit),
        "tries": "3",
    }
    assert str(at) in answer.error["message"]
    assert answer.shown["state"] == "FAILED"
    assert_given_up(pair, answer.shown["id"])
    there = content.read_all(target)
    assert there[:at] + there[at + unit :] == before[:at] + before[at + unit :]
    assert there[at : at + unit] != before[at : at + unit]
    assert source.content() == before
    assert not disks.is_fenced(source.path)


@CARRIERS
@TRACKERS
def test_no_handover_with_a_hole(
    pair: Pair, source: ScratchedDevice, target: str, carrier: str, tracker: str
) -> None:
    name = start(pair, source, target, "--carrier", carrier, "--tracker", tracker)
    pair.source.wait(name, "CONVERGED")
    with Disk(source.path, writable=True) as guest:
        guest.write(BAD // 4096 * 4096, b"written since".ljust(4096, b"."))
        source.scratch((BAD, 1))
        guest.write(BAD // 4096 * 4096, b"written, then unreadable".ljust(4096, b"."))
    pair.source.refuse("cutover", name, "--force", reason="SOURCE_UNREADABLE")
    source.scratch()
    assert not disks.is_fenced(source.path)
    shown: dict[str, Any] = pair.source.show(name)
    assert shown["state"] in ("SYNCING", "CONVERGED")
    assert shown["last_refusal"]["reason"] == "SOURCE_UNREADABLE"
    hand_over(pair, name, source, target)


@TRACKERS
def test_a_comparison_takes_what_it_cannot_read_for_different(
    pair: Pair, source: ScratchedDevice, target: str, tracker: str
) -> None:
    with Disk(target, writable=True) as there:  # the same, but where the source cannot be read
        for at in range(0, SIZE, MIB):
            there.write(at, source.content()[at : at + MIB])
        there.write(BAD // CHUNK * CHUNK, b"old".ljust(CHUNK, b"."))
    source.scratch((BAD, 1))
    name = start(pair, source, target, "--reuse-target", "--tracker", tracker)
    eventually(lambda: pair.source.show(name), lambda now: bool(now["trouble"]))
    source.scratch()
    hand_over(pair, name, source, target)
    shown = pair.source.show(name)
    assert shown["reconciled_bytes"] == SIZE - CHUNK


@TRACKERS
def test_verify_compares_what_can_be_read(
    pair: Pair, source: ScratchedDevice, target: str, tracker: str
) -> None:
    name = start(pair, source, target, "--tracker", tracker)
    pair.source.wait(name, "CONVERGED")
    with Disk(target, writable=True) as there:  # behind everybody's back, and where none can tell
        there.write(BAD // CHUNK * CHUNK, b"other".ljust(CHUNK, b"."))
    source.scratch((BAD, 1))
    answer = pair.source.refuse("verify", name, reason="COMPARISON_INCOMPLETE")
    at = BAD // CHUNK * CHUNK
    assert answer.error["values"] == {
        "path": source.path,
        "offset_bytes": str(at),
        "unread_bytes": str(CHUNK),
    }
    shown = answer.shown
    assert (shown["done"], shown["equal"], shown["unread_bytes"]) == (True, False, CHUNK)
    assert shown["unread"] == [{"source": source.path, "offset_bytes": at, "length_bytes": CHUNK}]
    assert shown["compared_bytes"] == SIZE - CHUNK
    assert shown["mismatched_bytes"] == 0
    with Disk(target, writable=True) as there:
        there.write(0, b"other".ljust(CHUNK, b"."))
    answer = pair.source.refuse("verify", name, reason="COPIES_DIFFER")
    assert (answer.shown["mismatched_bytes"], answer.shown["unread_bytes"]) == (CHUNK, CHUNK)
    source.scratch()
    assert pair.source.refuse("verify", name, reason="COPIES_DIFFER").shown["unread_bytes"] == 0
    pair.source.ask("cancel", name)
