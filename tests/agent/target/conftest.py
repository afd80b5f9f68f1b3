"""Fixtures: images that differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.agent.carriers.rig import image


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return image(tmp_path, "source.img", seed=1)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return image(tmp_path, "target.img", seed=2)
