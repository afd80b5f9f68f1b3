"""Fields of a cutover certificate as JSON gives them: typed and bounded, or one error. Pure.

Owns how a value is refused: BAD_CUTOVER_CERTIFICATE, naming the field. What is read was made by
strangers: nothing here raises another exception, and no message holds more than a bit of it.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from agent.errors import InvalidArgument

MAX_CERTIFICATE_BYTES = 1 << 20

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


def parse_json(data: bytes) -> object:
    """Return what a file or message holds. BAD_CUTOVER_CERTIFICATE."""
    if len(data) > MAX_CERTIFICATE_BYTES:
        raise bad("file", f"is larger than {MAX_CERTIFICATE_BYTES} bytes")
    try:
        return json.loads(
            data.decode(),
            object_pairs_hook=_unique,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except UnicodeDecodeError as error:
        raise bad("file", f"is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise bad("file", f"is no JSON at line {error.lineno}, column {error.colno}") from error
    except ValueError as error:  # a number of thousands of digits (sys.set_int_max_str_digits)
        raise bad("file", "has a number that is too long") from error
    except RecursionError as error:
        raise bad("file", "is nested too deep") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise bad("file", f"names {twice[:40]!a} twice")
    return found


def _refuse_number(text: str) -> NoReturn:
    raise bad("file", f"has the number {text[:20]}, which is no whole one")
