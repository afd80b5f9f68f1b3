"""Fixtures of the carriers' tests."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.agent.carriers.rig import CARRIERS, Rig, image, rig

MakeRig: TypeAlias = "Callable[..., AbstractAsyncContextManager[Rig]]"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An image file with content."""
    return image(tmp_path, "source.img", seed=1)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An image file of the same size, all zeros."""
    return image(tmp_path, "target.img")


@pytest.fixture(params=CARRIERS)
def make_rig(request: pytest.FixtureRequest, tmp_path: Path, target: Path) -> MakeRig:
    """`make_rig(*targets) -> Rig`, for each carrier; without arguments `target` is the target."""

    def make(*targets: Path) -> AbstractAsyncContextManager[Rig]:
        return rig(request.param, tmp_path, list(targets) or [target])

    return make


@pytest.fixture
def make_grpc_rig(tmp_path: Path, target: Path) -> MakeRig:
    """The same for the grpc carrier alone: for tests that reach into its Python."""

    def make(*targets: Path) -> AbstractAsyncContextManager[Rig]:
        return rig("grpc", tmp_path, list(targets) or [target])

    return make


@pytest.fixture(autouse=True)
def no_error_is_dropped(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio logs an error that nobody asked for, when it is collected: the operator's noise."""
    yield
    gc.collect()
    assert [r.getMessage() for r in caplog.records if "never retrieved" in r.getMessage()] == []
