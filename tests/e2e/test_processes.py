"""Agents that stop or die in the middle: the source is whole, the target released, no pin left."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import content
from tests.devices import LoopDevice
from tests.e2e import agents, disks
from tests.e2e.agents import Agent, Pair, eventually
from tests.e2e.disks import MIB

SIZE = 32 * MIB
LOST = ("AGENT_STOPPED", "PEER_LOST", "PEER_UNREACHABLE")
"""What a lost target looks like: it depends on what the network answers first."""
MIDDLES = {"SEEDING": ("--bandwidth-limit", "2M"), "SYNCING": ("--max-downtime", "1ms")}


@pytest.fixture
def volume(loop_device: Callable[..., LoopDevice], own_pair: Pair) -> tuple[str, str]:
    source, target = loop_device(SIZE).path, loop_device(SIZE).path
    content.fill(source, 1)
    disks.soil(target, 2)
    return source, target


@pytest.fixture(params=MIDDLES)
def name(request: pytest.FixtureRequest, own_pair: Pair, volume: tuple[str, str]) -> str:
    """A migration in the middle."""
    tracker = ("--tracker", "ebpf")
    name = own_pair.start(*tracker, *MIDDLES[request.param], volumes=[volume])
    own_pair.source.wait(name, request.param)
    assert own_pair.source.pinned() != []
    return name


def assert_source_whole(agent: Agent, path: str) -> None:
    assert not disks.is_fenced(path)
    disks.assert_writable(path)
    assert agent.pinned() == []


def test_the_source_agent_is_stopped(own_pair: Pair, volume: tuple[str, str], name: str) -> None:
    assert own_pair.source.stop() == 0
    assert_source_whole(own_pair.source, volume[0])
    there = own_pair.target.show(name)
    assert (there["state"], there["incomplete"]) == ("FAILED", True)
    assert there["error"]["reason"] == "SOURCE_FAILED"
    assert own_pair.target.held() == []
    assert disks.is_free(volume[1])


def test_the_target_agent_is_stopped(own_pair: Pair, volume: tuple[str, str], name: str) -> None:
    assert own_pair.target.stop() == 0
    eventually(lambda: own_pair.source.show(name), lambda shown: shown["state"] == "FAILED")
    assert own_pair.source.show(name)["error"]["reason"] in LOST
    eventually(own_pair.source.held, lambda held: not held)
    assert_source_whole(own_pair.source, volume[0])
    assert disks.is_free(volume[1])


def test_the_source_agent_is_killed(
    own_pair: Pair, volume: tuple[str, str], name: str, tmp_path: Path
) -> None:
    dead = own_pair.source
    dead.ends_well = False
    assert dead.stop(signal.SIGKILL) == -signal.SIGKILL
    assert dead.pinned() != []  # the kernel goes on marking
    eventually(lambda: own_pair.target.show(name), lambda shown: shown["state"] == "FAILED")
    there = own_pair.target.show(name)
    assert (there["error"]["reason"], there["incomplete"]) == ("SOURCE_LOST", True)
    assert disks.is_free(volume[1])
    with agents.agent("source", tmp_path, dead.pins) as again:
        assert_source_whole(again, volume[0])
        assert "removed a tracker" in again.log.read_text()
        assert again.ask("list")["migrations"] == []


def test_the_target_agent_is_killed(own_pair: Pair, volume: tuple[str, str], name: str) -> None:
    own_pair.target.ends_well = False
    own_pair.target.stop(signal.SIGKILL)
    eventually(lambda: own_pair.source.show(name), lambda shown: shown["state"] == "FAILED")
    assert own_pair.source.show(name)["error"]["reason"] in LOST
    eventually(own_pair.source.held, lambda held: not held)
    assert_source_whole(own_pair.source, volume[0])
    assert disks.is_free(volume[1])


def test_a_fence_outlives_its_agent(own_pair: Pair, volume: tuple[str, str]) -> None:
    name = own_pair.start("--max-downtime", "20s", volumes=[volume])
    own_pair.source.wait(name, "CONVERGED")
    own_pair.source.ask("cutover", name)
    assert own_pair.source.stop() == 0
    assert own_pair.target.stop() == 0
    assert disks.is_fenced(volume[0])
    assert disks.is_free(volume[1])
    disks.assert_equal(*volume)
