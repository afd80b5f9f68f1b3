"""What the tests of a source share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.ends import Source, source


@pytest.fixture
def end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """The source's end of a migration of two volumes."""
    with source(tmp_path, monkeypatch, volumes=2) as made:
        yield made
