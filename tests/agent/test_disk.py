"""A source volume: taken up again after any end, and gives everything back when it is closed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from agent import disk as disk_module
from agent.disk import SourceDisk, open_source
from agent.errors import Unavailable
from agent.migration import Depth, Scheme, Volume
from agent.store import Store
from agent.tracker.memory import MemoryTracker
from native.bitmap import DirtyBitmap

SIZE = 4 << 20
BLOCK = 65536


def mapped(directory: Path) -> list[str]:
    """Return the files of a directory that this process has open, if only by a mapping."""
    found = (os.readlink(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd") if _is(one))
    return [path for path in found if path.startswith(str(directory))]


def _is(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


def test_a_closed_volume_keeps_no_descriptor(tmp_path: Path) -> None:
    """Ended migrations are remembered, a thousand of them."""
    image, files = tmp_path / "source.img", tmp_path / "volumes"
    image.write_bytes(bytes(SIZE))
    opened = open_source(Volume(str(image), "/target"), (str(image),))
    store = Store(files, "web1-0")
    disk = SourceDisk(opened, Scheme.SCAN, BLOCK, tmp_path, store, verify=Depth.FINAL)
    disk.start()
    assert len(mapped(files)) >= 5  # pending, taken, the tracker's digests, the tree's three
    disk.close()
    assert mapped(files) == []
    assert list(files.iterdir()) == []


class KilledError(BaseException):
    """The agent ends here."""


class KeptTracker(MemoryTracker):
    """What it marks was kept, if `resume` raises nothing."""

    on_start: BaseException | None = None
    on_resume: Exception | None = None

    def start(self) -> None:
        if self.on_start is not None:
            raise self.on_start

    def resume(self) -> None:
        if self.on_resume is not None:
            raise self.on_resume


class MortalStore(Store):
    """Dies once `dies_after` was made, and before it is used."""

    dies_after = ""

    def make_bitmap(self, name: str, size_bytes: int, block_size_bytes: int) -> DirtyBitmap:
        made = super().make_bitmap(name, size_bytes, block_size_bytes)
        if name == self.dies_after:
            raise KilledError
        return made


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], SourceDisk]:
    """`live()`: the volume as the next agent has it."""
    image = tmp_path / "source.img"
    image.write_bytes(bytes(SIZE))
    tracker = lambda *_, size_bytes: KeptTracker(size_bytes, BLOCK)  # noqa: E731
    monkeypatch.setattr(disk_module, "make_tracker", tracker)

    def make() -> SourceDisk:
        opened = open_source(Volume(str(image), "/target"), (str(image),))
        store = MortalStore(tmp_path / "volumes", "web1-0")
        return SourceDisk(opened, Scheme.EBPF, BLOCK, tmp_path, store, verify=Depth.FULL)

    disk = make()
    disk.start()
    disk.pending.clear()
    disk.pending.set_range(BLOCK, BLOCK)
    disk.detach()
    return make


def set_up(disk: SourceDisk, *, start: BaseException | None, resume: Exception | None) -> None:
    assert isinstance(disk.tracker, KeptTracker)
    disk.tracker.on_start, disk.tracker.on_resume = start, resume


@pytest.mark.parametrize("moment", ["pending", "taken", "tracker"])
def test_killed_while_it_begins_anew(live: Callable[[], SourceDisk], moment: str) -> None:
    """What was pending is not known any more, so whoever comes next has to send all."""
    disk = live()
    start = KilledError() if moment == "tracker" else None
    set_up(disk, start=start, resume=OSError(116, "not kept"))
    disk._store.dies_after = moment  # type: ignore[attr-defined]
    with pytest.raises(KilledError):
        disk.resume(believed=True)
    again = live()
    again.resume(believed=True)
    assert again.pending.count_bytes() == SIZE
    again.close()


def test_a_tracker_that_is_not_reached_changes_nothing(live: Callable[[], SourceDisk]) -> None:
    disk = live()
    set_up(disk, start=None, resume=Unavailable("QMP_UNREACHABLE", "no answer in 10 s"))
    with pytest.raises(Unavailable):
        disk.resume(believed=True)
    disk.detach()
    again = live()
    assert again.resume(believed=True) == ""
    assert list(again.pending.extents()) == [(BLOCK, BLOCK)]
    again.close()
