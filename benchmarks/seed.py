"""`python -m benchmarks.seed`: one full copy between agents that run already.

For where this process cannot be: gRPC connects from threads of its own, which cannot be moved to
another network namespace. A process can.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import psutil

from benchmarks.agents import Agent
from benchmarks.certificates import Certificates
from benchmarks.moves import migration


@dataclass(frozen=True, slots=True)
class Seeded:
    """One copy: from the request to the end of round 0, and what went over the wire."""

    seconds: float
    sent_bytes: int


def seed(
    within: Sequence[str],
    ends: tuple[Agent, Agent],
    source: str,
    target: str,
    *,
    compress: bool,
) -> Seeded:
    """Copy, asked for by a process that `within` puts elsewhere. RuntimeError with its words."""
    sender, receiver = ends
    if sender.tls is None:
        raise ValueError("agents of other hosts speak TLS")
    words = [sender.address, receiver.address, source, target, str(sender.tls.qemu_directory)]
    command = [*within, sys.executable, "-m", "benchmarks.seed", *words]
    command += ["--compress"] if compress else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode != 0:
        raise RuntimeError(f"no copy: {done.stderr}")
    return Seeded(**json.loads(done.stdout))


@click.command()
@click.argument("sender")
@click.argument("receiver")
@click.argument("source")
@click.argument("target")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--compress", is_flag=True)
def main(
    sender: str, receiver: str, source: str, target: str, directory: Path, *, compress: bool
) -> None:
    """Print what `seed` returns, as JSON."""
    tls = Certificates.of(directory)
    first, second = (Agent(address, psutil.Process(), tls) for address in (sender, receiver))
    with migration(first, second, source, target, compress=compress) as move:
        seconds = move.seed_seconds()
        seeded = Seeded(seconds, move.look().progress.sent_bytes)
    click.echo(json.dumps(asdict(seeded)))


if __name__ == "__main__":
    main()
