"""What is special about `ebpf`: pins, the proof that it sees, and what it cannot place."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("native.ebpf", reason="built without clang and libbpf")

from agent.errors import FailedPrecondition, InvalidArgument
from agent.tracker import ebpf
from native.blockio import BlockDevice
from native.ebpf import Counters, KernelTracker
from tests.agent.trackers.subject import Subject
from tests.devices import LoopDevice

if TYPE_CHECKING:
    from native.ebpf import TrackedRange

Make = Callable[[str], Subject]
SIZE = 1 << 20


class LosingKernel:
    """A kernel tracker that can be told that it lost a write, or has seen nothing."""

    lost = 0
    blind = False

    def __init__(self, kernel: KernelTracker) -> None:
        self._kernel = kernel

    @classmethod
    def attach(cls, watch: TrackedRange, pin_dir: str) -> LosingKernel:
        return cls(KernelTracker.attach(watch, pin_dir))

    def counters(self) -> Counters:
        seen, lost = self._kernel.counters()
        return Counters(0 if self.blind else seen, lost + self.lost)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> type[LosingKernel]:
    monkeypatch.setattr(ebpf, "KernelTracker", LosingKernel)
    monkeypatch.setattr(LosingKernel, "lost", 0)
    monkeypatch.setattr(LosingKernel, "blind", False)
    return LosingKernel


def test_a_lost_write_makes_the_volume_suspect(
    losing: type[LosingKernel], make_subject: Make
) -> None:
    subject = make_subject("ebpf-loop512")
    subject.settle()
    losing.lost = 2
    assert subject.tracker.look() == subject.size
    assert subject.tracker.is_marked(subject.size - 1, 1)
    marks, take = subject.take()
    assert marks.count_bytes() == subject.size
    assert take.marked_bytes == subject.size
    assert "2 writes of unknown range" in take.suspect
    # Once: what is lost later is counted again.
    marks, take = subject.take()
    assert (marks.count(), take.suspect) == (0, "")
    assert subject.tracker.look() == 0
    losing.lost = 3
    assert subject.take()[1].suspect


def test_what_was_lost_before_the_start_does_not_matter(
    losing: type[LosingKernel], make_subject: Make
) -> None:
    losing.lost = 5
    subject = make_subject("ebpf-loop512")
    assert subject.take()[1].suspect == ""


def test_a_blind_tracker_is_refused(
    losing: type[LosingKernel],
    loop_device: Callable[..., LoopDevice],
    pins: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losing.blind = True
    monkeypatch.setattr(ebpf, "_PROBE_SECONDS", 0.0)
    with BlockDevice(loop_device(SIZE).path) as device:
        tracker = ebpf.EbpfTracker(device, 4096, pins / "blind")
        with pytest.raises(FailedPrecondition, match="shows no completions") as caught:
            tracker.start()
    assert caught.value.reason == "TRACKER_BLIND"
    assert not (pins / "blind").exists()


def test_a_failed_attach_leaves_nothing(
    loop_device: Callable[..., LoopDevice], pins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BlockDevice(loop_device(SIZE).path) as device:
        tracker = ebpf.EbpfTracker(device, 4096, pins / "there")
        (pins / "there").mkdir()
        (pins / "there/of another").mkdir()
        with pytest.raises(FailedPrecondition, match="warmsync doctor") as caught:
            tracker.start()
        assert caught.value.reason == "TRACKER_FAILED"
        assert [path.name for path in (pins / "there").iterdir()] == ["of another"]
        tracker.stop()


def test_files_are_refused(image_file: Callable[..., Path], tmp_path: Path) -> None:
    device = BlockDevice(str(image_file(SIZE)))
    with device, pytest.raises(InvalidArgument, match="is a file") as caught:
        ebpf.EbpfTracker(device, 4096, tmp_path)
    assert caught.value.reason == "TRACKER_UNSUITABLE"


def test_nothing_works_before_the_start(
    loop_device: Callable[..., LoopDevice], tmp_path: Path
) -> None:
    with BlockDevice(loop_device(SIZE).path) as device:
        tracker = ebpf.EbpfTracker(device, 4096, tmp_path / "x")
        with pytest.raises(RuntimeError, match="not started"):
            tracker.look()
        tracker.stop()


@pytest.mark.parametrize("block", [65536, 1 << 20])
def test_large_blocks(loop_device: Callable[..., LoopDevice], pins: Path, block: int) -> None:
    """`is_marked` is asked chunk by chunk, whatever the block size."""
    with BlockDevice(loop_device(4 << 20).path) as device:
        tracker = ebpf.EbpfTracker(device, block, pins / "large")
        tracker.start()
        try:
            subject = Subject(device.path, 512, block, device, tracker)
            subject.take()
            subject.direct((1 << 20) + 3 * 65536, b"x" * 512)
            assert tracker.is_marked((1 << 20) + 3 * 65536, 65536)
            assert not tracker.is_marked((2 << 20) + 65536, 65536)
            assert tracker.look() == block
        finally:
            tracker.stop()


def test_a_mount_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ebpf.mount_bpffs(tmp_path)  # elsewhere: none of its business
    monkeypatch.setattr("os.path.ismount", lambda path: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "mount").write_text("#!/bin/sh\necho not today >&2\nexit 32\n")
    (tmp_path / "mount").chmod(0o755)
    with pytest.raises(OSError, match="not today") as caught:
        ebpf.mount_bpffs(Path("/sys/fs/bpf/warmsync"))
    assert caught.value.errno == errno.EPERM
