"""Agents to measure: real processes of the product, driven over gRPC, always ended again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil

from benchmarks.certificates import Certificates
from benchmarks.devices import scratch_directory
from benchmarks.processes import cpu_seconds, stop


@dataclass(frozen=True, slots=True)
class Agent:
    """A running agent."""

    address: str
    process: psutil.Process
    tls: Certificates | None = None

    def cpu_seconds(self) -> float:
        """Return the processor time it has used, in user and kernel mode."""
        return cpu_seconds(self.process)

    def resident_bytes(self) -> int:
        """Return its resident memory now."""
        return int(self.process.memory_info().rss)

    def peak_bytes(self) -> int:
        """Return the most resident memory it has had (VmHWM)."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
        raise RuntimeError(f"process {self.process.pid} does not say its peak")

    def channel(self) -> grpc.Channel:
        """Return a channel to it, in the way it listens."""
        if self.tls is None:
            return grpc.insecure_channel(self.address)
        tls = self.tls
        credentials = grpc.ssl_channel_credentials(
            tls.ca.read_bytes(), tls.key.read_bytes(), tls.cert.read_bytes()
        )
        return grpc.secure_channel(self.address, credentials)


@contextmanager
def agent(
    *devices: str,
    tls: Certificates | None = None,
    host: str = "127.0.0.1",
    within: Sequence[str] = (),
) -> Iterator[Agent]:
    """An agent on a free port, which may touch these devices only.

    `within`: the words that run a command elsewhere, such as in another network namespace.
    """
    with scratch_directory() as directory, (directory / "log").open("w+") as log:
        command = [*within, sys.executable, "-m", "agent", "agent", "--listen", f"{host}:0"]
        command += tls.options if tls else ["--insecure"]
        command += ["--json", "--log-level", "warning", "--state-dir", str(directory / "state")]
        for device in devices:
            command += ["--allow-device", device]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            yield Agent(_announced(process, log.name), psutil.Process(process.pid), tls)
        finally:
            stop(process)
            if process.stdout is not None:
                process.stdout.close()


@contextmanager
def pair(
    source: str, target: str, tls: Certificates | None = None
) -> Iterator[tuple[Agent, Agent]]:
    """Two agents, each with its own device."""
    with agent(source, tls=tls) as sending, agent(target, tls=tls) as receiving:
        yield sending, receiving


def _announced(process: subprocess.Popen[str], log: str) -> str:
    if process.stdout is None:
        raise RuntimeError("the agent has no standard output")
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the agent did not start: {Path(log).read_text()}")
    return str(json.loads(line)["address"])
