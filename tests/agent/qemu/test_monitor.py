"""Conversations with a QMP socket that others talk to, too."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from agent.errors import FailedPrecondition, Unavailable
from agent.qemu.monitor import Monitor, converse
from tests.qemus import Qemu


async def query_status(monitor: Monitor) -> str:
    return str((await monitor.execute("query-status"))["status"])


def fill_queue(path: str) -> ExitStack:
    """Connect until there is no place left; who closes what is returned makes room."""
    clients = ExitStack()
    served = clients.enter_context(socket.socket(socket.AF_UNIX))
    served.connect(path)
    assert served.recv(1), "no greeting"  # else it is still in the queue, and leaves it later
    while True:
        client = clients.enter_context(socket.socket(socket.AF_UNIX))
        client.setblocking(False)
        try:
            client.connect(path)
        except BlockingIOError:
            return clients


def test_a_full_queue_is_waited_for(machine: Qemu) -> None:
    clients = fill_queue(machine.socket)
    leaving = threading.Timer(0.5, clients.close)
    started = time.monotonic()
    leaving.start()
    assert converse(machine.socket, query_status, 10.0) == "prelaunch"
    assert time.monotonic() - started > 0.4, "the queue was not full"
    leaving.join()


def test_the_wait_has_an_end(machine: Qemu) -> None:
    with fill_queue(machine.socket):
        started = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            converse(machine.socket, query_status, 0.5)
        assert caught.value.reason == "QMP_UNREACHABLE"
        assert 0.4 < time.monotonic() - started < 60


EVENT = b'{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "JOB_STATUS_CHANGE"}'
GREETING = b'{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}'
ANSWERS: list[dict[str, object]] = [{"return": {}}, {"return": {"status": "running"}}]


def serve(listener: socket.socket, greetings: list[bytes]) -> None:
    """Greet one client after the other so; answer the last one."""
    for greeting in greetings:
        client, _ = listener.accept()
        with client, suppress(ConnectionError):  # who was sent an event has left
            client.sendall(greeting + b"\n")
            for answer in ANSWERS:
                asked = client.recv(4096)  # no newline follows a command
                if not asked:
                    break
                named = {key: value for key, value in json.loads(asked).items() if key == "id"}
                client.sendall(json.dumps(answer | named).encode() + b"\n")


@pytest.mark.parametrize("stray", [EVENT, GREETING + b"\n" + EVENT])
@pytest.mark.parametrize("strays", [1, 4, 5])
def test_an_event_in_the_greetings_place(directory: Path, strays: int, stray: bytes) -> None:
    """Or right behind it, before it is answered: asked for again, but not for ever."""
    path = str(directory / "qmp.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(20)
        greetings = [stray] * strays + [GREETING] * (strays < 5)
        server = threading.Thread(target=serve, args=(listener, greetings))
        server.start()
        if strays < 5:
            assert converse(path, query_status, 10.0) == "running"
        else:
            with pytest.raises(Unavailable) as caught:
                converse(path, query_status, 10.0)
            assert caught.value.reason == "QMP_UNREACHABLE"
        server.join()


@pytest.mark.parametrize("kind", ["missing", "dead", "file"])
def test_nobody_listens(directory: Path, kind: str) -> None:
    path = directory / "qmp.sock"
    if kind == "dead":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    elif kind == "file":
        path.touch()
    with pytest.raises(FailedPrecondition) as caught:
        converse(str(path), query_status, 0.5)
    assert (caught.value.reason, caught.value.values["socket"]) == ("QEMU_GONE", str(path))
