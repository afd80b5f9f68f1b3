"""Which carrier two agents agree on, and what they say of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import disks
from tests.e2e.agents import Agent, Pair
from tests.e2e.test_transport import EASY, Authority, short_directory, start, volume

__all__ = ["start", "volume"]


def moved(pair: Pair, volume: tuple[str, str], *words: str) -> dict[str, str]:
    """Move a disk, compare it, and return what `show` said of it."""
    shown = pair.source.ask(*pair.migrate("--tracker", "scan", *EASY, *words, volumes=[volume]))
    assert pair.source.ask("cutover", shown["id"])["state"] == "CUT_OVER"
    disks.assert_equal(*volume)
    pair.source.ask("rollback", shown["id"])
    return shown


@pytest.mark.parametrize("carrier", ["auto", "tcp", "grpc"])
def test_as_asked_for(pair: Pair, volume: tuple[str, str], carrier: str) -> None:
    shown = moved(pair, volume, "--carrier", carrier)
    if carrier == "grpc":
        assert (shown["carrier"], shown["carrier_detail"]) == ("grpc", "as asked for")
    else:
        assert shown["carrier"] == "tcp"
        assert shown["carrier_detail"] == "4 connections, in the clear"


def test_compressed(pair: Pair, volume: tuple[str, str]) -> None:
    assert moved(pair, volume, "--compression", "zstd")["compression"] == "zstd"


def test_data_connections_are_encrypted_where_calls_are(
    start: Callable[..., Agent], volume: tuple[str, str], tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "ours")
    agents = (start(n, *authority.flags(n), client=authority.flags("client")) for n in "ab")
    shown = moved(Pair(*agents), volume)
    assert shown["carrier_detail"].startswith("4 connections, TLSv1.3 TLS_AES_128_GCM_SHA256")


def test_without_a_data_port(start: Callable[..., Agent], volume: tuple[str, str]) -> None:
    """auto falls back and says why; tcp fails and says the same."""
    with short_directory() as directory:
        pair = Pair(*(start(name, listen=f"unix:{directory}/{name}") for name in "ab"))
        shown = moved(pair, volume)
        assert shown["carrier"] == "grpc"
        assert shown["carrier_detail"].startswith("CARRIER_UNAVAILABLE: the target takes no data")
        words = pair.migrate("--tracker", "scan", "--carrier", "tcp", volumes=[volume])
        name = pair.source.ask(*words)["id"]
        failed = pair.source.wait(name, until=lambda now: now["state"] == "FAILED")
        assert failed["error"]["reason"] == "CARRIER_UNAVAILABLE"


def test_grpc_does_not_compress(pair: Pair, volume: tuple[str, str]) -> None:
    words = pair.migrate("--carrier", "grpc", "--compression", "zstd", volumes=[volume])
    pair.source.refuse(*words, reason="COMPRESSION_UNAVAILABLE")
