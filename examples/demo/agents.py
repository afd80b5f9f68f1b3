"""The demo's agents: one `warmsync agent` process for each of the two hosts, and its commands."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.disks import DemoFailed, Disk

# The same as the installed `warmsync`, but of the sources that the demo belongs to.
WARMSYNC = [sys.executable, "-m", "agent"]
STOP_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Agent:
    """A running agent."""

    address: str

    def ask(self, command: str, *arguments: str) -> dict[str, Any]:
        """Run a `warmsync` command on this agent; return its JSON. DemoFailed if it fails."""
        return warmsync(command, *arguments, "--agent", self.address, "--insecure")


def warmsync(command: str, *arguments: str) -> dict[str, Any]:
    """Run a command, progress on the terminal; return the JSON it ends with. DemoFailed."""
    print(f"$ warmsync {command} {' '.join(arguments)}", flush=True)
    done = subprocess.run(
        [*WARMSYNC, command, *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise DemoFailed(f"warmsync {command} ended with exit code {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def ebpf_obstacle() -> str:
    """Ask `warmsync doctor` whether this host can track with eBPF; empty if it can."""
    done = subprocess.run(
        [*WARMSYNC, "doctor", "--json"], capture_output=True, text=True, check=False
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    return "" if checks["ebpf"]["status"] == "ok" else f"no eBPF ({checks['ebpf']['finding']})"


@contextmanager
def start_agent(name: str, disk: Disk, directory: Path) -> Iterator[Agent]:
    """Start an agent that may touch one disk; stopped afterwards."""
    log = directory / f"{name}.log"
    command = [*WARMSYNC, "agent", "--listen", "127.0.0.1:0", "--insecure", "--json"]
    command += ["--state-dir", str(directory / name), "--allow-device", disk.path]
    with log.open("wb") as stderr:
        # A session of its own: Ctrl-C must not stop it before the demo does.
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
        )
    try:
        yield Agent(_address(process, log))
    finally:
        _stop(process)


def _address(process: subprocess.Popen[str], log: Path) -> str:
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise DemoFailed(f"an agent did not start:\n{log.read_text()}")
    return str(json.loads(line)["address"])


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()
