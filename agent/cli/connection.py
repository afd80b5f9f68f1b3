"""Which agent a command talks to, and how.

Owns the options that all such commands share and the one event loop of a command's run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import click
import grpc.aio

from agent.address import parse_address, require_secure
from agent.config import TlsConfig
from agent.errors import InvalidArgument
from agent.rpc.client import open_channel
from agent.rpc.errors import calling
from agent.rpc.tls import check_files

DEFAULT_AGENT = "127.0.0.1:7070"
# For calls that an agent answers at once; a dead agent is noticed by keepalive in any case.
DEADLINE_SECONDS = 60.0

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent to talk to, and whether answers are wanted as JSON."""

    address: str
    tls: TlsConfig
    json: bool

    def run(self, work: Callable[[grpc.aio.Channel], Awaitable[T]]) -> T:
        """Run `work` with a channel; gRPC errors come out as domain errors."""

        async def main() -> T:
            async with open_channel(self.address, self.tls) as channel:
                with calling(self.address, tls=self.tls.is_on):
                    return await work(channel)

        return asyncio.run(main())


def json_option(command: F) -> F:
    """Add --json."""
    return click.option("--json", "as_json", is_flag=True, help="Answer in JSON on stdout.")(
        command
    )


def agent_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --agent, the TLS options and --json; the command gets an `Agent` first."""

    @wraps(command)
    def connected(
        *,
        agent: str,
        tls_cert: str,
        tls_key: str,
        tls_ca: str,
        insecure: bool,
        as_json: bool,
        **others: Any,
    ) -> None:
        tls = TlsConfig(tls_cert, tls_key, tls_ca)
        _check(agent, tls, insecure=insecure)
        command(Agent(agent, tls, as_json), **others)

    for option in reversed(_OPTIONS):
        connected = option(connected)
    return json_option(connected)


_OPTIONS = [
    click.option(
        "--agent",
        metavar="HOST:PORT|unix:PATH",
        envvar="WARMSYNC_AGENT",
        default=DEFAULT_AGENT,
        show_default=True,
        show_envvar=True,
        help="The agent to talk to.",
    ),
    click.option(
        "--tls-cert",
        metavar="FILE",
        envvar="WARMSYNC_TLS_CERT",
        default="",
        help="Certificate to show to the agent, PEM.",
    ),
    click.option(
        "--tls-key", metavar="FILE", envvar="WARMSYNC_TLS_KEY", default="", help="Its key, PEM."
    ),
    click.option(
        "--tls-ca",
        metavar="FILE",
        envvar="WARMSYNC_TLS_CA",
        default="",
        help="Certificate of the authority that signed the agent's, PEM.",
    ),
    click.option(
        "--insecure", is_flag=True, help="Speak without TLS (loopback and unix sockets only)."
    ),
]


def _check(address: str, tls: TlsConfig, *, insecure: bool) -> None:
    if insecure and tls.is_on:
        raise click.UsageError("--insecure and --tls-* contradict each other: give one of them")
    if tls.is_on and not (tls.cert and tls.key and tls.ca):
        raise click.UsageError("TLS needs --tls-cert, --tls-key and --tls-ca")
    try:
        require_secure(parse_address(address), tls=tls.is_on)
        if tls.is_on:
            check_files(tls)
    except InvalidArgument as error:
        raise click.UsageError(str(error)) from error
