"""A network between the agents that can be cut, held, slowed and spoilt."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

_CHUNK_BYTES = 64 << 10


class Proxy:
    """Forwards every port of `ports` from one address to another, until it is closed."""

    def __init__(self, listen: str, forward: str, ports: tuple[int, ...]) -> None:
        self._forward = forward
        self._lock = threading.Lock()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._open = threading.Event()
        self._open.set()
        self._forth, self._back = threading.Event(), threading.Event()
        self._forth.set()
        self._back.set()
        self._refusing = False
        self._garbled = 0
        self._delay_seconds = 0.0
        self._threads: set[threading.Thread] = set()
        self._listeners = [socket.create_server((listen, port)) for port in ports]
        for listener, port in zip(self._listeners, ports, strict=True):
            self._run(self._accept, listener, port)

    def cut(self) -> None:
        """Cut all connections that there are."""
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for one in pair:
                _shut(one)

    def hold(self, *, held: bool) -> None:
        """Let nothing through, or let it go on; connections stay."""
        (self._open.clear if held else self._open.set)()

    def hold_requests(self, *, held: bool) -> None:
        """Let nothing through to the target: what it says arrives, what it is told does not."""
        (self._forth.clear if held else self._forth.set)()

    def hold_answers(self, *, held: bool) -> None:
        """Let nothing back to the source: what is asked arrives, what is answered does not."""
        (self._back.clear if held else self._back.set)()

    def refuse(self, *, refusing: bool) -> None:
        """Cut all connections, and those to come; or let them be again."""
        self._refusing = refusing
        if refusing:
            self.cut()

    def garble(self, times: int) -> None:
        """Spoil a byte in so many of the chunks to come."""
        self._garbled = times

    def delay(self, seconds: float) -> None:
        """Let each chunk take so much longer."""
        self._delay_seconds = seconds

    def heal(self) -> None:
        """Be a good network again."""
        self._garbled, self._delay_seconds, self._refusing = 0, 0.0, False
        self.hold(held=False)
        self.hold_requests(held=False)
        self.hold_answers(held=False)

    def close(self) -> None:
        """End everything."""
        self.heal()
        for listener in self._listeners:
            _shut(listener)
            listener.close()
        self.cut()
        for thread in list(self._threads):
            thread.join(10)

    def _run(self, work: Callable[..., None], *arguments: object) -> None:
        def run() -> None:
            try:
                work(*arguments)
            finally:
                self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, daemon=True)
        self._threads.add(thread)
        thread.start()

    def _accept(self, listener: socket.socket, port: int) -> None:
        while True:
            try:
                ours, _ = listener.accept()
            except OSError:
                return
            self._open.wait()
            if self._refusing:
                ours.close()
                continue
            try:
                theirs = socket.create_connection((self._forward, port), 5)
                theirs.settimeout(None)
            except OSError:
                ours.close()
                continue
            self._run(self._serve, ours, theirs)

    def _serve(self, ours: socket.socket, theirs: socket.socket) -> None:
        pair = (ours, theirs)
        with self._lock:
            self._pairs.add(pair)
        if self._refusing:  # since it was accepted
            self.cut()
        with ours, theirs:
            back = threading.Thread(
                target=self._pump, args=(pair, theirs, ours, self._await_back), daemon=True
            )
            back.start()
            self._pump(pair, ours, theirs, self._await_forth)
            back.join()

    def _await_forth(self) -> None:
        self._open.wait()
        self._forth.wait()

    def _await_back(self) -> None:
        self._open.wait()
        self._back.wait()

    def _pump(
        self,
        pair: tuple[socket.socket, socket.socket],
        source: socket.socket,
        target: socket.socket,
        gate: Callable[[], None],
    ) -> None:
        try:
            while data := source.recv(_CHUNK_BYTES):
                gate()
                if self._delay_seconds:
                    time.sleep(self._delay_seconds)
                target.sendall(self._spoil(data))
        except OSError:
            pass  # one of both was cut
        with self._lock:
            self._pairs.discard(pair)
        for one in pair:
            _shut(one)

    def _spoil(self, data: bytes) -> bytes:
        if self._garbled <= 0:
            return data
        self._garbled -= 1
        at = random.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def _shut(one: socket.socket) -> None:
    with suppress(OSError):  # it is already
        one.shutdown(socket.SHUT_RDWR)
