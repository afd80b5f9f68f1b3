"""Values on the command line: sizes, rates, durations, volumes, ids.

Owns how text becomes a value; a text that is none is a usage error (exit 2).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click
from warmsync.v1 import migration_pb2

from agent.errors import InvalidArgument
from agent.units import parse_duration, parse_rate, parse_size


class Parsed(click.ParamType):  # type: ignore[type-arg] # generic to new versions only
    """A type made of a function that raises InvalidArgument."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse a text; values that are parsed already (defaults) pass."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except InvalidArgument as error:
            self.fail(str(error), param, ctx)


def parse_volume(text: str) -> migration_pb2.Volume:
    """Return the volume in "SRC:DST", two absolute paths.

    Names below /dev/disk/by-path hold colons themselves, so only a colon before a slash parts.
    """
    places = [match.start() for match in re.finditer(":(?=/)", text)]
    if not text.startswith("/") or len(places) != 1:
        message = f"{text!r} is no volume: write SRC:DST, two absolute paths"
        raise InvalidArgument("INVALID_VOLUME", message, volume=text)
    return migration_pb2.Volume(source=text[: places[0]], target=text[places[0] + 1 :])


def parse_name(text: str) -> str:
    """Return the resource name "migrations/ID" of an id (or of such a name)."""
    name = text.removeprefix("migrations/")
    if not name or "/" in name:
        raise InvalidArgument("INVALID_ID", f"{text!r} is no migration id: see warmsync list")
    return f"migrations/{name}"


SIZE = Parsed("size", parse_size)
RATE = Parsed("rate", parse_rate)
DURATION = Parsed("duration", parse_duration)
VOLUME = Parsed("src:dst", parse_volume)
NAME = Parsed("id", parse_name)
