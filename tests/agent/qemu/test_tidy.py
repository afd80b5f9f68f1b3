"""What is left in a QEMU that did not answer when its migration ended, and is removed later."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from agent.config import AgentConfig
from agent.device import open_device
from agent.disk import SourceDisk, open_source
from agent.errors import FailedPrecondition, ResourceExhausted
from agent.migration import Plan, Scheme, Volume
from agent.qemu import device, tidy
from agent.qemu import image as image_module
from agent.qemu.access import Seat
from agent.qemu.image import Image
from agent.qemu.keeper import Keeper, list_bitmaps
from agent.qemu.monitor import Monitor, converse
from agent.qemu.note import read_note
from agent.registry.places import places_of
from agent.registry.preparation import Preparation
from agent.store import Store
from tests import devices, qemus
from tests.agent.ends import SIGNER, FakeCarrier, FakePeer
from tests.qemus import Qemu

Work = Callable[[Monitor], Awaitable[object]]
TOLD = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once, not in a minute."""
    monkeypatch.setattr(tidy, "_AGAIN_SECONDS", 0.2)


@pytest.fixture
def seat(machine: Qemu) -> Seat:
    return machine.seat()


def begin(machine: Qemu, seat: Seat) -> SourceDisk:
    path = str(machine.image)
    opened = open_source(Volume(path, path), (path,), seat)
    store = Store(seat.note.parent, seat.name)
    disk = SourceDisk(opened, Scheme.QEMU, 4096, Path("/nowhere"), store)
    disk.start()
    return disk


@contextmanager
def somebody_at(qmp: str) -> Iterator[None]:
    """A QMP socket serves one at a time; others give up soon, but only while this lasts."""

    def hurried(path: str, work: Work, patience_seconds: float) -> object:
        return converse(path, work, 0.5)

    with socket.socket(socket.AF_UNIX) as client, pytest.MonkeyPatch.context() as patch:
        client.connect(qmp)
        assert client.recv(1)
        for module in (device, tidy):
            patch.setattr(module, "converse", hurried)
        yield


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + qemus.PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_busy_qemu_is_tidied_up_later(machine: Qemu, seat: Seat) -> None:
    disk = begin(machine, seat)
    with somebody_at(machine.socket):
        disk.close()
        assert seat.note.exists()
        time.sleep(1.0)  # it is tried in vain meanwhile
    eventually(lambda: not seat.note.exists())
    assert (machine.bitmaps(), machine.exports()) == ([], [])


def test_its_image_is_tidied_up_if_it_has_ended_by_then(machine: Qemu, seat: Seat) -> None:
    disk = begin(machine, seat)
    with somebody_at(machine.socket):
        disk.close()
    machine.process.terminate()  # type: ignore[union-attr]
    machine.process.wait()  # type: ignore[union-attr]
    eventually(lambda: not seat.note.exists())
    assert list_bitmaps(str(machine.image), "") == []


