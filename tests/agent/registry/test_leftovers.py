"""What an earlier agent has left: removed at a start, which nothing of it can stop."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agent.config import AgentConfig
from agent.qemu.access import Access
from agent.qemu.note import Note, write_note
from agent.registry.leftovers import remove_leftovers
from agent.registry.places import places_of
from tests import qemus
from tests.devices import require, run


def test_what_cannot_be_removed_stops_no_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = AgentConfig(state_dir=str(tmp_path / "state"), bpffs_dir=str(tmp_path / "bpf"))
    places = places_of(config)
    stuck, wanted, gone = (places.volumes / name for name in ("a-0.x", "b-0.x", "c-0.x"))
    stuck.mkdir(parents=True)  # which no unlink removes
    digests = places.digests / "d-0.x"
    digests.parent.mkdir()
    for file in (wanted, gone, digests):
        file.touch()
    access = Access((), (), tmp_path / "run", "0123456789ab")
    remove_leftovers(places, access, {"b-0"}, set(), fenced=set())
    assert sorted(places.volumes.iterdir()) == [stuck, wanted]
    assert not digests.exists()
    assert f"left behind path={stuck}" in caplog.text


def test_a_note_stays_until_its_image_is_tidied_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only it tells the next start of an image that a QEMU has left bitmaps in."""
    require("qemu")
    pytest.importorskip("native.nbd", reason="built without libnbd")
    from agent.qemu import tidy
    from agent.qemu.keeper import list_bitmaps

    monkeypatch.setattr(tidy, "_AGAIN_SECONDS", 0.1)
    places = places_of(AgentConfig(state_dir=str(tmp_path), bpffs_dir=str(tmp_path / "bpf")))
    note, image = places.volumes / "web1-0.qemu", tmp_path / "image"
    write_note(note, Note("/no.sock", "disk", "qcow2", str(image)))
    qemus.create(image, 1 << 20, "qcow2")
    access = Access((), (), tmp_path / "run", "0123456789ab")
    ours = f"{access.prefix}web1-0-b1"
    run("qemu-img", "bitmap", "--add", image, ours)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        remove_leftovers(places, access, set(), set(), fenced=set())
        time.sleep(0.5)
        assert note.exists()
    deadline = time.monotonic() + qemus.PATIENCE_SECONDS
    while note.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert list_bitmaps(str(image), "") == []
