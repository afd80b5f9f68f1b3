"""Ports that an agent can be started on again: nothing else on this host draws them by chance."""

from __future__ import annotations

import itertools
import os
import random
import re
import socket
from collections.abc import Iterator

FIRST, END = 16384, 32768
"""Below ip_local_port_range, out of which connections and listeners on port 0 get theirs."""
WORKERS = 8
PAIRS = (END - FIRST) // WORKERS // 2


def _worker() -> int:
    found = re.search(r"\d+", os.environ.get("PYTEST_XDIST_WORKER", ""))
    return int(found[0]) % WORKERS if found else 0


def _candidates() -> Iterator[int]:
    # Another session's workers have the same numbers, but hardly the same place to begin at.
    start = random.SystemRandom().randrange(PAIRS)
    for number in itertools.count(start):
        yield FIRST + 2 * (_worker() * PAIRS + number % PAIRS)


_left = _candidates()


def free_pair() -> int:
    """Return a port for calls that is free together with the one after it, for data."""
    for port in itertools.islice(_left, PAIRS):
        try:
            with (
                socket.create_server(("127.0.0.1", port)),
                socket.create_server(("127.0.0.1", port + 1)),
            ):
                return port
        except OSError:
            continue
    raise RuntimeError(f"no two free ports between {FIRST} and {END}")
