"""Fuzzes the reader of certificates: strangers hand them to whoever wants to know.

WARMSYNC_FUZZ_SECONDS says for how long bytes are spoilt. A failure names its input.
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.certificate import Certificate, dump, load, verify
from agent.errors import InvalidArgument, WarmsyncError
from agent.migration import Depth, Role
from agent.statement import canonical
from tests.agent.certificates import certificate, signer

SECONDS = int(os.environ.get("WARMSYNC_FUZZ_SECONDS", "15"))
KEYS = {role: signer(role).fingerprint for role in Role}
WHOLE = {depth: certificate(depth) for depth in Depth}
SEEDS = [dump(made) for made in WHOLE.values()]
WORDS = [b'"', b"\\u0000", b"\\ud800", b"null", b"true", b"[", b"]", b"{", b"}", b":", b","]
WORDS += [b"NaN", b"-Infinity", b"1e999", b"-0", b"9" * 20, b"\xff", b"\xc3", b"\0", b"=", b"A"]
WORDS += [b'"full"', b'"final"', b'"none"', b'"source"', b'"target"', b'"format_version": 1,']
WORDS += [b"[" * 2000, b"1" * 5000, b"\xef\xbb\xbf", b" ", b"\n"]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


def survive(data: bytes) -> Certificate | None:
    """Load and verify; only what says the same as one of WHOLE may hold."""
    try:
        found = load(data)
    except InvalidArgument as error:
        if error.reason != "BAD_CUTOVER_CERTIFICATE" or not str(error).isprintable():
            raise
        return None
    assert load(dump(found)) == found
    assert canonical(found.statement)
    try:
        verify(found, KEYS)
    except WarmsyncError:
        return None
    assert found.statement in [whole.statement for whole in WHOLE.values()], "it was forged"
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_the_seeds_hold(seed: bytes) -> None:
    assert survive(seed) is not None


@given(data=st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_file_is_survived(data: bytes) -> None:
    assert survive(data) is None


@settings(max_examples=400)
@given(
    depth=st.sampled_from(Depth),
    path=st.lists(st.integers(0, 50), min_size=1, max_size=5),
    value=JSON,
    name=st.none() | st.text(max_size=3),
)
def test_a_spoilt_value_is_survived(
    depth: Depth, path: list[int], value: object, name: str | None
) -> None:
    """Put any value in any place, in place of what is there or under another name."""
    values: Any = json.loads(dump(WHOLE[depth]))
    place, last = values, path[-1]
    for step in path[:-1]:
        inner = place[_key(place, step)]
        if not isinstance(inner, dict | list) or not inner:
            break
        place = inner
    if isinstance(place, dict) and name is not None:
        place[name] = value
    else:
        place[_key(place, last)] = value
    survive(json.dumps(values).encode())


def _key(place: dict[str, Any] | list[Any], step: int) -> Any:
    keys = list(place) if isinstance(place, dict) else range(len(place))
    return keys[step % len(keys)]


def spoilt(chance: random.Random) -> bytes:
    """Return a seed with a few of its bytes changed, lost, doubled or in another's place."""
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice([0, 1, 1, 2, 8, 100]))
        piece = chance.choice(
            [
                chance.randbytes(end - at),
                chance.choice(WORDS),
                bytes(data[at:end]) * 2,
                b"",
                bytes([data[at % len(data)] ^ 1 << chance.randrange(8)]) if data else b"",
            ]
        )
        data[at:end] = piece
    return bytes(data)


def test_spoilt_bytes_are_survived() -> None:
    chance, count, loaded = random.Random(), 0, 0
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        data = spoilt(chance)
        try:
            loaded += survive(data) is not None
        except BaseException:
            print(f"after {count} inputs: {data!r}")
            raise
        count += 1
    print(f"{count} inputs, {loaded} of them still held")
    assert count
