"""Directories that look like cgroups, and a kernel that takes the lines written to them."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent import cgroup as cgroup_module
from agent.cgroup import V1_FILE, V2_FILE, Cgroup

NONE = "max"


@dataclass
class FakeKernel:
    """Does what the kernel does with a line; `refuses[disk]` is the errno that it answers with.

    `written` are the lines, in order.
    """

    written: list[str] = field(default_factory=list)
    refuses: dict[str, int] = field(default_factory=dict)

    def put(self, descriptor: int, text: str) -> None:
        disk, rate = text.split()
        if number := self.refuses.get(disk):
            raise OSError(number, os.strerror(number))
        self.written.append(text)
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        rates = dict(line.split(" ", 1) for line in file.read_text().splitlines())
        if file.name == V1_FILE:
            rates[disk] = rate
            gone = "0"
        else:
            old = dict(word.split("=") for word in rates.get(disk, ALL_FREE).split())
            rates[disk] = " ".join(f"{key}={value}" for key, value in _merged(old, rate).items())
            gone = ALL_FREE
        if rates[disk] == gone:
            del rates[disk]
        file.write_text("".join(f"{disk} {rates[disk]}\n" for disk in rates))


ALL_FREE = "rbps=max wbps=max riops=max wiops=max"


def _merged(old: dict[str, str], rate: str) -> dict[str, str]:
    key, value = rate.split("=")
    if key not in old:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return {**old, key: value}


def install(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    kernel = FakeKernel()
    monkeypatch.setattr(cgroup_module, "put", kernel.put)
    return kernel


def make(directory: Path, file: str = V1_FILE, *, populated: bool = True) -> Path:
    """Make a cgroup's directory."""
    directory.mkdir()
    (directory / file).touch()
    (directory / "cgroup.procs").write_text("1\n" if populated else "")
    (directory / "cgroup.events").write_text(f"populated {int(populated)}\nfrozen 0\n")
    return directory


def opened(directory: Path) -> Cgroup:
    """Return a directory as the agent has it."""
    file = V2_FILE if (directory / V2_FILE).exists() else V1_FILE
    return Cgroup(str(directory), directory.stat().st_ino, file)
