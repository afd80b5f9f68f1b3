"""The carrier of data connections: what is its own beside the conformance suite."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from agent.carrier.tcp import TcpCarrier
from native.bitmap import DirtyBitmap
from tests.agent.carriers.rig import BLOCK, SIZE, rig
from tests.agent.rpc_helpers import run


@pytest.mark.parametrize("after_turns", range(4))
def test_a_cancellation_at_the_end_of_sending_is_not_lost(
    tmp_path: Path, target: Path, source: Path, after_turns: int
) -> None:
    """Once it was: an agent that was stopped went on. Found by the gauntlet (seed 30096)."""

    async def main() -> bool:
        async with rig("tcp", tmp_path, [target]) as made:
            carrier = cast(TcpCarrier, await made.open_carrier(source=source))
            sending = asyncio.ensure_future(_send(carrier))
            _cancel_after_the_call(carrier, sending, after_turns)
            await asyncio.wait([sending])
            await carrier.close()
            return sending.cancelled()

    assert run(main)


async def _send(carrier: TcpCarrier) -> None:
    await carrier.send_marked([(0, DirtyBitmap(SIZE, BLOCK))], 1, lambda *_: None)
    await asyncio.sleep(5)


def _cancel_after_the_call(
    carrier: TcpCarrier, sending: asyncio.Future[None], after_turns: int
) -> None:
    """Cancel so many turns of the loop after all was sent."""
    call = carrier._call
    loop = asyncio.get_running_loop()

    def turn(left: int) -> None:
        if left:
            loop.call_soon(turn, left - 1)
        else:
            sending.cancel()

    async def calling(work: Callable[[], Any]) -> Any:
        answer = await call(work)
        turn(after_turns)
        return answer

    carrier._call = calling  # type: ignore[assignment,method-assign]
