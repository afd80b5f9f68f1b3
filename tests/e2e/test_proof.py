"""What both agents sign at a cutover is so, and a copy that differs is not handed over."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from warmsync.v1 import migration_service_pb2 as pb
from warmsync.v1.migration_service_pb2_grpc import MigrationServiceStub

from agent.cli import cli
from agent.rpc.errors import from_rpc_error
from tests import content
from tests.content import Disk
from tests.devices import LoopDevice, ScratchedDevice, require
from tests.e2e import agents, disks
from tests.e2e.agents import Agent, Answer, Pair, eventually
from tests.e2e.disks import MIB
from tests.e2e.hosts import Hosts
from tests.native.tracking import bpffs

SIZE = 16 * MIB + 4096
EASY = ("--max-downtime", "20s")
CHUNK = 65536
SMALL = 4 * MIB


@pytest.fixture
def volume(loop_device: Callable[..., LoopDevice]) -> tuple[LoopDevice, LoopDevice]:
    made = loop_device(SIZE), loop_device(SIZE + MIB)
    content.fill(made[0].path, 1)
    disks.soil(made[1].path, 2)
    return made


def fetch(agent: Agent, name: str, file: Path) -> Path:
    """Write the certificate into a file, as an operator does."""
    words = ["certificate", "show", name, "--agent", agent.address]
    result = CliRunner().invoke(cli, words, prog_name="warmsync")
    assert result.exit_code == 0, result.output
    file.write_bytes(result.stdout_bytes)
    return file


def verify(file: Path, *words: object) -> Answer:
    return agents.run("certificate", "verify", str(file), *map(str, words))


def converged(
    pair: Pair, depth: str, *ends: LoopDevice | ScratchedDevice, tracker: str = "ebpf"
) -> str:
    words = ("--tracker", tracker, "--verify", depth, *EASY)
    name = pair.start(*words, volumes=[(ends[0].path, ends[1].path)])
    pair.source.wait(name, "CONVERGED")
    return name


def write(path: str | Path, offset: int, data: bytes = b"written".ljust(4096, b".")) -> None:
    with Disk(path, writable=True) as disk:
        disk.write(offset, data)


def damage(target: LoopDevice, offset: int) -> None:
    """Change a byte below the device, behind everybody's back."""
    with target.backing.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("depth", "tracker"),
    [("none", "ebpf"), ("final", "ebpf"), ("final", "scan"), ("full", "ebpf"), ("full", "scan")],
)
def test_a_certificate_of_each_depth(
    pair: Pair, volume: tuple[LoopDevice, LoopDevice], tmp_path: Path, depth: str, tracker: str
) -> None:
    source, target = volume
    name = converged(pair, depth, source, target, tracker=tracker)
    for agent in (pair.source, pair.target):
        agent.refuse("certificate", "show", name, reason="NO_CERTIFICATE")
    write(source.path, 5 * CHUNK)
    write(source.path, SIZE - 4096)
    pair.source.ask("cutover", name)
    disks.assert_equal(source.path, target.path)
    ours = fetch(pair.source, name, tmp_path / "ours.json")
    theirs = fetch(pair.target, name, tmp_path / "theirs.json")
    assert ours.read_bytes() == theirs.read_bytes()
    plain = verify(ours)
    assert plain.code == 0, plain
    assert plain.shown["all_compared"] is (depth == "full")
    for device in (source, target):
        held = verify(ours, "--device", device.path)
        if depth == "full":
            assert held.code == 0, held
        else:
            assert held.error["reason"] == "NO_ROOTS"
    if depth == "full":
        write(target.path, 7 * CHUNK)  # the VM has booted there
        assert verify(ours, "--device", target.path).error["reason"] == "DEVICE_DIFFERS"
    pair.source.ask("rollback", name)


def test_a_copy_that_was_damaged_before_it_was_read_back_is_not_handed_over(
    pair: Pair, volume: tuple[LoopDevice, LoopDevice], tmp_path: Path
) -> None:
    source, target = volume
    name = converged(pair, "full", source, target)
    damage(target, 9 * CHUNK + 8192)
    write(source.path, 9 * CHUNK)  # so that the chunk is read back once more
    refused = pair.source.refuse("cutover", name, reason="COPIES_DIFFER")
    assert refused.error["values"]["source"] == source.path
    assert not disks.is_fenced(source.path)
    disks.assert_writable(source.path)
    assert not disks.is_free(target.path)
    for agent in (pair.source, pair.target):
        agent.refuse("certificate", "show", name, reason="NO_CERTIFICATE")
    shown = pair.source.wait(name, "CONVERGED")
    assert shown["suspect_volumes"] == 1
    assert shown["reconciled_bytes"] >= SIZE - 2 * CHUNK
    write(source.path, 3 * CHUNK, b"goes on".ljust(4096, b"."))
    pair.source.ask("cutover", name)
    disks.assert_equal(source.path, target.path)
    ours = fetch(pair.source, name, tmp_path / "ours.json")
    assert verify(ours, "--device", target.path).code == 0
    pair.source.ask("rollback", name)


def test_a_copy_that_was_damaged_after_it_was_read_back(
    pair: Pair, volume: tuple[LoopDevice, LoopDevice], tmp_path: Path
) -> None:
    """No proof can know of it that reads a chunk once; whoever reads the device again does."""
    source, target = volume
    name = converged(pair, "full", source, target)
    assert pair.target.show(name)["unproved_bytes"] == 0
    damage(target, 9 * CHUNK + 8192)
    pair.source.ask("cutover", name)
    ours = fetch(pair.source, name, tmp_path / "ours.json")
    assert verify(ours, "--device", source.path).code == 0
    assert verify(ours, "--device", target.path).error["reason"] == "DEVICE_DIFFERS"
    pair.source.ask("rollback", name)


