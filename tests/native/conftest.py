"""Fixtures of the eBPF tracker's tests, and how hard the property tests of the kernels try.

WARMSYNC_HYPOTHESIS=quick asks for fewer examples: the sanitizer run sets it, as every one of them
costs several times as much there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.native.tracking import Tracked


@pytest.fixture
def pins(resources: ExitStack) -> Path:
    """A directory on a bpffs of the test's own."""
    # Not at the top: this extension is built only where clang and libbpf are installed.
    pytest.importorskip("native.ebpf", reason="built without clang and libbpf")
    from tests.native import tracking

    return resources.enter_context(tracking.bpffs())


@pytest.fixture
def track(pins: Path, resources: ExitStack) -> Callable[..., Tracked]:
    """`track(path, block=4096) -> Tracked`: a tracker on a device, destroyed after the test."""
    from tests.native.tracking import Tracked

    numbers = count()

    def build(path: str, block: int = 4096) -> Tracked:
        tracked = Tracked(path, pins / f"volume{next(numbers)}", block)
        resources.callback(tracked.kernel.destroy)
        return tracked

    return build