@pytest.mark.parametrize("failing", ["qemu-img", "unlink", pytest.param("odd", marks=TOLD)])
def test_it_goes_on_to_try_whatever_fails(
    machine: Qemu, seat: Seat, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Without qemu-img, on a file system that has become read-only, or with a fault of ours."""
    asked: list[object] = []

    def fail(*args: object, **named: object) -> None:
        asked.append(args)
        raise OSError(30, "Read-only file system") if failing == "unlink" else RuntimeError("odd")

    disk = begin(machine, seat)
    with somebody_at(machine.socket):
        disk.close()
    with monkeypatch.context() as patch:
        if failing == "qemu-img":
            machine.quit()
            patch.setenv("PATH", "/nowhere")
            time.sleep(1.0)
        else:
            where: object = Path if failing == "unlink" else tidy
            patch.setattr(where, "unlink" if failing == "unlink" else "clear", fail)
            eventually(lambda: len(asked) > 2)
    assert seat.note.exists()
    eventually(lambda: not seat.note.exists())
    if failing != "qemu-img":
        machine.quit()
    assert list_bitmaps(str(machine.image), "") == []


def test_a_migration_ends_where_its_rests_cannot_be_removed(
    machine: Qemu, seat: Seat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it has ended is written down by then."""
    disk = begin(machine, seat)
    machine.quit()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        disk.close()
    eventually(lambda: not seat.note.exists())
    assert list_bitmaps(str(machine.image), "") == []


def test_a_state_directory_that_became_read_only_keeps_no_disk_open(
    machine: Qemu, seat: Seat, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = begin(machine, seat)

    def fail(path: Path, *, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        disk.close()
    assert (machine.bitmaps(), machine.exports()) == ([], [])


@pytest.mark.parametrize("busy", [False, True])
def test_what_ends_with_its_fence_up_keeps_its_note(machine: Qemu, seat: Seat, busy: bool) -> None:
    """The next start has to find the fence, to keep it up or to lift it."""
    disk = begin(machine, seat)
    disk.fence()
    with ExitStack() as stack:
        if busy:
            stack.enter_context(somebody_at(machine.socket))
        disk.close()
    eventually(lambda: machine.bitmaps() == [])
    time.sleep(0.5)
    assert read_note(seat.note) is not None
    machine.image.chmod(0o644)


def test_an_agent_that_ends_leaves_its_trackers_alone(machine: Qemu, seat: Seat) -> None:
    disk = begin(machine, seat)
    with somebody_at(machine.socket):
        disk.detach()
    time.sleep(1.0)
    assert len(machine.bitmaps()) == 1


def test_a_volume_of_the_same_name_is_not_tidied_up(machine: Qemu, seat: Seat) -> None:
    disk = begin(machine, seat)
    with somebody_at(machine.socket):
        disk.close()
    again = begin(machine, seat)
    time.sleep(1.0)
    assert (len(machine.bitmaps()), machine.exports()) == (1, [seat.export])
    assert again.look() == 0
    again.close()
    assert machine.bitmaps() == []


def leave(machine: Qemu, seat: Seat) -> None:
    """End a migration while its QEMU does not answer, and kill that with the bitmaps saved."""
    disk = begin(machine, seat)
    with somebody_at(machine.socket):
        disk.close()
        assert machine.process is not None
        machine.process.terminate()
        machine.process.wait()


def test_an_image_that_never_answers_is_in_nobodys_way(
    machine: Qemu, seat: Seat, make_disk: Callable[..., Qemu], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tidy, "_WAIT_SECONDS", 1.0)
    devices.require("nbdkit")
    other = make_disk("other")
    other.start_machine("-S")
    others = replace(other.seat("other-0"), access=replace(other.access, patience_seconds=0.5))
    leave(machine, seat)
    with qemus.dead_storage(machine) as revive:
        eventually(lambda: seat in tidy._busy)
        disk = begin(other, others)
        with somebody_at(other.socket):
            disk.close()
        again = begin(other, replace(others, name="next-0"))  # waits for nothing
        eventually(lambda: not others.note.exists())
        assert other.bitmaps() == [f"{other.access.prefix}next-0-b1"]
        again.close()
        with pytest.raises(FailedPrecondition, match="see to its storage") as caught:
            tidy.settle(seat)
        assert caught.value.reason == "IMAGE_UNUSABLE"
        assert seat.note.exists()
        revive()
        eventually(lambda: not seat.note.exists())
    assert list_bitmaps(str(machine.image), "") == []


def test_a_migration_that_is_refused_keeps_the_note_of_what_is_left(
    machine: Qemu, make_disk: Callable[..., Qemu], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the same id, of another disk."""
    devices.require("nbdkit")
    monkeypatch.setattr(tidy, "_WAIT_SECONDS", 0.5)
    other = make_disk("other")
    config = AgentConfig(state_dir=str(machine.directory), allow_devices=(str(other.image),))
    places = places_of(config)
    peer = FakePeer(FakeCarrier([]))
    preparation = Preparation(config, places, machine.access, lambda _: peer, SIGNER)
    seat = Seat(machine.access, "web1-0", places.volumes / "web1-0.qemu")
    plan = Plan("web1", "target:7070", (Volume(str(other.image), "/dst"),), Scheme.QEMU)
    leave(machine, seat)
    with qemus.dead_storage(machine) as revive:
        eventually(lambda: seat in tidy._busy)
        with pytest.raises(FailedPrecondition, match="see to its storage"):
            asyncio.run(preparation.prepare(plan, lambda _: None))
        assert seat.note.exists()
        revive()
        eventually(lambda: not seat.note.exists())
    assert list_bitmaps(str(machine.image), "") == []


def open_elsewhere(machine: Qemu, *, read_only: bool) -> Qemu:
    """Have its image in a QEMU that the agent does not know."""
    (machine.directory / "elsewhere").mkdir()
    other = Qemu(machine.directory / "elsewhere", machine.image, "qcow2")
    if read_only:
        file = {"driver": "file", "filename": str(machine.image), "read-only": True}
        block = {"driver": "qcow2", "node-name": "disk", "read-only": True, "file": file}
        command = ["qemu-storage-daemon", "--blockdev", json.dumps(block)]
        command += ["--chardev", f"socket,id=qmp,path={other.socket},server=on,wait=off"]
        other.start([*command, "--monitor", "chardev=qmp"])
    else:
        other.start_daemon()
    return other


@pytest.mark.parametrize("read_only", [False, True])
def test_an_image_that_is_open_elsewhere_is_tidied_up_after_that(
    machine: Qemu,
    seat: Seat,
    resources: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    read_only: bool,
) -> None:
    """As while a qemu-img has it that was given up, and that the kernel holds."""
    monkeypatch.setattr(image_module, "_END_SECONDS", 0.1)
    begin(machine, seat).detach()
    machine.quit()
    other = open_elsewhere(machine, read_only=read_only)
    resources.callback(other.kill)
    tidy.tidy(seat.access, [], [seat])
    time.sleep(1.0)
    assert seat.note.exists()
    other.kill()
    eventually(lambda: not seat.note.exists())
    assert list_bitmaps(str(machine.image), "") == []


def test_what_is_left_behind_a_fence_is_let_be(
    machine: Qemu, seat: Seat, resources: ExitStack
) -> None:
    begin(machine, seat).detach()
    machine.quit()
    other = open_elsewhere(machine, read_only=True)
    resources.callback(other.kill)
    machine.image.chmod(0o444)
    tidy.tidy(seat.access, [], [seat])
    eventually(lambda: not seat.note.exists())
    machine.image.chmod(0o644)


def test_what_is_a_target_by_now_is_not_touched(machine: Qemu, seat: Seat) -> None:
    """Whose bytes are the source's, whatever they look like."""
    begin(machine, seat).detach()
    machine.quit()
    before, path = machine.image.read_bytes(), str(machine.image)
    target = open_device(path, (path,), writable=True, exclusive=True)
    tidy.tidy(seat.access, [], [seat])
    time.sleep(1.0)
    assert seat.note.exists()
    assert machine.image.read_bytes() == before
    target.close()
    eventually(lambda: not seat.note.exists())
    assert list_bitmaps(path, "") == []


def test_an_image_that_is_gone_holds_nothing(machine: Qemu, seat: Seat) -> None:
    begin(machine, seat).detach()
    machine.quit()
    machine.image.unlink()
    tidy.tidy(seat.access, [], [seat])
    eventually(lambda: not seat.note.exists())


def test_an_agent_starts_whatever_its_images_are_on(machine: Qemu, seat: Seat) -> None:
    devices.require("nbdkit")
    begin(machine, seat).detach()
    machine.quit()
    assert list_bitmaps(str(machine.image), "") != []
    with qemus.dead_storage(machine) as revive:
        assert tidy.tidy(seat.access, [], [seat]) == []
        eventually(lambda: seat in tidy._busy)
        assert seat.note.exists()
        revive()
        eventually(lambda: not seat.note.exists())
    assert list_bitmaps(str(machine.image), "") == []


def test_an_image_whose_vms_socket_is_anothers_is_tidied_up(
    machine: Qemu, seat: Seat, make_disk: Callable[..., Qemu]
) -> None:
    begin(machine, seat).detach()
    machine.quit()
    other = make_disk("other")
    other.directory = machine.directory
    other.start_machine("-S")
    tidy.tidy(seat.access, [], [seat])
    eventually(lambda: not seat.note.exists())
    assert list_bitmaps(str(machine.image), "") == []


@pytest.mark.parametrize("fenced", [False, True])
def test_a_note_that_cannot_be_read_is_removed(machine: Qemu, seat: Seat, fenced: bool) -> None:
    """But not what a fence may need."""
    seat.note.write_text("{")
    tidy.tidy(seat.access, [], [seat], [seat.name] if fenced else [])
    assert seat.note.exists() is fenced


def test_a_note_that_cannot_be_removed_is_told(
    machine: Qemu, seat: Seat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be taken for the new volume's."""
    disk = begin(machine, seat)
    with somebody_at(machine.socket):
        disk.close()

    def fail(path: Path, *, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        with pytest.raises(ResourceExhausted, match="cannot be removed") as caught:
            tidy.settle(seat)
        assert caught.value.reason == "STATE_NOT_KEPT"
        seat.note.write_text("{")
        tidy.tidy(seat.access, [], [seat])  # an agent starts all the same
        assert seat.note.exists()
    tidy.tidy(seat.access, [], [seat])
    assert not seat.note.exists()


def test_a_servers_socket_that_cannot_be_removed_stops_no_start(
    machine: Qemu,
    seat: Seat,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    begin(machine, seat).detach()
    add = {"type": "nbd", "id": seat.export, "node_name": "disk", "name": seat.export}
    path = seat.access.nbd_path(machine.socket)
    machine.ask("nbd-server-start", addr={"type": "unix", "data": {"path": path}})
    machine.ask("block-export-add", **add)

    def fail(path: str) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        tidy.tidy(seat.access, [], [seat])
        eventually(lambda: "still left in a QEMU" in caplog.text)
        assert seat.note.exists()
    eventually(lambda: not seat.note.exists())
    assert (machine.bitmaps(), machine.exports()) == ([], [])


def test_a_daemons_socket_that_cannot_be_removed_stops_no_start(
    machine: Qemu, seat: Seat, monkeypatch: pytest.MonkeyPatch
) -> None:
    seat.access.run_dir.mkdir(exist_ok=True)
    left = Path(seat.access.keeper_path("gone-0"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))

    def fail(path: Path, *, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        tidy.tidy(seat.access, [], [])
        assert left.exists()
    tidy.tidy(seat.access, [], [])
    assert not left.exists()


def test_a_daemon_that_nobody_needs_ends_with_the_next_start(machine: Qemu, seat: Seat) -> None:
    """Whether or not a note tells of its volume."""
    machine.quit()
    image = Image(str(machine.image))
    needed, other = (Keeper(replace(seat, name=name), image, "qcow2") for name in ("a-0", "b-0"))
    tidy.tidy(seat.access, {"a-0"}, [])
    assert other._process.wait(qemus.PATIENCE_SECONDS) == 0
    assert needed.is_current
    for keeper in (needed, other):
        keeper.stop()
    image.close()
