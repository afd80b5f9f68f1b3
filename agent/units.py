"""Sizes, rates and times as people write and read them.

Owns the words; knows nothing of what they are for. Binary multiples throughout: K is 1024, as
with qemu-img, truncate and lvcreate.
"""

from __future__ import annotations

import re

from agent.errors import InvalidArgument

_PREFIXES = "KMGTPE"
_SIZE = re.compile(r"([0-9]+)(\.[0-9]+)?(?:([KMGTPE])(?:I?B)?|B)?", re.IGNORECASE)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(us|ms|s|m|h|d)")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_MAX_BYTES = (1 << 63) - 1
_SIZE_FORMS = "give bytes with or without K, M, G, T (1024 each), such as 4096, 512MiB or 10G"


def parse_size(text: str) -> int:
    """Return the bytes in "4096", "512MiB" or "10G". Raises InvalidArgument (INVALID_SIZE)."""
    size = _parse_bytes(text)
    if size is None:
        raise InvalidArgument(
            "INVALID_SIZE", f"{_quote(text)} is not a size: {_SIZE_FORMS}", size=text
        )
    return size


def parse_rate(text: str) -> int:
    """Return the bytes a second in "100M" or "100MiB/s". Raises InvalidArgument (INVALID_RATE)."""
    rate = _parse_bytes(text[:-2] if text.lower().endswith("/s") else text)
    if rate is None:
        raise InvalidArgument(
            "INVALID_RATE",
            f"{_quote(text)} is not a rate: {_SIZE_FORMS}, for one second",
            rate=text,
        )
    return rate


def parse_duration(text: str) -> float:
    """Return the seconds in "500ms", "2.5s", "10m", "1h" or "0".

    Raises InvalidArgument (INVALID_DURATION), also for a number without its unit.
    """
    if text == "0":
        return 0.0
    match = _DURATION.fullmatch(text) if text.isascii() else None
    if match is None:
        raise InvalidArgument(
            "INVALID_DURATION",
            f"{_quote(text)} is not a duration: give a number and one of us, ms, s, m, h, d, "
            "such as 500ms, 2.5s or 10m",
            duration=text,
        )
    return float(match[1]) * _SECONDS[match[2]]


def format_bytes(size_bytes: float) -> str:
    """Return a size for people: "512 B", "1.0 GiB"."""
    value, prefix = float(size_bytes), ""
    for prefix_next in _PREFIXES:
        # 1023.95 KiB would be printed as 1024.0 KiB.
        if abs(value) < (1023.95 if prefix else 1023.5):
            break
        value, prefix = value / 1024, prefix_next
    return f"{value:.1f} {prefix}iB" if prefix else f"{value:.0f} B"


def format_rate(bytes_per_second: float) -> str:
    """Return a rate for people: "1.0 GiB/s"."""
    return f"{format_bytes(bytes_per_second)}/s"


def format_seconds(seconds: float) -> str:
    """Return a time for people: "40 us", "38 ms", "2.4 s", "1:30", "1:02:03"."""
    if seconds < 0:
        return f"-{format_seconds(-seconds)}"
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} us" if seconds > 0 else "0 s"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _quote(text: str) -> str:
    """Return what was given, fit for one line of a message."""
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}..."


def _parse_bytes(text: str) -> int | None:
    match = _SIZE.fullmatch(text) if text.isascii() else None
    if match is None or (match[2] and not match[3]) or len(text) > 40:
        return None
    factor = 1024 ** (_PREFIXES.index(match[3].upper()) + 1) if match[3] else 1
    digits = len(match[2] or ".") - 1
    # In whole numbers: a float would round sizes of many digits.
    scaled = int(match[1] + (match[2] or ".")[1:]) * factor // 10**digits
    return scaled if scaled <= _MAX_BYTES else None
