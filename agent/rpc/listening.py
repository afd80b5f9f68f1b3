"""Whether an address can be listened on, and why not.

gRPC only says that it failed to bind, binds to a part of what a name stands for without a word, and
removes the socket of a server that is alive. So this looks first.
"""

from __future__ import annotations

import errno
import os
import socket
import stat

from agent.address import Address
from agent.errors import FailedPrecondition, InvalidArgument, NotAllowed, WarmsyncError


def probe(address: Address) -> None:
    """Raise if `address` cannot be listened on; remove a socket file that nobody listens on.

    FailedPrecondition ADDRESS_IN_USE, NotAllowed LISTEN_NOT_PERMITTED, InvalidArgument BAD_ADDRESS.
    """
    if address.path:
        _probe_unix(address)
    else:
        _probe_tcp(address)


def _probe_tcp(address: Address) -> None:
    found = _resolve(address)
    failures = []
    for family, where in found:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            # As gRPC does: connections of a former server that linger do not count.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(where)
                trial.listen(1)
            except OSError as error:
                failures.append(error)
    # A host without IPv6 resolves localhost to ::1 nevertheless: enough if one is there.
    serious = [error for error in failures if error.errno != errno.EADDRNOTAVAIL]
    if serious or len(failures) == len(found):
        raise _refusal(address, (serious or failures)[0])


def _resolve(address: Address) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        message = f"cannot listen on {address} ({error.strerror}): name an address of this host"
        raise InvalidArgument("BAD_ADDRESS", message, address=address) from error
    usable = {socket.AF_INET6} if socket.has_ipv6 else set()
    return [(info[0], info[4]) for info in found if info[0] in {socket.AF_INET, *usable}]


def _probe_unix(address: Address) -> None:
    parent = os.path.dirname(address.path)
    if not os.path.isdir(parent):
        message = f"cannot listen on {address}: make the directory {parent} first"
        raise InvalidArgument("BAD_ADDRESS", message, address=address)
    try:
        mode = os.lstat(address.path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode) or _is_alive(address.path):
        raise _in_use(address)
    os.unlink(address.path)


def _is_alive(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            client.connect(path)
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # EAGAIN: its queue is full; EACCES: another's; neither is ours to remove
    return True


def _refusal(address: Address, error: OSError) -> WarmsyncError:
    if error.errno == errno.EADDRINUSE:
        return _in_use(address)
    if error.errno in {errno.EACCES, errno.EPERM}:
        message = f"not permitted to listen on {address}: run as root or use a port above 1023"
        return NotAllowed("LISTEN_NOT_PERMITTED", message, address=address)
    message = f"cannot listen on {address} ({error.strerror}): name an address of this host"
    return InvalidArgument("BAD_ADDRESS", message, address=address)


def _in_use(address: Address) -> FailedPrecondition:
    message = f"{address} is in use: stop what listens there or choose another with --listen"
    return FailedPrecondition("ADDRESS_IN_USE", message, address=address)
