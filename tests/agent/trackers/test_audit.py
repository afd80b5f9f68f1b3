"""The audit: a real hole is noticed at the next take, with both figures; never a false alarm."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("native.ebpf", reason="built without clang and libbpf")

from agent.device import disk_range
from agent.tracker.audit import Audit, choose_base, find_missing, parse_stat
from agent.tracker.ebpf import EbpfTracker
from native.bitmap import DirtyBitmap
from native.ebpf import KernelTracker, Sectors
from tests.agent.trackers.subject import Subject
from tests.guest import destroy, finish, fio
from tests.native.tracking import write_direct

Make = Callable[[str], Subject]
KINDS = ("ebpf-loop512", "ebpf-loop4096", "ebpf-partition", "ebpf-zram")
STAT = b"  1 2 3 4 5 6 777 8 0 10 11 12 13 1414 15 16 17\n"
WORKLOADS = {
    "random": ["--rw=randwrite", "--bs=4k", "--numjobs=2"],
    "merging": ["--rw=write", "--bs=4k", "--iodepth=64", "--iodepth_batch=32"],
    "trims": ["--rw=randtrimwrite", "--bs=16k"],
    "buffered": ["--rw=randwrite", "--bs=4k", "--direct=0", "--fsync=32"],
}


def make(make_subject: Make, kind: str) -> Subject:
    """Some drivers count only where they are told to: zram."""
    subject = make_subject(kind)
    (disk_of(subject) / "queue/iostats").write_text("1")
    return subject


def kernel_of(subject: Subject) -> KernelTracker:
    assert isinstance(subject.tracker, EbpfTracker)
    kernel = subject.tracker._kernel
    assert kernel is not None
    return kernel


def audit_of(subject: Subject) -> Audit:
    assert isinstance(subject.tracker, EbpfTracker)
    audit = subject.tracker._audit
    assert audit is not None
    return audit


def unlink(subject: Subject, *links: str) -> None:
    """Detach programs from outside, as no agent does: with its pin a link goes."""
    pins = Path(str(kernel_of(subject).pin_dir))
    for link in links or [path.name for path in pins.glob("link_*")]:
        (pins / link).unlink()


def blind(subject: Subject) -> None:
    """Detach all programs. The kernel lets them run a moment longer: holes begin after that."""
    unlink(subject)
    kernel = kernel_of(subject)
    had_base, unseen = kernel.base is not None, 0
    while unseen < 5:
        seen = kernel.sums()
        write_direct(subject.path, 0, 4096)
        notes = kernel.in_flight()
        unseen = 0 if notes or kernel.sums() != seen else unseen + 1
        for note in notes:
            kernel.forget(note)
        time.sleep(0.01)
    if had_base:
        seen, counted = kernel.sums(), counters(subject)
        kernel.base = Sectors(seen.written - counted.written, seen.discarded - counted.discarded)


def missed_bytes(reason: str) -> int:
    found = re.search(r"missed writes on /dev/\S+: (\d+) bytes \w+ on the disk, (\d+) of", reason)
    assert found, reason
    return int(found[1]) - int(found[2])


def disk_of(subject: Subject) -> Path:
    number = Path(subject.path).stat().st_rdev
    return Path("/sys/block") / disk_range(number).name


def counters(subject: Subject) -> Sectors:
    return parse_stat((disk_of(subject) / "stat").read_bytes())


def excess(subject: Subject) -> Sectors:
    """What the tracker saw more than the kernel counted, since the base."""
    kernel = kernel_of(subject)
    counted = counters(subject)
    base, seen = kernel.base, kernel.sums()
    assert base is not None
    return Sectors(
        seen.written - counted.written - base.written,
        seen.discarded - counted.discarded - base.discarded,
    )


def test_stat_is_read_by_its_columns() -> None:
    assert parse_stat(STAT) == Sectors(777, 1414)


@pytest.mark.parametrize(
    ("counted", "base", "seen", "missing"),
    [
        ((100, 10), (0, 0), (100, 10), (0, 0)),
        ((101, 10), (0, 0), (100, 10), (1, 0)),
        ((100, 12), (0, 0), (100, 10), (0, 2)),
        ((100, 10), (0, 0), (500, 99), (0, 0)),  # to have seen more is no danger
        ((1000, 50), (-900, -40), (100, 10), (0, 0)),  # before the attach
        ((1008, 50), (-900, -40), (100, 10), (8, 0)),
        ((100, 10), (7, 3), (107, 13), (0, 0)),  # seen, and not counted by the kernel
        ((100, 10), (7, 3), (106, 12), (1, 1)),
        ((101, 10), (0, 0), (100, 11), (1, 0)),  # one does not make up for the other
    ],
)
def test_only_what_the_kernel_has_more_is_missing(
    counted: tuple[int, int], base: tuple[int, int], seen: tuple[int, int], missing: tuple[int, int]
) -> None:
    assert find_missing(Sectors(*counted), Sectors(*base), Sectors(*seen)) == missing


def test_the_base_is_the_least_of_the_quickest() -> None:
    quick = [(0.001, Sectors(90, 9)), (0.002, Sectors(95, 5)), (0.003, Sectors(99, 7))]
    slow = [(0.5, Sectors(10, 1)), (0.4, Sectors(20, 2)), (0.004, Sectors(100, 10))]
    assert choose_base(slow + quick) == Sectors(90, 5)
    assert choose_base(quick[:1]) == Sectors(90, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hole_makes_the_volume_suspect_and_the_tracker_sees_again(
    make_subject: Make, kind: str
) -> None:
    subject = make(make_subject, kind)
    subject.settle()
    subject.direct(0, b"a" * 8192)
    assert subject.take()[1].suspect == ""
    blind(subject)
    subject.direct(1 << 20, b"b" * 8192)
    assert subject.tracker.look() == subject.size
    marks, take = subject.take()
    assert missed_bytes(take.suspect) == 8192
    assert subject.path in take.suspect
    assert marks.count_bytes() == take.marked_bytes == subject.size
    # Attached anew, with a base of its own.
    subject.direct(2 << 20, b"c" * 4096)
    marks, take = subject.take()
    assert (take.suspect, marks.count()) == ("", 1)
    assert marks.is_marked(2 << 20)
    assert subject.tracker.look() == 0


def test_missed_discards_are_not_made_up_for_by_writes(make_subject: Make) -> None:
    subject = make_subject("ebpf-loop512")
    subject.settle()
    # Seen before, and never counted by the kernel: room for a hole, were all added up.
    kernel = kernel_of(subject)
    blind(subject)
    base = kernel.base
    assert base is not None
    kernel.base = Sectors(base.written - 1000, base.discarded)
    subject.discard(1 << 20, 65536)
    _, take = subject.take()
    assert missed_bytes(take.suspect) == 65536


def test_what_was_missed_before_the_first_take_does_not_matter(make_subject: Make) -> None:
    subject = make_subject("ebpf-loop512")
    assert kernel_of(subject).base is None
    blind(subject)
    subject.direct(0, b"a" * 4096)
    assert subject.take()[1].suspect == ""
    subject.direct(0, b"a" * 4096)
    assert missed_bytes(subject.take()[1].suspect) == 4096


def test_the_next_agent_finds_the_base_with_the_pins(make_subject: Make) -> None:
    subject = make_subject("ebpf-loop512")
    subject.settle()
    base = kernel_of(subject).base
    assert base is not None
    tracker = subject.tracker
    assert isinstance(tracker, EbpfTracker)
    # As if it had seen 8 sectors less; a base of the next agent's own would hide it.
    kernel_of(subject).base = Sectors(base.written + 8, base.discarded)
    tracker.detach()
    subject.direct(0, b"a" * 4096)
    subject.tracker = EbpfTracker(subject.device, subject.block, tracker._pin_dir)
    subject.tracker.resume()
    assert missed_bytes(subject.take()[1].suspect) == 4096
    assert subject.take()[1].suspect == ""
    subject.tracker.stop()


def test_without_the_kernels_count_nothing_is_audited_and_that_is_said_once(
    make_subject: Make, caplog: pytest.LogCaptureFixture
) -> None:
    subject = make_subject("ebpf-loop512")
    subject.settle()
    switch = disk_of(subject) / "queue/iostats"
    blind(subject)
    switch.write_text("0")
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                subject.direct(0, b"a" * 4096)
                assert subject.take()[1].suspect == ""
        assert caplog.text.count("tracking is not audited") == 1
    finally:
        switch.write_text("1")
    # Begins again.
    assert subject.take()[1].suspect == ""
    subject.direct(0, b"a" * 4096)
    assert missed_bytes(subject.take()[1].suspect) == 4096


def test_a_hole_elsewhere_on_the_disk_counts(make_subject: Make) -> None:
    """The disk's counters do not tell whose writes they are."""
    subject = make_subject("ebpf-partition")
    subject.settle()
    disk = f"/dev/{disk_of(subject).name}"
    write_direct(disk, 0, 512, 0)
    assert subject.take()[1].suspect == ""
    blind(subject)
    write_direct(disk, 1 << 20, 512, 0)
    assert missed_bytes(subject.take()[1].suspect) == 512


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_busy_guest_is_no_hole(make_subject: Make, kind: str, workload: str) -> None:
    subject = make(make_subject, kind)
    kernel = kernel_of(subject)
    quiet = kernel.sums()
    guest = fio(subject.path, "--thread", "--runtime=1", "--time_based", *WORKLOADS[workload])
    try:
        while kernel.sums() == quiet and guest.poll() is None:
            time.sleep(0.01)
        takes = 0
        while guest.poll() is None or not takes:
            if takes % 20 == 0:
                kernel.base = None  # begun amid the guest's writes
            marks = DirtyBitmap(subject.size, subject.block)
            assert subject.tracker.take(marks).suspect == ""
            assert audit_of(subject).look() == ""
            takes += 1
    finally:
        if guest.poll() is None:
            destroy(guest)
    finish(guest)
    assert subject.take()[1].suspect == ""
    # Not by seeing too much: of what came since the base hardly anything is left over.
    total = kernel.sums().written
    assert 0 <= excess(subject).written <= total // 20


def test_missed_completions_are_no_hole(make_subject: Make) -> None:
    """The kernel skips programs at times; the notes of such writes count (see dirty.bpf.c)."""
    subject = make_subject("ebpf-loop512")
    subject.settle()
    unlink(subject, "link_1")
    guest = fio(subject.path, "--thread", "--runtime=1", "--time_based", "--rw=randwrite")
    try:
        while guest.poll() is None:
            assert subject.take()[1].suspect == ""
    finally:
        if guest.poll() is None:
            destroy(guest)
    finish(guest)
    for _ in range(3):
        assert subject.take()[1].suspect == ""
    assert kernel_of(subject).in_flight() == []


def test_the_counters_are_closed(make_subject: Make) -> None:
    subject = make_subject("ebpf-loop512")
    audit = Audit(disk_of(subject), kernel_of(subject), subject.path)
    audit.begin()
    assert audit.check() == ""
    audit.close()
    audit.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        audit.look()
