"""Two agents over each kind of connection: mutual TLS, unix sockets; and who is turned away."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from tests import content
from tests.devices import LoopDevice, require
from tests.e2e import disks
from tests.e2e.agents import Agent, Pair, agent
from tests.e2e.disks import MIB

SIZE = 16 * MIB
EASY = ("--max-downtime", "20s", "--wait", "converged")


@pytest.fixture
def volume(loop_device: Callable[..., LoopDevice]) -> tuple[str, str]:
    source, target = loop_device(SIZE).path, loop_device(SIZE).path
    content.fill(source, 1)
    disks.soil(target, 2)
    return source, target


@pytest.fixture
def start(tmp_path: Path, resources: ExitStack) -> Callable[..., Agent]:
    """`start(name, *flags, listen=..., client=...)`: an agent until the end of the test."""
    require("root", "loop")

    def run(name: str, *flags: str, **options: object) -> Agent:
        pins = tmp_path / f"{name}-pins"
        made = agent(name, tmp_path, pins, *flags, **options)  # type: ignore[arg-type]
        return resources.enter_context(made)

    return run


class Authority:
    """A certificate authority; `flags(name)` are the files of an agent or client it signed."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self._ca = trustme.CA()
        self._ca.cert_pem.write_to_path(directory / "ca.pem")

    def flags(self, name: str) -> tuple[str, ...]:
        paths = {kind: self.directory / f"{name}-{kind}.pem" for kind in ("cert", "key")}
        issued = self._ca.issue_cert("localhost", "127.0.0.1", "127.0.0.2")
        issued.cert_chain_pems[0].write_to_path(paths["cert"])
        issued.private_key_pem.write_to_path(paths["key"])
        given = [word for kind, path in paths.items() for word in (f"--tls-{kind}", str(path))]
        return (*given, "--tls-ca", str(self.directory / "ca.pem"))


def move(pair: Pair, volume: tuple[str, str]) -> None:
    """One migration, from the start to the end."""
    words = pair.migrate("--tracker", "scan", *EASY, volumes=[volume])
    name = pair.source.ask(*words)["id"]
    assert pair.source.ask("cutover", name)["state"] == "CUT_OVER"
    disks.assert_equal(*volume)
    assert pair.source.ask("verify", name)["equal"] is True
    assert pair.source.ask("rollback", name)["state"] == "ROLLED_BACK"
    assert pair.target.show(name)["state"] == "ROLLED_BACK"
    pair.assert_clean()


def test_mutual_tls(start: Callable[..., Agent], volume: tuple[str, str], tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ours")
    pair = Pair(
        *(start(name, *authority.flags(name), client=authority.flags("client")) for name in "ab")
    )
    assert "with mutual TLS" in pair.source.announced
    move(pair, volume)


def test_another_authoritys_agents_are_turned_away(
    start: Callable[..., Agent], volume: tuple[str, str], tmp_path: Path
) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    source = start("a", *ours.flags("a"), client=ours.flags("client"))
    target = start("b", *theirs.flags("b"), client=theirs.flags("client"))
    plain = start("c")
    for peer in (target, plain):
        answer = source.refuse(
            *Pair(source, peer).migrate(volumes=[volume]), reason="TLS_HANDSHAKE_FAILED"
        )
        assert "certificates of the same authority" in answer.error["message"]
        assert peer.address in answer.error["message"]
        assert source.ask("list")["migrations"] == peer.ask("list")["migrations"] == []
        assert source.held() == peer.held() == []


def test_clients_without_the_right_certificate_are_turned_away(
    start: Callable[..., Agent], tmp_path: Path
) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    served = start("a", *ours.flags("a"), client=ours.flags("client"))
    replace(served, flags=theirs.flags("client")).refuse("list", reason="TLS_HANDSHAKE_FAILED")
    answer = replace(served, flags=()).refuse("list", reason="PEER_UNREACHABLE")
    assert "if it uses TLS" in answer.error["message"]
    assert served.ask("list")["migrations"] == []


def test_unix_sockets(start: Callable[..., Agent], volume: tuple[str, str]) -> None:
    with short_directory() as directory:
        pair = Pair(*(start(name, listen=f"unix:{directory}/{name}") for name in "ab"))
        assert pair.source.address == f"unix:{directory}/a"
        assert (directory / "a").stat().st_mode & 0o777 == 0o600
        move(pair, volume)


@contextmanager
def short_directory() -> Iterator[Path]:
    """A socket's path has room for 107 bytes; pytest's directories have long names."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ws-") as name:
        os.chmod(name, 0o700)
        yield Path(name)
