"""fio as the guest: what writes to a device while it is being moved."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

from tests import devices

_SECONDS = 120.0


def fio(path: str | Path, *options: str) -> subprocess.Popen[str]:
    """Start fio on a device as the guest would be, with direct I/O unless told otherwise."""
    devices.require("fio")
    command = ["fio", "--name=guest", f"--filename={path}", "--direct=1", "--ioengine=libaio"]
    command += ["--iodepth=16", "--randrepeat=0", "--refill_buffers", "--norandommap"]
    command += ["--verify_state_save=0"]  # a file in the present directory
    return subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(guest: subprocess.Popen[str]) -> None:
    """Wait for a guest that ends by itself; it must not have failed."""
    output, _ = guest.communicate(timeout=_SECONDS)
    assert guest.returncode == 0, output


def boot(path: str | Path, *options: str) -> subprocess.Popen[str]:
    """Start a guest, and return once it has begun to write."""
    file, before = Path(path), Path(path).stat().st_mtime_ns
    guest = fio(path, *options, "--thread")
    counters = Path(f"/proc/{guest.pid}/io")
    deadline = time.monotonic() + _SECONDS
    # Direct writes to a file in memory are not counted, but change its time.
    while "\nwrite_bytes: 0\n" in counters.read_text() and file.stat().st_mtime_ns == before:
        if guest.poll() is not None or time.monotonic() > deadline:
            destroy(guest)
            raise RuntimeError(f"{guest.args!r} does not write")
        time.sleep(0.01)
    return guest


def power_off(guest: subprocess.Popen[str]) -> None:
    """Stop a guest that writes, and wait until nothing of it is under way."""
    if guest.poll() is None:
        guest.send_signal(signal.SIGINT)
    output, _ = guest.communicate(timeout=_SECONDS)
    # 128: ended by the signal, after what was under way.
    assert guest.returncode in (0, 128), output


def destroy(guest: subprocess.Popen[str]) -> None:
    """End a guest whatever it does; safe to call for one that has ended, and twice."""
    guest.kill()
    guest.wait()
    if guest.stdout is not None:
        guest.stdout.close()
