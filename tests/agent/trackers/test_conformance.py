"""What every tracker owes, on every kind of device."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.tracker import Take
from native.bitmap import DirtyBitmap
from tests import devices
from tests.agent.trackers.subject import SHORTER, Subject, equal

Write = Callable[[Subject], tuple[int, int]]


@pytest.fixture
def shadow(subject: Subject) -> Iterator[Path]:
    """A copy of the device, as the target would hold it."""
    with devices.image_file(subject.size) as path:
        subject.settle(path)
        assert equal(subject, path)
        yield path


def noise(length: int) -> bytes:
    return random.Random(length).randbytes(length)


def direct(subject: Subject) -> tuple[int, int]:
    subject.direct(1 << 20, noise(8192))
    return 1 << 20, 8192


def one_sector(subject: Subject) -> tuple[int, int]:
    offset = (1 << 20) + 3 * subject.sector_size
    subject.direct(offset, noise(subject.sector_size))
    return offset, subject.sector_size


def buffered(subject: Subject) -> tuple[int, int]:
    subject.buffered(70_000, noise(10))
    return 70_000, 10


def spanning(subject: Subject) -> tuple[int, int]:
    """Over the borders of blocks and chunks, neither beginning nor ending on one."""
    offset, length = (1 << 20) - subject.sector_size, 65536 + 2 * subject.sector_size
    subject.direct(offset, noise(length))
    return offset, length


def large(subject: Subject) -> tuple[int, int]:
    subject.direct(1 << 20, noise(2 << 20))
    return 1 << 20, 2 << 20


def first_byte(subject: Subject) -> tuple[int, int]:
    subject.buffered(0, b"\xfe")
    return 0, 1


def last_byte(subject: Subject) -> tuple[int, int]:
    subject.buffered(subject.size - 1, b"\xfe")
    return subject.size - 1, 1


def zeroed(subject: Subject) -> tuple[int, int]:
    subject.direct(2 << 20, noise(131072))
    subject.settle()
    subject.zero(2 << 20, 131072)
    return 2 << 20, 131072


def discarded(subject: Subject) -> tuple[int, int]:
    subject.direct(2 << 20, noise(131072))
    subject.settle()
    subject.discard(2 << 20, 131072)
    return 2 << 20, 131072


WRITES = (
    direct,
    one_sector,
    buffered,
    spanning,
    large,
    first_byte,
    last_byte,
    zeroed,
    discarded,
)


def unmarked(marks: DirtyBitmap, offset: int, length: int) -> list[int]:
    """Return the blocks of a range that are not marked."""
    block = marks.block_size_bytes
    first = offset - offset % block
    return [at for at in range(first, offset + length, block) if not marks.is_marked(at)]


def test_every_write_is_in_the_next_take(subject: Subject) -> None:
    subject.settle()
    for write in WRITES:
        offset, length = write(subject)
        subject.device.flush()
        assert subject.tracker.look() > 0, write.__name__
        assert subject.tracker.is_marked(offset, 1), write.__name__
        marks, take = subject.take()
        assert unmarked(marks, offset, length) == [], write.__name__
        assert take.marked_bytes >= length, write.__name__
        assert not take.suspect
        subject.send(marks)


def test_a_take_leaves_nothing(subject: Subject) -> None:
    subject.settle()
    direct(subject)
    marks, _ = subject.take()
    subject.send(marks)
    assert subject.tracker.look() == 0
    assert not subject.tracker.is_marked(1 << 20, 4096)
    empty, take = subject.take()
    assert (empty.count(), take.marked_bytes) == (0, 0)


def test_a_look_takes_nothing(subject: Subject) -> None:
    subject.settle()
    offset, length = direct(subject)
    assert subject.tracker.look() == subject.tracker.look() >= length
    subject.tracker.is_marked(offset, length)
    marks, _ = subject.take()
    assert unmarked(marks, offset, length) == []


def test_takes_are_added_to_what_is_there(subject: Subject) -> None:
    subject.settle()
    marks = DirtyBitmap(subject.size, subject.block)
    marks.set_range(0, 1)
    direct(subject)
    subject.tracker.take(marks)
    assert marks.is_marked(0)
    assert marks.is_marked(1 << 20)


def test_is_marked_says_which(subject: Subject) -> None:
    subject.settle()
    offset, _ = direct(subject)
    assert subject.tracker.is_marked(offset, 4096)
    assert subject.tracker.is_marked(offset - offset % 65536, 65536)
    assert not subject.tracker.is_marked(offset + (1 << 20), 65536)
    assert not subject.tracker.is_marked(subject.size - 1, 1)


@pytest.mark.parametrize("kind", SHORTER)
def test_what_lies_behind_the_end_is_not_marked(
    make_subject: Callable[[str], Subject], kind: str
) -> None:
    subject = make_subject(kind)
    subject.settle()
    subject.take()
    end, length = subject.size, subject.cut_bytes
    subject.direct(end + 4096, noise(length - 4096))
    assert subject.take()[1] == Take(0)
    # The last block of the volume and the first behind it, in one write.
    subject.direct(end - 4096, noise(8192))
    marks, taken = subject.take()
    assert taken == Take(marks.count_bytes())
    assert marks.is_marked(end - 1)


def test_a_copy_that_follows_the_takes_ends_equal(subject: Subject, shadow: Path) -> None:
    """A writer and takes at once: rules 1 and 2 of the design."""
    guest = threading.Thread(target=scribble, args=(subject,))
    guest.start()
    takes = 0
    while guest.is_alive() or not takes:
        marks = DirtyBitmap(subject.size, subject.block)
        assert not subject.tracker.take(marks).suspect
        subject.send(marks, shadow)
        takes += 1
    guest.join()
    marks, _ = subject.take()
    subject.send(marks, shadow)
    assert equal(subject, shadow)
    assert subject.tracker.look() == 0


def scribble(subject: Subject) -> None:
    rng = random.Random(7)
    for number in range(120):
        sector = subject.sector_size
        length = sector * rng.randint(1, 40)
        # Mostly in a few hot places, which are then taken, read and written at the same time.
        hot = (0, 1 << 20, (1 << 20) + 65536, 3 << 20)
        offset = rng.choice(hot) + sector * rng.randint(0, 9)
        if number % 10 == 9:
            subject.zero(offset - offset % 4096, 65536)
        elif number % 3:
            subject.direct(offset, rng.randbytes(length))
        else:
            subject.buffered(offset + 1, rng.randbytes(length))


def test_stop_leaves_nothing_and_may_be_repeated(subject: Subject) -> None:
    subject.tracker.stop()
    subject.tracker.stop()
    pins = getattr(subject.tracker, "_pin_dir", None)
    assert pins is None or (pins.parent.is_dir() and not pins.exists())
