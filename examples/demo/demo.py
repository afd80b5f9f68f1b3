"""One warm migration on this host, from a live writer to a byte compare: `make demo`.

Two agents, a source disk that fio writes to all the time, and an empty target disk. The commands
shown are those that an operator, or a provider's own software, would run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from agent.units import format_bytes, format_seconds, parse_size
from examples.demo.agents import Agent, ebpf_obstacle, start_agent
from examples.demo.disks import DemoFailed, Disk, differ, fill, loop_obstacle, open_disk, scratch
from examples.demo.guest import Guest, boot, check_fio

# A scan reads the whole disk for each take, and two takes are part of the cutover.
MAX_DOWNTIME = {"ebpf": "500ms", "scan": "10s"}
TIMEOUT = "5m"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. 0 if it converged and both disks are equal, 1 if not, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="demo", description="One warm migration on this host.")
    parser.add_argument("--size", default="1G", help="size of the disks (default: %(default)s)")
    parser.add_argument("--images", action="store_true", help="image files, even as root")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with ExitStack() as stack:
            try:
                return play(stack, parse_size(options.size), images=options.images)
            finally:
                _ignore_signals()  # a second Ctrl-C must not stop the cleaning up
    except DemoFailed as error:
        print(f"demo: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; all is cleaned up", file=sys.stderr)
        return 130


def play(stack: ExitStack, size_bytes: int, *, images: bool) -> int:
    """Set the stage, move the disk while the guest writes, compare. Returns the exit code."""
    check_fio()
    directory = stack.enter_context(scratch(2 * size_bytes))
    obstacle = "as was asked for" if images else find_obstacle(directory)
    tracker = "scan" if obstacle else "ebpf"
    source, target = (
        stack.enter_context(open_disk(directory / name, size_bytes, device=not obstacle))
        for name in ("source.img", "target.img")
    )
    introduce(source, target, tracker, obstacle)
    fill(source)
    there = stack.enter_context(start_agent("there", target, directory))
    here = stack.enter_context(start_agent("here", source, directory))
    guest = stack.enter_context(boot(source, directory))
    move(here, there, guest, tracker, f"{source.path}:{target.path}")
    return compare(source, target, guest)


def move(here: Agent, there: Agent, guest: Guest, tracker: str, volume: str) -> None:
    """Migrate from one agent to the other; the guest writes until that has converged."""
    what = ["--id", "demo", "--peer", there.address, "--volume", volume, "--tracker", tracker]
    until = ["--wait", "converged", "--timeout", TIMEOUT, "--max-downtime", MAX_DOWNTIME[tracker]]
    here.ask("migrate", *what, *until)
    guest.check_writing()
    print("\nConverged, and the guest is still writing. It is powered down now.\n")
    guest.power_down()
    # Forced: the guest is off, so to wait for another CONVERGED, if the last one has just lapsed,
    # would only lengthen the downtime.
    report(here.ask("cutover", "demo", "--force"))


def compare(source: Disk, target: Disk, guest: Guest) -> int:
    """Compare the disks, and look for the guest's writes on the target; 1 if they are not there."""
    difference = differ(source, target)
    say("byte compare", difference or f"equal, all {format_bytes(source.size_bytes)}")
    if difference:
        return 1
    blocks = guest.find_writes(target)
    say("fio's verification", f"all {blocks} blocks it wrote are on the target, whole, in place")
    return 0


def find_obstacle(directory: Path) -> str:
    """Return why loop devices and the ebpf tracker cannot be used; empty if they can."""
    if os.geteuid() != 0:
        return "this is not root"
    return loop_obstacle(directory) or ebpf_obstacle()


def introduce(source: Disk, target: Disk, tracker: str, obstacle: str) -> None:
    """Say what will be moved and why so."""
    kind = "image files" if obstacle else "loop devices"
    print(f"{source.path} -> {target.path}, {kind} of {format_bytes(source.size_bytes)}")
    print(f"tracker {tracker}" + (f" on image files: {obstacle}" if obstacle else ""))
    print("The guest, fio, writes 20 MiB/s to the source and discards all the time.\n", flush=True)


def report(done: dict[str, Any]) -> None:
    """Print what the cutover's JSON says."""
    parts = {name.removesuffix("_seconds"): took for name, took in done["downtime_parts"].items()}
    print()
    say("downtime", format_seconds(done["downtime_seconds"]))
    say("", ", ".join(f"{name.replace('_', ' ')} {format_seconds(parts[name])}" for name in parts))
    say("predicted", format_seconds(done["predicted_downtime_seconds"]))
    say("rounds", str(done["rounds"]))
    size, sent = done["bytes_total"], done["bytes_sent"]
    say("sent", f"{format_bytes(sent)} ({sent / size:.0%} of the device's {format_bytes(size)})")


def say(label: str, text: str) -> None:
    """Print a line of the result."""
    print(f"{label:<18}  {text}", flush=True)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
