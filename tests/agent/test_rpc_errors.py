from __future__ import annotations

import asyncio
import logging
import socket
import struct
from typing import Any

import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from agent import errors
from agent.rpc.errors import (
    DOMAIN,
    ErrorInterceptor,
    calling,
    from_rpc_error,
    from_status,
    to_its_end,
    to_status,
)
from tests.agent.rpc_helpers import Echo, run, serving

KINDS = {
    errors.InvalidArgument: "INVALID_ARGUMENT",
    errors.NotFound: "NOT_FOUND",
    errors.AlreadyExists: "ALREADY_EXISTS",
    errors.NotAllowed: "PERMISSION_DENIED",
    errors.FailedPrecondition: "FAILED_PRECONDITION",
    errors.ResourceExhausted: "RESOURCE_EXHAUSTED",
    errors.Unavailable: "UNAVAILABLE",
    errors.DataLoss: "DATA_LOSS",
    errors.Cancelled: "CANCELLED",
}


def subclasses(kind: type[Any]) -> set[type[Any]]:
    return {kind, *(low for sub in kind.__subclasses__() for low in subclasses(sub))}


def test_every_domain_error_has_a_code() -> None:
    ours = {kind for kind in subclasses(errors.WarmsyncError) if kind.__module__ == "agent.errors"}
    assert ours == {*KINDS, errors.WarmsyncError}


@pytest.mark.parametrize("kind", KINDS)
def test_status_there_and_back(kind: type[errors.WarmsyncError]) -> None:
    error = kind("SOME_REASON", "volume /dev/x is 5 bytes: mend it", volume="/dev/x", size_bytes=5)
    status = to_status(error)
    assert grpc.StatusCode[KINDS[kind]].value[0] == status.code
    (detail,) = status.details
    info = error_details_pb2.ErrorInfo()
    assert detail.Unpack(info)
    assert (info.reason, info.domain) == ("SOME_REASON", DOMAIN)
    assert dict(info.metadata) == {"volume": "/dev/x", "size_bytes": "5"}
    back = from_status(status)
    assert type(back) is kind
    assert (back.reason, str(back), back.values) == (error.reason, str(error), error.values)


def test_subclasses_take_the_code_of_their_base() -> None:
    class Special(errors.NotFound):
        pass

    assert to_status(Special("X", "y")).code == grpc.StatusCode.NOT_FOUND.value[0]


def test_unknown_exceptions_do_not_show_their_text() -> None:
    status = to_status(RuntimeError("the password is hunter2"))
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert b"hunter2" not in status.SerializeToString()
    assert from_status(status).reason == "INTERNAL"


def test_status_without_our_details() -> None:
    status = status_pb2.Status(code=5, message="gone")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="X", domain="example.com"))
    back = from_status(status)
    assert type(back) is errors.NotFound
    assert back.reason == "UNKNOWN"


@pytest.mark.parametrize("method", ["unary_unary", "unary_stream", "unary_stream_write"])
def test_errors_of_calls_with_one_request(method: str) -> None:
    error = call_and_fail(method, errors.DataLoss("READ_FAILED", "no: mend", offset_bytes=4096))
    assert type(error) is errors.DataLoss
    assert (error.reason, error.values) == ("READ_FAILED", {"offset_bytes": "4096"})


@pytest.mark.parametrize("method", ["stream_unary", "stream_stream"])
def test_errors_of_calls_with_many_requests(method: str) -> None:
    error = call_and_fail(method, errors.NotAllowed("DEVICE_NOT_ALLOWED", "no: mend"))
    assert type(error) is errors.NotAllowed
    assert error.reason == "DEVICE_NOT_ALLOWED"


