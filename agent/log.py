"""The agent's log: one line an event on stderr, `key=value` or JSON.

Owns the form of a line. What happened is said by the modules, through `logging`.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime


def set_up(level: str, *, as_json: bool) -> None:
    """Send the log of all modules to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else LineFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class LineFormatter(logging.Formatter):
    """`time=... level=info module=agent.source <message>`; a traceback becomes `trace="..."`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of an event."""
        fields = _fields(record)
        message = " ".join(fields.pop("message").split())
        trace = fields.pop("trace", None)
        text = " ".join(f"{key}={value}" for key, value in fields.items())
        return f"{text} {message}" + (f" trace={json.dumps(trace)}" if trace else "")


class JsonFormatter(logging.Formatter):
    """A JSON object with time, level, module, message and perhaps trace."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of an event."""
        return json.dumps(_fields(record))


def _fields(record: logging.LogRecord) -> dict[str, str]:
    moment = datetime.fromtimestamp(record.created, UTC)
    fields = {
        "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "module": record.name,
        "message": record.getMessage(),
    }
    if record.exc_info:
        fields["trace"] = logging.Formatter().formatException(record.exc_info)
    return fields
