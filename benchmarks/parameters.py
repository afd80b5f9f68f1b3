"""The parameters of the `tcp` carrier's engine, one varied at a time, in turns.

Both ends run in this process on native threads, without agents: what differs is the parameter.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from benchmarks.devices import GIB, MIB, discard, fill_mixed, loop_device, require_devices
from benchmarks.measure import Figure, Options, Spread
from native.bitmap import DirtyBitmap
from native.blockio import BlockDevice
from native.stream import Connection, Receiver, Sender, Tokens

NAME = "parameters"
TITLE = "the engine of the tcp carrier with other parameters than its own, both ends in one process"

_BLOCK = 4096
_SCATTERED = 25_000


@dataclass(frozen=True, slots=True)
class Setting:
    """Parameters of the engine; `socket_buffer_bytes` None leaves them to the kernel."""

    connections: int = 4
    frame_bytes: int = MIB
    tls: bool = False
    socket_buffer_bytes: int | None = None
    ring: bool = True


Choose = Callable[[DirtyBitmap], None]


def measure(options: Options) -> Iterator[Figure]:
    """Yield the speed of each setting to that of the standard one next to it."""
    size = options.pick(2 * GIB, 32 * MIB)
    require_devices(2 * size + GIB // 2)
    with (
        loop_device(size, fill_mixed) as source,
        loop_device(size) as target,
    ):
        for tls in (False, True):
            kind = "TLS" if tls else "clear"
            settings = {f"{kind}: {name}": one for name, one in _settings(tls).items()}
            yield from _compare(settings, source, target, options.repeat(5), DirtyBitmap.set_all)

        def scatter(marks: DirtyBitmap) -> None:
            step = max(size // _SCATTERED, 2 * _BLOCK) // _BLOCK * _BLOCK
            for offset in range(0, size - step, step):
                marks.set_range(offset, _BLOCK)

        blocks = {
            "scattered 4 KiB: 4 connections, 1 MiB": Setting(),
            "scattered 4 KiB: without io_uring": Setting(ring=False),
            "scattered 4 KiB: without io_uring, 16 connections": Setting(16, ring=False),
        }
        yield from _compare(blocks, source, target, options.repeat(5), scatter)


def _settings(tls: bool) -> dict[str, Setting]:
    """The first is what the carrier uses."""
    base = Setting(tls=tls)
    found = {"4 connections, 1 MiB": base}
    for count in (1, 2, 3, 6, 8):
        found[f"{count} connections"] = replace(base, connections=count)
    for kib in (128, 256, 512):
        found[f"{kib} KiB frames"] = replace(base, frame_bytes=kib << 10)
    for kib in (128, 512, 2048, 8192):
        found[f"{kib} KiB socket buffers"] = replace(base, socket_buffer_bytes=kib << 10)
    return found


def _compare(
    settings: dict[str, Setting], source: str, target: str, rounds: int, choose: Choose
) -> Iterator[Figure]:
    times: dict[str, list[float]] = {name: [] for name in settings}
    for index in range(rounds):
        names = list(settings)
        start = index % len(names)
        for name in (*names[start:], *names[:start]):
            discard(target)
            times[name].append(_run(settings[name], source, target, choose))
    base = next(iter(times.values()))
    for name, own in times.items():
        ratios = Spread.of(theirs / one for theirs, one in zip(base, own, strict=True))
        yield Figure(name, "ratio", ratios, note=f"{min(own):.3f} s at best")


def _run(setting: Setting, source: str, target: str, choose: Choose) -> float:
    """Return the seconds that a round takes, durable."""
    with BlockDevice(source) as reading, BlockDevice(target, writable=True) as writing:
        size = reading.size_bytes()
        marks = DirtyBitmap(size, _BLOCK)
        choose(marks)
        receiver = Receiver(
            [writing], [size], connections=setting.connections, generation=1, ring=setting.ring
        )
        try:
            sender = Sender(_connect(setting, receiver), [reading], [None], ring=setting.ring)
            return _send(setting, sender, receiver, marks, writing)
        finally:
            receiver.join()


def _send(
    setting: Setting, sender: Sender, receiver: Receiver, marks: DirtyBitmap, target: BlockDevice
) -> float:
    from threading import Thread

    def end() -> None:
        receiver.wait()
        target.flush()
        receiver.acknowledge(0.0)

    ending = Thread(target=end)
    sender.tune(frame_bytes=setting.frame_bytes, gap_bytes=4096, nice=0)
    started = time.monotonic()
    ending.start()
    try:
        sender.send([(0, marks)], 1)
        sender.end(1)
        return time.monotonic() - started
    finally:
        receiver.stop()
        ending.join()
        sender.close()


def _connect(setting: Setting, receiver: Receiver) -> list[Connection]:
    from concurrent.futures import ThreadPoolExecutor

    tokens, connections = Tokens(), []
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        ThreadPoolExecutor(1) as thread,
    ):
        _set_buffers(listener, setting.socket_buffer_bytes)
        for index in range(setting.connections):
            raw = socket.socket()
            _set_buffers(raw, setting.socket_buffer_bytes)
            raw.connect(listener.getsockname())
            token = tokens.issue(10)
            opening = thread.submit(Connection.open, raw.detach(), token, tls=setting.tls)
            accepted = listener.accept()[0].detach()
            letting_in = Connection.accept(accepted, tokens, tls=setting.tls)
            connections.append(opening.result())
            receiver.add(letting_in, first=index == 0)
    return connections


def _set_buffers(raw: socket.socket, size_bytes: int | None) -> None:
    if size_bytes is not None:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            raw.setsockopt(socket.SOL_SOCKET, option, size_bytes)
