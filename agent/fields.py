"""Fields of a cutover certificate as JSON gives them: typed and bounded, or one error. Pure.

Owns how a value is refused: BAD_CUTOVER_CERTIFICATE, naming the field. What is read was made by
strangers: nothing here raises another exception, and no message holds more than a bit of it.
"""

from __future__ import annotations

import re
from typing import Any

from agent.errors import InvalidArgument

MAX_TEXT_BYTES = 4096
"""A path's limit (PATH_MAX of Linux); other texts are shorter."""

_MAX_NUMBER = (1 << 63) - 1


def bad(where: str, what: str) -> InvalidArgument:
    """Return the one error for what is no certificate."""
    return InvalidArgument(
        "BAD_CUTOVER_CERTIFICATE",
        f"no valid cutover certificate: {where} {what}; get the file anew from the agent",
        field=where,
    )


def fields_of(value: object, where: str, names: str) -> dict[str, Any]:
    """Return an object that has exactly these fields, named with spaces between."""
    if not isinstance(value, dict):
        raise bad(where, "is no object")
    wanted = names.split()
    missing = [name for name in wanted if name not in value]
    if missing:
        raise bad(f"{where}.{missing[0]}", "is missing")
    unknown = sorted(name for name in value if name not in wanted)
    if unknown:
        raise bad(where, f"has an unknown field {unknown[0][:40]!a}")
    return value


def items(value: object, where: str, least: int, most: int) -> list[Any]:
    """Return a list of `least` to `most` items."""
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise bad(where, f"is no list of {least} to {most} items")
    return value


def number(value: object, where: str, least: int = 0, most: int = _MAX_NUMBER) -> int:
    """Return a whole number within limits; True is none."""
    if type(value) is not int or not least <= value <= most:
        raise bad(where, f"is no whole number from {least} to {most}")
    return value


def text(value: object, where: str, most: int = MAX_TEXT_BYTES) -> str:
    """Return a text that UTF-8 can hold: JSON can name halves of characters."""
    if not isinstance(value, str) or not value:
        raise bad(where, "is no text")
    try:
        length = len(value.encode())
    except UnicodeEncodeError as error:
        raise bad(where, "is no valid Unicode") from error
    if length > most:
        raise bad(where, f"is longer than {most} bytes")
    return value


def matching(value: object, where: str, form: re.Pattern[str], what: str) -> str:
    """Return a text of a form."""
    if not isinstance(value, str) or not form.fullmatch(value):
        raise bad(where, f"is not {what}")
    return value
