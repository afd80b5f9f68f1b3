"""The threads of an agent, on which all that blocks is done.

Owns what is said of work that comes when the agent stops: that it does, and not that there is a
bug.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from agent.errors import agent_stopped


class Threads(ThreadPoolExecutor):
    """As its base; Unavailable AGENT_STOPPED for what is submitted after `shutdown`."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Have it done by one of the threads."""
        try:
            return super().submit(fn, *args, **kwargs)
        except RuntimeError as error:
            raise agent_stopped() from error
