"""Fuzzes what strangers can send, for a while: the frame decoder, the greeting, the journal.

WARMSYNC_FUZZ_SECONDS says for how long each. A crash names its input: it belongs into the seeds.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import journal as journal_module
from agent.errors import WarmsyncError
from agent.journal import Journal
from agent.migration import Plan, Progress, Role, Scheme, Volume
from agent.record import SourceRecord, TargetRecord, dump, load_source, load_target
from agent.state import Entry, State

ROOT = Path(__file__).parents[1]
SECONDS = int(os.environ.get("WARMSYNC_FUZZ_SECONDS", "15"))
FRAME = ["frame_impl", "frame_check", "blockio_impl", "blockio_zero", "chunk_impl"]
FRAME += ["chunk_portable", "chunk_avx2", "chunk_avx512"]
STREAM = [f"stream_{part}" for part in ("conn", "tls", "token", "pace")]
FUZZERS = {"frame_fuzz": FRAME, "greeting_fuzz": STREAM}
LIBRARIES = ["-lssl", "-lcrypto", "-lpthread"]


def seeds(name: str, directory: Path) -> None:
    """Write what is right, so that the fuzzer begins behind the first checks."""
    if name == "frame_fuzz":
        for mend in (0, 1):
            head = struct.pack("<4sHHIIQQIIQ", b"WSF1", 1, 1, 0, 2, 1, 1, 4096, 0, 0)
            table = struct.pack("<QQII", 0, 4096, 1, 0) + struct.pack("<QQII", 8192, 65536, 2, 0)
            rest = table + bytes(range(256)) * 16
            digest = xxhash.xxh3_128_digest(head + bytes(16) + rest)
            (directory / f"frame{mend}").write_bytes(bytes([mend]) + head + digest + rest)
    else:
        (directory / "clear").write_bytes(b"\0WSH1" + struct.pack("<I", 1) + bytes(48))
        (directory / "tls").write_bytes(bytes.fromhex("01160301002c0100002803034242"))


@pytest.mark.parametrize("name", FUZZERS)
def test_strangers_are_survived(name: str, tmp_path: Path) -> None:
    if shutil.which("clang") is None:
        pytest.skip("no clang installed")
    program = tmp_path / name
    sources = [str(ROOT / f"native/{one}.c") for one in FUZZERS[name]]
    command = ["clang", "-g", "-O1", "-fsanitize=fuzzer,address,undefined", "-D_GNU_SOURCE"]
    command += ["-fno-sanitize-recover=undefined", "-I", str(ROOT / "native")]
    command += [str(ROOT / f"tests/fuzz/{name}.c"), *sources, "-o", str(program), *LIBRARIES]
    built = subprocess.run(command, capture_output=True, text=True)
    if "fuzzer" in built.stderr and "cannot find" in built.stderr:
        pytest.skip("clang without libFuzzer (libclang-rt-dev)")
    assert built.returncode == 0, built.stderr
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    seeds(name, corpus)
    done = subprocess.run(
        [str(program), str(corpus), f"-max_total_time={SECONDS}", "-max_len=16384", "-timeout=10"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "cov:" in done.stderr


def records() -> list[dict[str, object]]:
    plan = Plan("web1", "peer:1", (Volume("/dev/a", "/dev/b", 1 << 20, 4096),))
    history = (Entry(State.PENDING, 1.0), Entry(State.SEEDING, 2.0))
    error = WarmsyncError("INTERNAL", "gone", path="/dev/a")
    source = SourceRecord(
        plan=plan,
        scheme=Scheme.EBPF,
        scheme_reason="",
        secret="secret",
        epoch=3,
        boot_id="boot",
        devices=((7, 0, 9),),
        history=history,
        generation=2,
        progress=Progress(),
        error=error,
    )
    target = TargetRecord(plan, "secret", 3, history, 2, Progress(), error)
    return [dump(source), dump(target)]


def test_what_is_written_down_is_read_again() -> None:
    for values, load in zip(records(), (load_source, load_target), strict=True):
        read = json.loads(json.dumps(values))
        again = dump(cast(Callable[..., SourceRecord], load)(read))
        assert json.loads(json.dumps(again)) == read


@settings(max_examples=300)
@given(
    which=st.integers(0, 1),
    path=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    value=st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
)
def test_a_spoilt_record_is_a_value_error(which: int, path: list[int], value: object) -> None:
    """Whatever stands in it: read, or refused as a whole, and never another exception."""
    values = json.loads(json.dumps(records()[which]))
    place = values
    for step in path:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = keys[step % len(keys)]
        if not isinstance(place[key], dict | list):
            break
        place = place[key]
    if isinstance(place, dict) and place:
        place[list(place)[path[-1] % len(place)]] = value
    with suppress(ValueError):
        (load_source if which == 0 else load_target)(values)


@settings(max_examples=60, deadline=None)
@given(at=st.integers(0, 1 << 16), data=st.binary(min_size=1, max_size=64))
def test_a_spoilt_journal_is_put_aside_or_read(
    tmp_path_factory: pytest.TempPathFactory, at: int, data: bytes
) -> None:
    directory = tmp_path_factory.mktemp("journal")
    journal = Journal(directory)
    for number, values in enumerate(records() * 8):
        journal.save(Role.SOURCE, f"m{number}", values)
    journal.close()
    path = directory / journal_module.NAME
    whole = path.read_bytes()
    at %= len(whole)
    path.write_bytes(whole[:at] + data + whole[at + len(data) :])
    try:
        again = Journal(directory)
    except WarmsyncError:
        return  # said in a line
    try:
        for _, _, values in again.load():
            assert isinstance(values, dict)
        again.save(Role.TARGET, "new", {"a": 1})
    except sqlite3.DatabaseError as error:
        pytest.fail(f"found too late: {error}")
    finally:
        again.close()