def test_unexpected_exceptions_are_logged_with_their_trace(
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = call_and_fail("unary_stream", ValueError("the cause"))
    assert type(error) is errors.WarmsyncError
    assert error.reason == "INTERNAL"
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "the cause"


def test_what_has_a_reason_is_logged_in_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """Also what gRPC says of a call to the peer whose stream was spoilt."""
    inner = grpc.aio.AioRpcError(grpc.StatusCode.UNKNOWN, details="Stream removed")
    with caplog.at_level(logging.INFO):
        error = call_and_fail("unary_unary", inner)
    assert error.reason == "PEER_UNKNOWN"
    (record,) = (one for one in caplog.records if "PEER_UNKNOWN" in one.getMessage())
    assert record.exc_info is None


def test_a_failed_call_to_the_peer_passes_through() -> None:
    inner = grpc.aio.AioRpcError(grpc.StatusCode.DEADLINE_EXCEEDED)
    error = call_and_fail("unary_unary", inner)
    assert type(error) is errors.Unavailable
    assert error.reason == "DEADLINE_EXCEEDED"


def test_long_and_odd_messages_arrive() -> None:
    text = "verifier said: " + "é\n" * 20_000 + "\udcff"
    error = call_and_fail("unary_unary", errors.DataLoss("X", text, log=text, name="a\udcffb"))
    assert type(error) is errors.DataLoss
    assert error.reason == "X"
    assert str(error).startswith("verifier said: é é")
    assert error.values["name"] == "a\\udcffb"


def test_successful_calls_pass_and_abandoned_streams_end() -> None:
    async def main() -> None:
        echo = Echo(lambda request: request + b"!")
        async with serving(echo, ErrorInterceptor()) as channel:
            assert await channel.unary_unary("/test.Echo/unary_unary")(b"a") == b"a!"
            assert await channel.stream_unary("/test.Echo/stream_unary")(iter([b"a", b"b"])) == (
                b"a!b!"
            )
            both = channel.stream_stream("/test.Echo/stream_stream")(iter([b"a", b"b"]))
            assert [answer async for answer in both] == [b"a!", b"b!"]
            call = channel.unary_stream("/test.Echo/unary_stream")(b"a")
            assert [await call.read(), await call.read()] == [b"first", b"a!"]
            call.cancel()
            await asyncio.wait_for(echo.closed.wait(), 10)

    run(main)


def test_unknown_methods_say_so() -> None:
    async def main() -> errors.WarmsyncError:
        async with serving(Echo(bytes), ErrorInterceptor()) as channel:
            with pytest.raises(errors.FailedPrecondition) as caught, calling("h:1"):
                await channel.unary_unary("/test.Echo/nothing")(b"")
            return caught.value

    error = run(main)
    assert error.reason == "UNSUPPORTED_BY_PEER"
    assert error.values == {"address": "h:1"}


def test_nobody_listens() -> None:
    async def main() -> None:
        async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
            with calling("127.0.0.1:1"):
                await invoke(channel, "unary_unary")

    with pytest.raises(errors.Unavailable, match=r"cannot reach 127.0.0.1:1 .*refused"):
        run(main)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    ("tls", "reason"), [(False, "PEER_UNREACHABLE"), (True, "TLS_HANDSHAKE_FAILED")]
)
def test_a_proxy_before_an_agent_that_is_away(*, tls: bool, reason: str, reset: bool) -> None:
    """It takes the connection and hangs up, as a server does that wants TLS."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if reset:
            raw = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

    async def main() -> errors.WarmsyncError:
        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as proxy:
            address = "127.0.0.1:{1}".format(*proxy.sockets[0].getsockname())
            async with grpc.aio.insecure_channel(address) as channel:
                with pytest.raises(errors.Unavailable) as caught, calling(address, tls=tls):
                    await invoke(channel, "unary_unary")
                return caught.value

    assert run(main).reason == reason


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        (grpc.StatusCode.CANCELLED, errors.Cancelled, "CALL_CANCELLED"),
        (grpc.StatusCode.UNKNOWN, errors.WarmsyncError, "PEER_UNKNOWN"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ResourceExhausted, "PEER_RESOURCE_EXHAUSTED"),
    ],
)
def test_plain_codes(code: grpc.StatusCode, kind: type, reason: str) -> None:
    error = from_rpc_error(grpc.aio.AioRpcError(code, details="d"), "h:1")
    assert type(error) is kind
    assert error.reason == reason
    assert "h:1" in str(error)


def test_damaged_details_do_not_hide_the_code() -> None:
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff"))
    error = grpc.aio.AioRpcError(grpc.StatusCode.DATA_LOSS, None, trailers, "d")
    assert type(from_rpc_error(error)) is errors.DataLoss


def call_and_fail(method: str, cause: Exception) -> errors.WarmsyncError:
    """Return what the caller sees when the servicer of `method` raises `cause`."""

    def fail(request: bytes) -> bytes:
        raise cause

    async def main() -> errors.WarmsyncError:
        async with serving(Echo(fail), ErrorInterceptor()) as channel:
            with pytest.raises(errors.WarmsyncError) as caught, calling("h:1"):
                await invoke(channel, method)
            return caught.value

    error = run(main)
    assert isinstance(error, errors.WarmsyncError)
    return error


async def invoke(channel: Any, method: str) -> None:
    kind = method.removesuffix("_write")
    request: Any = iter([b"x"]) if kind.startswith("stream") else b"x"
    call: Any = getattr(channel, kind)(f"/test.Echo/{method}")(request)
    if kind.endswith("unary"):
        await call
    else:
        async for _ in call:
            pass


@pytest.mark.parametrize(
    ("error", "level"),
    [(errors.Unavailable("PEER_LOST", "gone"), "INFO"), (KeyError("a defect"), "ERROR")],
)
def test_what_nobody_hears_is_logged(
    caplog: pytest.LogCaptureFixture, error: Exception, level: str
) -> None:
    """The caller has hung up; the work goes on to its end, and fails."""
    caplog.set_level(logging.INFO, "agent.rpc.errors")

    async def main() -> None:
        gate = asyncio.Event()

        async def work() -> None:
            await gate.wait()
            raise error

        call = asyncio.ensure_future(to_its_end(work()))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        gate.set()
        while not caplog.records:  # noqa: ASYNC110 - a log rings no bell
            await asyncio.sleep(0.01)

    run(main)
    (record,) = caplog.records
    assert (record.levelname, bool(record.exc_info)) == (level, level == "ERROR")
