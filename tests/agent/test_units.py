"""Words for sizes, rates and times: what is taken, what is refused, what is printed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import InvalidArgument
from agent.units import (
    format_bytes,
    format_rate,
    format_seconds,
    parse_duration,
    parse_rate,
    parse_size,
)

SIZES = {
    "0": 0,
    "4096": 4096,
    "4096B": 4096,
    "1K": 1024,
    "1k": 1024,
    "1KiB": 1024,
    "1kb": 1024,
    "512MiB": 512 << 20,
    "10G": 10 << 30,
    "1.5G": 3 << 29,
    "16T": 16 << 40,
    "9007199254740993": 9007199254740993,
    "7.999999999E": 9223372035701854303,
}
BAD_SIZES = ["", " ", "G", "-1", "+1", "1 G", "1.5", "1.G", ".5G", "1e9", "1GG", "1GB/s", "0x10"]
BAD_SIZES += ["8E", "9223372036854775808", "1\n", "\u0661", "1\u212a", "nan", "1_000", "9" * 5000]

DURATIONS = {
    "0": 0.0,
    "0s": 0.0,
    "500ms": 0.5,
    "250us": 0.00025,
    "2.5s": 2.5,
    "10m": 600.0,
    "1h": 3600.0,
    "7d": 604800.0,
}
BAD_DURATIONS = ["", "5", "1.5", "-1s", "1 s", "1S", "1min", "1h30m", "1e3s", "inf", "s", ".5s"]
BAD_DURATIONS += ["1s\n", "\u0661s", "1_0s"]


@pytest.mark.parametrize("text", SIZES)
def test_size(text: str) -> None:
    assert parse_size(text) == SIZES[text]


@pytest.mark.parametrize("text", ["100M", "100MiB", "100M/s", "100MiB/s", "104857600"])
def test_rate(text: str) -> None:
    assert parse_rate(text) == 100 << 20


@pytest.mark.parametrize("text", DURATIONS)
def test_duration(text: str) -> None:
    assert parse_duration(text) == pytest.approx(DURATIONS[text])


@pytest.mark.parametrize(
    ("parse", "reason", "text"),
    [
        *((parse_size, "INVALID_SIZE", text) for text in BAD_SIZES),
        *(
            (parse_rate, "INVALID_RATE", text)
            for text in [*BAD_SIZES, "1/s/s", "/s"]
            if text != "1GB/s"
        ),
        *((parse_duration, "INVALID_DURATION", text) for text in BAD_DURATIONS),
    ],
)
def test_refused(parse: Callable[[str], float], reason: str, text: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        parse(text)
    assert refusal.value.reason == reason
    message = str(refusal.value)
    assert text in refusal.value.values.values()
    assert "\n" not in message
    assert "such as" in message


def test_refusal_of_a_long_text_stays_short() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        parse_size("9" * 5000)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (1 << 30, "1.0 GiB"),
        (11_600_000_000_000_000, "10.3 PiB"),
        (1 << 73, "8192.0 EiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_format_bytes(size_bytes: float, text: str) -> None:
    assert format_bytes(size_bytes) == text
    assert format_rate(size_bytes) == f"{text}/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.000_04, "40 us"),
        (0.000_999_6, "1 ms"),
        (0.0384, "38 ms"),
        (0.9996, "1.0 s"),
        (2.44, "2.4 s"),
        (59.94, "59.9 s"),
        (59.96, "1:00"),
        (90, "1:30"),
        (3599.6, "1:00:00"),
        (3723, "1:02:03"),
        (360_000, "100:00:00"),
        (-0.5, "-500 ms"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.integers(0, (1 << 63) - 1))
def test_whole_bytes_come_back(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == size_bytes


@given(st.text(max_size=12))
def test_anything_else_is_a_typed_refusal(text: str) -> None:
    for parse in (parse_size, parse_rate, parse_duration):
        try:
            assert parse(text) >= 0
        except InvalidArgument:
            continue


@given(st.integers(0, 1 << 62))
def test_printed_sizes_are_near_and_can_be_read(size_bytes: int) -> None:
    assert parse_size(format_bytes(size_bytes).replace(" ", "")) == pytest.approx(
        size_bytes, rel=0.06, abs=0.5
    )
