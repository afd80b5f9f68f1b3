"""Two network namespaces, joined by a link of a given rate; always removed again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from benchmarks.devices import require_tools, run
from benchmarks.measure import ImpossibleError

# RFC 5737, for documentation: nobody's real network, and seen in these namespaces only.
_ADDRESSES = ("192.0.2.1", "192.0.2.2")
_DEVICE = "veth0"


@dataclass(frozen=True, slots=True)
class Host:
    """One end: its address, and the namespace's name."""

    address: str
    namespace: str

    @property
    def within(self) -> tuple[str, ...]:
        """The words that run a command there. Not `ip netns exec`: that hides /sys/fs/bpf."""
        return ("nsenter", f"--net=/run/netns/{self.namespace}")


def require_namespaces() -> None:
    """Raise ImpossibleError unless there are the tools for it."""
    require_tools("ip", "tc", "nsenter")


@contextmanager
def link(megabits: int) -> Iterator[tuple[Host, Host]]:
    """Two hosts, each of which sends at most so much. ImpossibleError if the kernel cannot."""
    first, second = (Host(at, f"warmsync-bench-{os.getpid()}-{at[-1]}") for at in _ADDRESSES)
    with ExitStack() as undo:
        try:
            for host in (first, second):
                run("ip", "netns", "add", host.namespace)
                # The link goes with its ends.
                undo.callback(run, "ip", "netns", "delete", host.namespace)
            _join(first, second, megabits)
        except RuntimeError as error:
            raise ImpossibleError(f"no link between two namespaces: {error}") from error
        yield first, second


def _join(first: Host, second: Host, megabits: int) -> None:
    peer = ("peer", "name", _DEVICE, "netns", second.namespace)
    run("ip", "link", "add", _DEVICE, "netns", first.namespace, "type", "veth", *peer)
    for host in (first, second):
        inside = ("ip", "-n", host.namespace)
        run(*inside, "address", "add", f"{host.address}/30", "dev", _DEVICE)
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "link", "set", _DEVICE, "up")
        shape = ("tbf", "rate", f"{megabits}mbit", "burst", "1mb", "latency", "50ms")
        run("tc", "-n", host.namespace, "qdisc", "add", "dev", _DEVICE, "root", *shape)
