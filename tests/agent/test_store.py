"""Files of the state directory: made, taken up, removed, and only one's own."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from agent.errors import NotAllowed, ResourceExhausted, WarmsyncError
from agent.store import Store


def test_only_its_own_files_are_removed(tmp_path: Path) -> None:
    """An id may begin like another: web1-0 is volume 0 of web1, and may be a migration's id too."""
    one, other = Store(tmp_path, "web1-0"), Store(tmp_path, "web1-0.x-0")
    for store in (one, other):
        store.make("pending", 4096)
    one.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["web1-0.x-0.pending"]
    other.open("pending", 4096).close()


@pytest.mark.parametrize(
    ("number", "kind", "reason"),
    [
        (errno.ENOSPC, ResourceExhausted, "STATE_DIR_FULL"),
        (errno.EROFS, NotAllowed, "STATE_DIR_UNUSABLE"),
    ],
)
@pytest.mark.parametrize("failing", ["pathlib.Path.mkdir", "pathlib.Path.open", "mmap.mmap"])
def test_what_cannot_be_made_is_told_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    *,
    number: int,
    kind: type[WarmsyncError],
    reason: str,
) -> None:
    def fail(*args: object, **named: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(failing, fail)
    with pytest.raises(kind) as caught:
        Store(tmp_path, "web1-0").make("pending", 4096)
    assert caught.value.reason == reason
    assert list(tmp_path.iterdir()) == []
