"""What the tests of the gRPC doors share: a throwaway service and servers that end with a test."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import uvloop


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run one test's coroutine on a loop of its own, as the agent does, with a deadline.

    What the loop would only log, such as an error that nobody has looked at, fails the test.
    """
    unseen: list[dict[str, Any]] = []

    async def bounded() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: unseen.append(what))
        async with asyncio.timeout(120):
            return await main()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(bounded())
        gc.collect()  # what is not looked at is told when it goes
        assert not unseen, unseen
        return result


class Echo(grpc.GenericRpcHandler):
    """The four kinds of calls on bytes; `behaviour` is called (or raises) for each request."""

    def __init__(self, behaviour: Callable[[bytes], bytes]) -> None:
        self.behaviour = behaviour
        self.closed = asyncio.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        kind = handler_call_details.method.removeprefix("/test.Echo/")
        method = getattr(self, kind, None)
        if method is None:
            return None
        return getattr(grpc, f"{kind.removesuffix('_write')}_rpc_method_handler")(method)

    async def unary_unary(self, request: bytes, context: Any) -> bytes:
        return self.behaviour(request)

    async def stream_unary(self, requests: Any, context: Any) -> bytes:
        return b"".join([self.behaviour(request) async for request in requests])

    async def unary_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            yield self.behaviour(request)
            await asyncio.Event().wait()  # until the caller goes away
        finally:
            self.closed.set()

    async def unary_stream_write(self, request: bytes, context: Any) -> None:
        await context.write(b"first")
        await context.write(self.behaviour(request))

    async def stream_stream(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield self.behaviour(request)


@asynccontextmanager
async def serving(echo: Echo, *interceptors: Any) -> AsyncIterator[Any]:
    """A plain server with `echo` and a channel to it."""
    server = grpc.aio.server(interceptors=interceptors)
    server.add_generic_rpc_handlers((echo,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)
