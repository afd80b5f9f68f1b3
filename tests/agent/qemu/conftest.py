"""Fixtures: QEMUs and storage daemons of a test's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import devices, qemus
from tests.qemus import Qemu

SIZE = 8 << 20


@pytest.fixture
def directory(resources: ExitStack) -> Path:
    """Where paths are short enough for sockets."""
    devices.require("qemu")
    pytest.importorskip("native.nbd", reason="built without libnbd")
    return resources.enter_context(devices.scratch_directory())


@pytest.fixture
def make_disk(resources: ExitStack, directory: Path) -> Callable[..., Qemu]:
    """`make_disk(name="vm", driver="qcow2") -> Qemu`, not yet started."""

    def make(name: str = "vm", driver: str = "qcow2") -> Qemu:
        return resources.enter_context(qemus.disk(directory / name, SIZE, driver))

    return make


@pytest.fixture
def machine(make_disk: Callable[..., Qemu]) -> Qemu:
    """A QEMU with nothing but its disk, stopped."""
    devices.require("qemu-system")
    qemu = make_disk()
    qemu.start_machine("-S")
    return qemu
