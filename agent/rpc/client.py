"""Channels to other agents.

Owns how a connection is made and kept alive, and the channel options that both ends must agree on.
Refuses to speak in the clear beyond this host.
"""

from __future__ import annotations

import grpc.aio

from agent.address import parse_address, require_secure
from agent.config import TlsConfig
from agent.rpc.tls import channel_credentials

# Frames carry up to 1 MiB, answers up to 1 MiB of digests: 4 MiB leaves room and bounds memory.
MAX_MESSAGE_BYTES = 4 << 20
# A peer that does not answer a ping is gone: noticed within the sum of the two.
KEEPALIVE_TIME_MS = 10_000
KEEPALIVE_TIMEOUT_MS = 10_000
# A connection on which bytes still come and no ping is answered is spoilt: a damaged length makes
# HTTP/2 take all that follows for one frame. The default is a minute.
PING_TIMEOUT_MS = 20_000

NO_TLS = TlsConfig()

Options = list[tuple[str, int | str]]

SHARED_OPTIONS: Options = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
    # Also while no call is under way: a converged migration has quiet moments.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
CLIENT_OPTIONS: Options = [
    *SHARED_OPTIONS,
    # Several channels to one address stay independent: one's failure is not another's.
    ("grpc.use_local_subchannel_pool", 1),
    # Disks go from host to host; a proxy from the environment is meant for something else.
    ("grpc.enable_http_proxy", 0),
    # The default waits up to 120 s: too long for a peer that is restarted.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]


def open_channel(address: str, tls: TlsConfig = NO_TLS) -> grpc.aio.Channel:
    """Return a channel to `HOST:PORT` or `unix:PATH`; nothing is connected before the first call.

    Raises InvalidArgument: BAD_ADDRESS, BAD_CERTIFICATE, or INSECURE_ADDRESS for an address beyond
    this host without TLS. Close the channel with `await channel.close()`.
    """
    target = parse_address(address)
    require_secure(target, tls=tls.is_on)
    if not tls.is_on:
        return grpc.aio.insecure_channel(str(target), options=CLIENT_OPTIONS)
    return grpc.aio.secure_channel(str(target), channel_credentials(tls), options=CLIENT_OPTIONS)
