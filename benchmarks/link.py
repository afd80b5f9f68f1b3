"""A slow link: what compression gains where data can be compressed, and costs where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.agents import Agent, agent
from benchmarks.certificates import certificates
from benchmarks.devices import (
    MIB,
    check_equal,
    discard,
    fill_random,
    fill_text,
    loop_device,
    require_devices,
    require_ebpf,
)
from benchmarks.measure import Figure, Options, Spread, at_least
from benchmarks.namespaces import Host, link, require_namespaces
from benchmarks.seed import Seeded, seed

NAME = "link"
TITLE = "full copy over a link of 100 MB/s between two network namespaces, with mutual TLS"
_MEGABITS = 800
_LINK_GB_PER_SECOND = _MEGABITS / 8 / 1000

Runs = dict[str, list[Seeded]]


def measure(options: Options) -> Iterator[Figure]:
    """Yield the rates at which disks arrive, and the bytes sent."""
    size = options.pick(512 * MIB, 8 * MIB)
    require_devices(2 * size + 512 * MIB)
    require_ebpf()
    require_namespaces()
    runs: Runs = {}
    disks: dict[str, Callable[[Path, int], None]] = {"text": fill_text, "random": fill_random}
    with link(_MEGABITS) as hosts:
        for disk, fill in disks.items():
            with (
                loop_device(size, fill) as source,
                loop_device(size) as target,
                _pair(hosts, source, target) as ends,
            ):
                for _ in range(options.repeat(3)):
                    for compress in (False, True):
                        discard(target)
                        one = seed(hosts[0].within, ends, source, target, compress=compress)
                        runs.setdefault(_name(disk, compress), []).append(one)
                check_equal(source, target)
    yield from _figures(size, runs)


@contextmanager
def _pair(hosts: tuple[Host, Host], source: str, target: str) -> Iterator[tuple[Agent, Agent]]:
    first, second = hosts
    with (
        certificates(first.address, second.address) as tls,
        agent(source, tls=tls, host=first.address, within=first.within) as sender,
        agent(target, tls=tls, host=second.address, within=second.within) as receiver,
    ):
        yield sender, receiver


def _name(disk: str, compress: bool) -> str:
    return f"{disk}, {'compressed' if compress else 'as it is'}"


def _figures(size: int, runs: Runs) -> Iterator[Figure]:
    rates = {name: [size / one.seconds / 1e9 for one in made] for name, made in runs.items()}
    gain = Spread.of(rate / _LINK_GB_PER_SECOND for rate in rates[_name("text", True)])
    yield Figure("text, compressed: rate of arrival to the link's", "ratio", gain, at_least(1))
    pairs = zip(rates[_name("random", True)], rates[_name("random", False)], strict=True)
    kept = Spread.of(with_it / without for with_it, without in pairs)
    yield Figure("random: rate, compression on to off", "ratio", kept, at_least(0.95))
    for name, made in runs.items():
        yield Figure(f"{name}: rate of arrival", "GB/s", Spread.of(rates[name]))
        sent = Spread.of(one.sent_bytes / size for one in made)
        yield Figure(f"{name}: bytes sent / device", "ratio", sent)
