"""Fixtures of the trackers' tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.agent.trackers.subject import KINDS, Subject, build


@pytest.fixture
def make_subject(resources: ExitStack, request: pytest.FixtureRequest) -> Callable[[str], Subject]:
    """`make_subject(kind) -> Subject`, its tracker started."""

    def make(kind: str) -> Subject:
        # Not for every kind: mounting a bpffs needs root.
        return build(kind, resources, lambda: Path(request.getfixturevalue("pins")))

    return make


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest, make_subject: Callable[[str], Subject]) -> Subject:
    """Every tracker on every kind of device, one after the other."""
    return make_subject(request.param)


@pytest.fixture
def pins(resources: ExitStack) -> Path:
    """A directory on a bpffs of the test's own."""
    from tests.native.tracking import bpffs

    return resources.enter_context(bpffs())
