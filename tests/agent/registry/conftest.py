"""What the tests of all migrations of one agent share."""

from __future__ import annotations

import pytest

from agent.registry import ended as ended_module
from agent.registry import waiting as waiting_module


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon."""
    monkeypatch.setattr(waiting_module, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(ended_module, "RETRY_SECONDS", 0.05)
