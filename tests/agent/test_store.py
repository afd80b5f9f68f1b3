"""Files of the state directory: made, taken up, removed, and only one's own."""

from __future__ import annotations

from pathlib import Path

from agent.store import Store


def test_only_its_own_files_are_removed(tmp_path: Path) -> None:
    """An id may begin like another: web1-0 is volume 0 of web1, and may be a migration's id too."""
    one, other = Store(tmp_path, "web1-0"), Store(tmp_path, "web1-0.x-0")
    for store in (one, other):
        store.make("pending", 4096)
    one.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["web1-0.x-0.pending"]
    other.open("pending", 4096).close()
