"""Spoils JSON where it stays JSON: bytes changed at random mostly end at the parser. Pure."""

from __future__ import annotations

import json
import random
from typing import Any

WORDS: list[Any] = [None, True, 0, -1, 1 << 63, 10**400, 1.5, float("inf"), float("nan")]
WORDS += ["", "\0", "\ud800", "x", [], {}, [[]], [0, 0, 0]]

_RAW = "@"
RAW = (b"[" * 2000, b"1" * 5000, b"\xff", b"\0", b"NaN", b"-0", b"1e999", b'{"a":1,"a":2}', b"")
"""What stands in the place of a value without being one that `json.dumps` writes."""


def spoil(data: bytes, chance: random.Random) -> bytes:
    """Return JSON with a value in another's place, under another name, gone or twice.

    ValueError for what is no JSON, or has nothing in it.
    """
    try:
        values = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    places = _places(values)
    if not places:
        raise ValueError("nothing to spoil")
    inside, key = chance.choice(places)
    others = [place[name] for place, name in places if not isinstance(place[name], dict | list)]
    match chance.randrange(5):
        case 0:
            inside[key] = chance.choice(WORDS)
        case 1:
            inside[key] = chance.choice(others or WORDS)
        case 2:
            del inside[key]
        case 3:
            inside[key] = _RAW
        case _ if isinstance(inside, list):
            inside.insert(key, inside[key])
        case _:
            inside[chance.choice(("", "reason", "\ud800", key[::-1]))] = inside[key]
    spoilt = json.dumps(values, separators=(",", ":")).encode()
    return spoilt.replace(json.dumps(_RAW).encode(), chance.choice(RAW))


def _places(values: Any) -> list[tuple[Any, Any]]:
    """Return each value in it by what holds it and its name there. No recursion: it may be deep."""
    found: list[tuple[Any, Any]] = []
    left = [values]
    while left:
        inside = left.pop()
        if isinstance(inside, dict | list):
            keys = list(inside) if isinstance(inside, dict) else range(len(inside))
            found += [(inside, key) for key in keys]
            left += [inside[key] for key in keys]
    return found
