"""Errors between the domain and gRPC.

Owns the mapping of `agent.errors` to status codes, both ways, and the interceptor that applies it
to every call. The only place that knows gRPC codes. Never decides what is an error.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from agent.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotAllowed,
    NotFound,
    ResourceExhausted,
    Unavailable,
    WarmsyncError,
)

_Result = TypeVar("_Result")

DOMAIN = "warmsync"
# gRPC refuses trailers of more than 8 KiB or so (soft limit of grpc.max_metadata_size), and the
# message travels twice: percent-encoded and within the details. A verifier's log must not turn an
# error into another one.
MAX_MESSAGE_BYTES = 1500
MAX_VALUE_BYTES = 200
MAX_VALUES = 10

_CODES: dict[type[WarmsyncError], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    NotAllowed: grpc.StatusCode.PERMISSION_DENIED,
    FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    DataLoss: grpc.StatusCode.DATA_LOSS,
    Cancelled: grpc.StatusCode.CANCELLED,
    WarmsyncError: grpc.StatusCode.INTERNAL,
}
_CLASSES = {code.value[0]: kind for kind, code in _CODES.items()}
# What OpenSSL and gRPC's handshaker say when certificates, not networks, are the trouble.
_TLS_SIGNS = ("handshake", "certificate", "ssl_error", "peer name", "hostname verification")

_log = logging.getLogger(__name__)


def to_status(error: BaseException) -> status_pb2.Status:
    """Return the google.rpc.Status of an error, with one ErrorInfo.

    A gRPC error (of a call to the peer) is translated first. Anything but a WarmsyncError is
    INTERNAL and shows only its class: the text may hold what is not the caller's business.
    """
    known = _known(error)
    message = _clip(" ".join(str(known).split()), MAX_MESSAGE_BYTES)
    values = list(known.values.items())[:MAX_VALUES]
    info = error_details_pb2.ErrorInfo(
        reason=known.reason,
        domain=DOMAIN,
        metadata={name: _clip(value, MAX_VALUE_BYTES) for name, value in values},
    )
    status = status_pb2.Status(code=_code(known).value[0], message=message)
    status.details.add().Pack(info)
    return status


def from_status(status: status_pb2.Status) -> WarmsyncError:
    """Return the domain error of a google.rpc.Status: the inverse of to_status."""
    info = _info(status)
    kind = _CLASSES.get(status.code, WarmsyncError)
    if info is None:
        return kind("UNKNOWN", status.message or "no reason was given")
    return kind(info.reason, status.message, **dict(info.metadata))


def from_rpc_error(error: grpc.RpcError, address: str = "", *, tls: bool = True) -> WarmsyncError:
    """Return the domain error of a failed call.

    `address` is where the call went to, for messages; `tls`: whether this end uses TLS. Errors that
    the other agent has raised come back as they were; those that gRPC itself has raised get a
    reason and a mend here.
    """
    status = _rich_status(error)
    if status is not None and _info(status) is not None:
        return from_status(status)
    return _from_plain(error, address or "the other agent", tls=tls)


@contextmanager
def calling(address: str, *, tls: bool = True) -> Iterator[None]:
    """Translate the gRPC errors of the calls made within (also while reading a stream).

    `tls`: whether this end uses TLS.
    """
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error, address, tls=tls) from error


async def to_its_end(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Await what must not be left half done: it goes on if the caller hangs up.

    What it raises then is heard by nobody: a refusal is logged as one, a defect as such.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(_tell_unheard)
        raise


def _tell_unheard(task: asyncio.Task[Any]) -> None:
    error = None if task.cancelled() else task.exception()
    if isinstance(error, WarmsyncError):
        _log.info('refused, unheard reason=%s message="%s"', error.reason, error)
    elif error is not None:
        _log.error("failed, unheard", exc_info=error)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what a servicer raises into a status; servicers raise WarmsyncError and no more."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler, whichever of the four kinds it is of."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = _kind(handler)
        method = _wrap(getattr(handler, kind), handler_call_details.method)
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(method, handler.request_deserializer, handler.response_serializer)


def _kind(handler: Any) -> str:
    request = "stream" if handler.request_streaming else "unary"
    return f"{request}_{'stream' if handler.response_streaming else 'unary'}"


def _wrap(method: Any, name: str) -> Any:
    """grpc.aio looks at what a handler is (inspect.isasyncgenfunction), so wrap like by like."""
    if inspect.isasyncgenfunction(method):

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            async with _statuses(context, name), aclosing(method(request, context)) as responses:
                async for response in responses:
                    yield response

        return generate

    async def call(request: Any, context: Any) -> Any:
        async with _statuses(context, name):
            return await method(request, context)

    return call


@asynccontextmanager
async def _statuses(context: Any, name: str) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AbortError:
        raise  # the handler has ended the call itself
    except Exception as error:
        await _abort(context, name, error)


async def _abort(context: Any, name: str, error: Exception) -> NoReturn:
    known = _known(error)
    if known.reason == "INTERNAL":
        _log.error("call failed method=%s", name, exc_info=error)
    else:
        _log.info('call refused method=%s reason=%s message="%s"', name, known.reason, known)
    await context.abort_with_status(rpc_status.to_status(to_status(known)))
    raise AssertionError("abort_with_status returned")


def _known(error: BaseException) -> WarmsyncError:
    if isinstance(error, WarmsyncError):
        return error
    if isinstance(error, grpc.RpcError):
        return from_rpc_error(error)
    name = type(error).__name__
    return WarmsyncError(
        "INTERNAL", f"internal error ({name}): look into the agent's log", error=name
    )


def _code(error: WarmsyncError) -> grpc.StatusCode:
    return next(_CODES[kind] for kind in type(error).__mro__ if kind in _CODES)


def _clip(text: str, limit: int) -> str:
    """Cut to `limit` bytes; names of files that are no UTF-8 (lone surrogates) are escaped."""
    return text.encode("utf-8", "backslashreplace")[:limit].decode("utf-8", "ignore")


def _rich_status(error: Any) -> status_pb2.Status | None:
    try:
        status: status_pb2.Status | None = rpc_status.from_call(error)
    except (ValueError, DecodeError):
        return None  # details of something that is not warmsync: the plain code must do
    return status


def _info(status: status_pb2.Status) -> error_details_pb2.ErrorInfo | None:
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            return info
    return None


def _from_plain(error: Any, address: str, *, tls: bool) -> WarmsyncError:
    code, details = error.code(), " ".join((error.details() or "").split())
    match code:
        case grpc.StatusCode.UNAVAILABLE:
            return _unreachable(address, details, tls=tls)
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            message = f"{address} did not answer in time: see whether its agent is overloaded"
            return Unavailable("DEADLINE_EXCEEDED", message, address=address)
        case grpc.StatusCode.CANCELLED:
            return Cancelled("CALL_CANCELLED", f"the call to {address} was cancelled: try again")
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "Concurrent RPC limit" in details:
            # Unavailable: a migration that meets it tries again.
            message = f"{address} has as many calls under way as it takes: end some, try again"
            return Unavailable("TOO_MANY_CALLS", message, address=address)
        case grpc.StatusCode.UNIMPLEMENTED:
            message = f"{address} does not know this call: run the same warmsync version there"
            return FailedPrecondition("UNSUPPORTED_BY_PEER", message, address=address)
    kind = _CLASSES.get(code.value[0], WarmsyncError)
    message = f"{address} answered {code.name} ({details}): look into its agent's log"
    return kind(f"PEER_{code.name}", message, address=address)


def _unreachable(address: str, details: str, *, tls: bool) -> WarmsyncError:
    # "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: ..."
    cause = re.sub(r"^[A-Z_]+: ", "", details.rsplit("last error: ", 1)[-1])
    if tls and (any(sign in details.lower() for sign in _TLS_SIGNS) or _hung_up(details)):
        message = (
            f"no connection with {address} could be agreed on ({cause}): either both ends use TLS "
            "or neither; with TLS both need certificates of the same authority, and the name or "
            "address that is called must stand in the certificate"
        )
        return Unavailable("TLS_HANDSHAKE_FAILED", message, address=address, details=cause)
    message = (
        f"cannot reach {address} ({cause}): see that its agent runs and listens there, and that "
        "no firewall is between"
    )
    if not tls and _hung_up(details):
        # A proxy before an agent that is away looks like an agent that wants TLS.
        message += "; if it uses TLS, this end needs certificates too"
    return Unavailable("PEER_UNREACHABLE", message, address=address, details=cause)


def _hung_up(details: str) -> bool:
    """True if the other end took the connection and closed it before a word was said.

    That is how a server refuses a client without or with a foreign certificate, and a plain client
    where it serves TLS: in TLS 1.3 the client's handshake is over before the server judges it.
    """
    return "failed to connect" in details and (
        "Socket closed" in details or "Connection reset" in details
    )