@pytest.fixture
def hosts(tmp_path: Path, resources: ExitStack) -> Iterator[Hosts]:
    require("root", "loop", "bpf")
    with bpffs() as pins, ExitStack() as stack:
        yield Hosts(tmp_path, pins, stack)


@pytest.mark.parametrize("killed", ["source", "target"])
def test_a_death_in_the_middle(
    hosts: Hosts, volume: tuple[LoopDevice, LoopDevice], tmp_path: Path, killed: str
) -> None:
    source, target = volume
    words = ("--verify", "full", "--bandwidth-limit", "16M", *EASY)
    name = hosts.pair.start(*words, volumes=[(source.path, target.path)])
    hosts.source.wait(name, until=lambda now: now["bytes_sent"] > 4 * MIB)
    hosts.end(killed, signal.SIGKILL)
    write(source.path, 0)
    hosts.start(killed)
    hosts.source.wait(name, "CONVERGED")
    write(source.path, 40 * CHUNK)
    hosts.source.ask("cutover", name)
    disks.assert_equal(source.path, target.path)
    ours = fetch(hosts.source, name, tmp_path / "ours.json")
    assert fetch(hosts.target, name, tmp_path / "theirs.json").read_bytes() == ours.read_bytes()
    for device in (source, target):
        assert verify(ours, "--device", device.path).code == 0
    hosts.source.ask("rollback", name)


def test_a_target_killed_between_the_last_flush_and_the_proof(
    hosts: Hosts,
    loop_device: Callable[..., LoopDevice],
    scratched_device: Callable[..., ScratchedDevice],
    tmp_path: Path,
) -> None:
    source, target = loop_device(SMALL), scratched_device(SMALL)
    content.fill(source.path, 1)
    name = converged(hosts.pair, "final", source, target)
    hosts.source.ask("update", name, "--bandwidth-limit", "32K")
    sent = hosts.source.show(name)["bytes_sent"]
    write(source.path, MIB, b"a round that lasts".ljust(MIB, b"."))
    eventually(lambda: hosts.source.show(name), lambda now: now["bytes_sent"] > sent)
    write(source.path, 5 * CHUNK)  # for the last round, as the one before is under way
    rounds = hosts.target.show(name)["rounds"]
    with grpc.insecure_channel(hosts.source.address) as channel:
        stub = MigrationServiceStub(channel)
        with target.held() as waiting:
            request = pb.CutOverMigrationRequest(name=f"migrations/{name}", force=True)
            cutover = stub.CutOverMigration.future(request)
            stub.GetMigration(pb.GetMigrationRequest(name=f"migrations/{name}"))  # it is heard
            hosts.source.ask("update", name, "--bandwidth-limit", "0")
            # With `final` nothing is read there but for the proof.
            eventually(waiting.exists, bool)
            assert hosts.target.show(name)["rounds"] == rounds + 2
            assert hosts.source.show(name)["state"] == "CUTTING_OVER"
            hosts.target.process.send_signal(signal.SIGKILL)  # it dies once its read has ended
        hosts.end("target", signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as caught:
            cutover.result(agents.SECONDS)
    assert from_rpc_error(caught.value).reason == "PEER_UNREACHABLE"
    assert hosts.source.show(name)["owner"] == "source"
    hosts.start("target")
    hosts.source.wait(name, "CONVERGED")
    assert not disks.is_fenced(source.path)
    for agent in (hosts.source, hosts.target):
        agent.refuse("certificate", "show", name, reason="NO_CERTIFICATE")
    write(source.path, 7 * CHUNK)
    hosts.source.ask("cutover", name)
    disks.assert_equal(source.path, target.path)
    ours = fetch(hosts.source, name, tmp_path / "ours.json")
    assert fetch(hosts.target, name, tmp_path / "theirs.json").read_bytes() == ours.read_bytes()
    assert verify(ours).code == 0
    hosts.source.ask("rollback", name)


def test_a_bad_chunk_of_the_target_waits_for_the_cutover(
    pair: Pair,
    loop_device: Callable[..., LoopDevice],
    scratched_device: Callable[..., ScratchedDevice],
) -> None:
    source, target = loop_device(SMALL), scratched_device(SMALL)
    content.fill(source.path, 1)
    bad = 9 * CHUNK
    target.scratch((bad + 4096, 1))
    name = converged(pair, "full", source, target)
    # All others are read back in the background.
    eventually(lambda: pair.target.show(name), lambda now: now["unproved_bytes"] == CHUNK)
    cutover = pair.source.start("cutover", name)
    shown = pair.source.wait(name, "PAUSED")
    assert shown["last_refusal"]["reason"] == "TARGET_IO_ERROR"
    cutover.communicate(timeout=agents.SECONDS)
    assert cutover.returncode == 1
    assert not disks.is_fenced(source.path)
    pair.source.refuse("certificate", "show", name, reason="NO_CERTIFICATE")
    target.scratch()
    pair.source.ask("resume", name)
    pair.source.wait(name, "CONVERGED")
    pair.source.ask("cutover", name)
    disks.assert_equal(source.path, target.path)
    pair.source.ask("rollback", name)
