"""Addresses of agents: `HOST:PORT`, `[IPV6]:PORT` or `unix:PATH`.

Owns how an address is written and which ones stay on this host.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from agent.errors import InvalidArgument

# sun_path holds 108 bytes with the final zero (unix(7)).
MAX_UNIX_PATH_BYTES = 107


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address (`host` and `port`) or a unix socket (`path`)."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """True if what is sent there cannot leave this host.

        Names other than `localhost` are not trusted to: what they resolve to may change.
        """
        if self.path or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(text: str) -> Address:
    """Return the address that `text` writes. InvalidArgument BAD_ADDRESS."""
    if text.startswith("unix:"):
        return _parse_unix(text)
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    well_formed = colon and bare and bare.split() == [bare] and (":" not in bare or bare != host)
    # isascii: isdigit() alone is true for other scripts' digits.
    if not well_formed or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise _bad(text)
    return Address(host=bare, port=int(port))


def require_secure(address: Address, *, tls: bool) -> None:
    """Refuse to speak in the clear beyond this host. InvalidArgument INSECURE_ADDRESS."""
    if tls or address.is_local:
        return
    message = (
        f"{address} is not on this host and TLS is off: give --tls-cert, --tls-key and --tls-ca, "
        "or use a loopback address or unix:PATH"
    )
    raise InvalidArgument("INSECURE_ADDRESS", message, address=address)


def _parse_unix(text: str) -> Address:
    path = text.removeprefix("unix:")
    if not path.startswith("/") or "\0" in path or len(path.encode()) > MAX_UNIX_PATH_BYTES:
        message = (
            f"bad socket address {text!r}: write unix:/absolute/path of at most "
            f"{MAX_UNIX_PATH_BYTES} bytes"
        )
        raise InvalidArgument("BAD_ADDRESS", message, address=text)
    return Address(path=path)


def _bad(text: str) -> InvalidArgument:
    message = f"bad address {text!r}: write HOST:PORT, [IPV6]:PORT or unix:PATH"
    return InvalidArgument("BAD_ADDRESS", message, address=text)
