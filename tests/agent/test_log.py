from __future__ import annotations

import json
import logging
import sys

import pytest

from agent.log import JsonFormatter, LineFormatter


def record(message: str, *args: object, error: bool = False) -> logging.LogRecord:
    trace = None
    if error:
        try:
            raise ValueError("the\ncause")
        except ValueError:
            trace = sys.exc_info()
    made = logging.LogRecord("agent.x", logging.INFO, "f", 1, message, args, trace)
    made.created = 1_700_000_000.25
    return made


def test_lines() -> None:
    text = LineFormatter().format(record("round ended id=%s\n rounds=%d", "a", 3))
    assert (
        text == "time=2023-11-14T22:13:20.250Z level=info module=agent.x round ended id=a rounds=3"
    )


def test_json_lines() -> None:
    shown = json.loads(JsonFormatter().format(record("id=%s", "a")))
    assert shown == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "module": "agent.x",
        "message": "id=a",
    }


@pytest.mark.parametrize("formatter", [LineFormatter(), JsonFormatter()])
def test_traces_stay_on_the_line(formatter: logging.Formatter) -> None:
    text = formatter.format(record("failed", error=True))
    assert "\n" not in text
    assert "ValueError: the\\ncause" in text
