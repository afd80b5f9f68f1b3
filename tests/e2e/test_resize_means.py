"""What the target lacks for a resize: said at the start, or in the cutover if it went since."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from tests.agent.resizing.disks import Disk
from tests.agent.resizing.test_refusals import programs
from tests.content import read_all
from tests.e2e import disks
from tests.e2e.agents import Agent, Pair
from tests.e2e.test_resize import Hosts, assert_grown, converge, cut_over, hosts, move

__all__ = ["hosts", "move", "programs"]

OWN_MOUNTS = ("unshare", "--mount", "--propagation", "slave")
"""An agent that runs so sees of the host's programs what a test leaves it."""
Move = Callable[..., tuple[Disk, Disk]]


def hide(agent: Agent, program: str) -> None:
    """Take a program away from a running agent, and from it only."""
    inside = ("nsenter", "--target", str(agent.process.pid), "--mount")
    command = [*inside, "mount", "--bind", "/dev/null", f"/usr/sbin/{program}"]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("kind", "scheme", "program"),
    [("ext4", "gpt", "resize2fs"), ("xfs", "none", "xfs_growfs"), ("ext4", "mbr", "e2fsck")],
)
def test_a_missing_program_is_told_at_the_start(
    hosts: Hosts, move: Move, kind: str, scheme: str, program: str
) -> None:
    source, target = move(kind, scheme)
    pair = Pair(hosts.source, hosts.start("target", command=OWN_MOUNTS))
    hide(pair.target, program)
    before = read_all(target.path)
    words = pair.migrate("--resize", volumes=[(source.path, target.path)])
    refused = pair.source.refuse(*words, reason="GROW_UNAVAILABLE")
    assert f"{program} not installed" in refused.error["message"]
    assert refused.error["values"]["target"] == target.path
    assert disks.is_free(target.path)
    assert read_all(target.path) == before
    assert pair.source.ask("list")["migrations"] == []
    assert pair.target.ask("list")["migrations"] == []
    pair.assert_clean()
    # And without a resize, or room for one, nobody asks for it.
    name = pair.start(volumes=[(source.path, target.path)])
    pair.source.ask("cancel", name)
    pair.tidy()


def test_what_the_host_does_not_allow_is_told_at_the_start(hosts: Hosts, move: Move) -> None:
    source, target = move()
    pair = Pair(hosts.source, hosts.start("target", settings={"resize": {"file_systems": ["xfs"]}}))
    words = pair.migrate("--resize", volumes=[(source.path, target.path)])
    refused = pair.source.refuse(*words, reason="GROW_NOT_ALLOWED")
    assert "resize.file_systems" in refused.error["message"]
    assert disks.is_free(target.path)
    pair.assert_clean()


def test_without_room_nothing_is_asked_for(hosts: Hosts, move: Move) -> None:
    source, target = move(growth=0)
    pair = Pair(hosts.source, hosts.start("target", settings={"resize": {"file_systems": []}}))
    [resize] = cut_over(pair, (source, target))["resizes"]
    assert resize["error"] is None
    disks.assert_equal(source.path, target.path)
    pair.tidy()


def test_a_program_that_goes_meanwhile(hosts: Hosts, move: Move) -> None:
    """The disk is released as it was proved, and why it was not grown is said; others are grown."""
    source, target = move("ext4", "gpt")
    other, larger = move("xfs", "none")
    pair = Pair(hosts.source, hosts.start("target", command=OWN_MOUNTS))
    name = converge(pair, (source, target), (other, larger))
    hide(pair.target, "resize2fs")
    shown = pair.source.ask("cutover", name)
    assert (shown["state"], shown["owner"]) == ("CUT_OVER", "target")
    ungrown, grown = shown["resizes"]
    assert ungrown["error"]["reason"] == "GROW_FAILED"
    assert "resize2fs not installed" in ungrown["error"]["message"]
    assert_grown(grown, larger)
    disks.assert_equal(source.path, target.path)
    assert disks.is_free(target.path)
    assert disks.is_fenced(source.path)
    assert hosts.left() == []
    pair.tidy()
