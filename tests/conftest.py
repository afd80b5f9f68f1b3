"""Fixtures that all tests share: factories of devices, destroyed after each test."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest
from hypothesis import settings

from tests import devices, host
from tests.devices import FaultyDevice, LoopDevice, ScratchedDevice

# No deadline: a test must not fail because the machine is busy. Hangs end with pytest's timeout.
settings.register_profile("full", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=15)
settings.load_profile(os.environ.get("WARMSYNC_HYPOTHESIS", "full"))

P = ParamSpec("P")
T = TypeVar("T")


CLONE_NEWNS = 0x20000


def pytest_configure() -> None:
    # A shell that starts us in the background has us, and all that we start, ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.geteuid() == 0 and "PYTEST_XDIST_WORKER" not in os.environ:
        _share_mounts()


def _share_mounts() -> None:
    """Let what one worker unmounts go from the namespaces that others have made, too.

    Where `/` is private, as without systemd, it would stay mounted in them. In a namespace of this
    session, which its workers inherit: how the host propagates mounts is not ours to change.
    """
    if ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0:
        for how in ("--make-rslave", "--make-rshared"):
            subprocess.run(["mount", how, "/"], check=True)


def pytest_report_header() -> str:
    return host.report()


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    """What a test enters here is torn down after it, last first, whatever happens."""
    with ExitStack() as stack:
        yield stack


def _factory(stack: ExitStack, make: Callable[P, AbstractContextManager[T]]) -> Callable[P, T]:
    def build(*args: P.args, **kwargs: P.kwargs) -> T:
        return stack.enter_context(make(*args, **kwargs))

    return build


@pytest.fixture
def loop_device(resources: ExitStack) -> Callable[..., LoopDevice]:
    """`loop_device(size_bytes, sector_size=512, partitions=False) -> LoopDevice`."""
    return _factory(resources, devices.loop_device)


@pytest.fixture
def zram_device(resources: ExitStack) -> Callable[[int], str]:
    """`zram_device(size_bytes) -> path`."""
    return _factory(resources, devices.zram_device)


@pytest.fixture
def image_file(resources: ExitStack) -> Callable[..., Path]:
    """`image_file(size_bytes, data=None) -> Path` of a sparse file of any size."""
    return _factory(resources, devices.image_file)


@pytest.fixture
def faulty_device(resources: ExitStack) -> Callable[..., FaultyDevice]:
    """`faulty_device(size_bytes, sector_size=512)`: EIO within `with device.failing(...)`."""
    return _factory(resources, devices.faulty_device)


@pytest.fixture
def scratched_device(resources: ExitStack) -> Callable[..., ScratchedDevice]:
    """`scratched_device(size_bytes, sector_size=512)`: bad places by `device.scratch(...)`."""
    return _factory(resources, devices.scratched_device)


@pytest.fixture
def bare_directory(resources: ExitStack) -> Path:
    """A directory on a file system without direct I/O, holes and zeroing."""
    return resources.enter_context(devices.bare_directory())


@pytest.fixture
def mounted(resources: ExitStack) -> Callable[..., Path]:
    """`mounted(device, kind="ext4") -> Path` of a mounted new file system."""
    return _factory(resources, devices.mounted)
