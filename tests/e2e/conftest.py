"""Two agents for the tests of one migration after the other, checked after each of them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import devices
from tests.e2e import agents
from tests.e2e.agents import Pair


@contextmanager
def running_pair(directory: Path, *flags: str) -> Iterator[Pair]:
    """Two agents with their pins in a bpffs of their own."""
    devices.require("root", "loop", "bpf")
    pytest.importorskip("native.ebpf", reason="built without clang and libbpf")
    from tests.native.tracking import bpffs

    with bpffs() as pins, ExitStack() as stack:
        both = [
            stack.enter_context(agents.agent(name, directory, pins / name, *flags))
            for name in ("source", "target")
        ]
        yield Pair(*both)


@pytest.fixture(scope="session")
def shared_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with running_pair(tmp_path_factory.mktemp("agents")) as pair:
        yield pair


@pytest.fixture
def pair(shared_pair: Pair, resources: ExitStack) -> Iterator[Pair]:
    """The session's agents. Its migrations end before the test's devices go."""
    yield shared_pair
    shared_pair.tidy()
    shared_pair.assert_clean()


@pytest.fixture
def own_pair(tmp_path: Path, resources: ExitStack) -> Iterator[Pair]:
    """Agents of the test's own, which it may kill."""
    with running_pair(tmp_path) as pair:
        yield pair


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.failed:
        for agent in agents.LIVE:
            tail = agent.log.read_text()[-20_000:]
            report.sections.append((f"log of the {agent.name} agent", tail))
    return report
