"""Machines for the tests, and what their guests said in the report of a test that failed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests import devices
from tests.e2e import agents
from tests.e2e.hosts import Hosts
from tests.native.tracking import bpffs
from tests.vm import guest, initramfs
from tests.vm.initramfs import Boot
from tests.vm.machine import Machine, Plan, machine


@pytest.fixture(scope="session")
def boot_files(tmp_path_factory: pytest.TempPathFactory) -> Boot:
    devices.require("guests")
    return initramfs.build(tmp_path_factory.mktemp("initramfs"))


@pytest.fixture
def hosts(tmp_path: Path, machines: Callable[..., Machine]) -> Iterator[Hosts]:
    """The agents of both hosts. They end before the machines' disks go."""
    devices.require("bpf")
    with bpffs() as pins, ExitStack() as stack:
        yield Hosts(tmp_path, pins, stack)


@pytest.fixture
def machines(tmp_path: Path, boot_files: Boot) -> Iterator[Callable[..., Machine]]:
    """`machines(name, plan) -> Machine`; all that still run are ended after the test."""
    with ExitStack() as stack:
        stack.callback(guest.LIVE.clear)

        def make(name: str = "vm", plan: Plan | None = None) -> Machine:
            return machine(name, plan or Plan(), boot_files, tmp_path, stack)

        yield make


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        for agent in agents.LIVE:
            tail = agent.log.read_text()[-20_000:]
            report.sections.append((f"log of the {agent.name} agent", tail))
        for each in guest.LIVE:
            report.sections.append((f"guest {each.name}", each.logs()))
    return report
