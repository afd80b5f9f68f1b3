"""The floors: imports go downwards only. The table here is the building's plan, held as data."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A package's floor holds for everything in it. A module that is not here has no place to be.
FLOORS = {
    "native": 0,
    # Words: values and the rules they obey.
    "agent": 1,
    "agent.address": 1,
    "agent.config": 1,
    "agent.errors": 1,
    "agent.extent": 1,
    "agent.log": 1,
    "agent.migration": 1,
    "agent.units": 1,
    "agent.version": 1,
    # Brains: pure.
    "agent.certificate": 2,
    "agent.easing": 2,
    "agent.estimate": 2,
    "agent.fields": 2,
    "agent.heat": 2,
    "agent.layout": 2,
    "agent.partitions": 2,
    "agent.saving": 2,
    "agent.planner": 2,
    "agent.record": 2,
    "agent.roots": 2,
    "agent.rounds": 2,
    "agent.state": 2,
    "agent.statement": 2,
    "agent.superblock": 2,
    "agent.unread": 2,
    # Hands: they touch the host.
    "agent.ahead": 3,
    "agent.bell": 3,
    "agent.brake": 3,
    "agent.cgroup": 3,
    "agent.device": 3,
    "agent.doctor": 3,
    "agent.hook": 3,
    "agent.inventory": 3,
    "agent.journal": 3,
    "agent.qemu": 3,
    "agent.signer": 3,
    "agent.resize": 3,
    "agent.store": 3,
    "agent.tree": 3,
    "agent.throttle": 3,
    "agent.tracker": 3,
    # Pipe.
    "agent.carrier": 4,
    "agent.disk": 4,
    "agent.imprint": 4,
    "agent.peer": 4,
    "agent.prover": 4,
    "agent.reader": 4,
    "agent.writer": 4,
    # Ends.
    "agent.autopilot": 5,
    "agent.booting": 5,
    "agent.cutover": 5,
    "agent.ended": 5,
    "agent.growth": 5,
    "agent.inlet": 5,
    "agent.proof": 5,
    "agent.guest": 5,
    "agent.reconcile": 5,
    "agent.registry": 5,
    "agent.sender": 5,
    "agent.source": 5,
    "agent.target": 5,
    "agent.verify": 5,
    "agent.witness": 5,
    # Doors.
    "agent.rpc": 6,
    # House.
    "agent.__main__": 7,
    "agent.cli": 7,
    "agent.daemon": 7,
    "agent.display": 7,
    "agent.view": 7,
}

# Who may import a neighbour on the same floor; within a package, its own modules always may.
NEIGHBOURS = {
    "agent.address": {"agent.errors"},
    "agent.config": {"agent.address", "agent.errors", "agent.units"},
    "agent.migration": {"agent.errors"},
    "agent.units": {"agent.errors"},
    "agent.certificate": {"agent.fields", "agent.statement"},
    "agent.statement": {"agent.fields", "agent.roots"},
    "agent.rounds": {"agent.estimate"},
    "agent.easing": {"agent.rounds"},
    "agent.layout": {"agent.partitions", "agent.superblock"},
    "agent.partitions": {"agent.superblock"},
    "agent.brake": {"agent.cgroup", "agent.device"},
    "agent.doctor": {"agent.qemu", "agent.resize", "agent.signer"},
    "agent.inventory": {"agent.device"},
    "agent.record": {"agent.estimate", "agent.state"},
    "agent.qemu": {"agent.device"},
    "agent.tracker": {"agent.device", "agent.qemu", "agent.store"},
    "agent.tree": {"agent.device", "agent.store"},
    "agent.imprint": {"agent.reader"},
    "agent.peer": {"agent.carrier"},
    "agent.cutover": {"agent.sender"},
    "agent.proof": {"agent.sender"},
    "agent.registry": {
        "agent.ended",
        "agent.growth",
        "agent.sender",
        "agent.source",
        "agent.target",
        "agent.witness",
    },
    "agent.saving": {"agent.estimate"},
    "agent.target": {
        "agent.booting",
        "agent.growth",
        "agent.inlet",
        "agent.sender",
        "agent.witness",
    },
    "agent.source": {
        "agent.autopilot",
        "agent.cutover",
        "agent.guest",
        "agent.proof",
        "agent.reconcile",
        "agent.sender",
        "agent.verify",
    },
    "agent.reconcile": {"agent.sender", "agent.verify"},
    "agent.verify": {"agent.sender"},
    "agent.__main__": {"agent.cli"},
    "agent.cli": {"agent.daemon", "agent.display", "agent.view"},
    "agent.display": {"agent.view"},
}

# From which floor on others' modules may be used, and who may besides.
OUTSIDERS: dict[str, tuple[int, set[str]]] = {
    "asyncio": (3, set()),
    "uvloop": (7, set()),
    "qemu": (3, set()),
    "grpc": (6, {"agent.carrier.grpc"}),
    "grpc_channelz": (6, set()),
    "grpc_health": (6, set()),
    "grpc_reflection": (6, set()),
    "grpc_status": (6, set()),
    "google": (6, {"agent.carrier.wire"}),
    "warmsync": (6, {"agent.carrier.grpc", "agent.carrier.wire"}),
    "click": (7, set()),
    # Keys and signatures; the carrier has its TLS from OpenSSL itself.
    "cryptography": (7, {"agent.certificate", "agent.signer"}),
    "rich": (7, set()),
}


def room(module: str) -> str | None:
    """Return the entry of FLOORS that a module belongs to."""
    if module in FLOORS:
        return module
    parent = module.rpartition(".")[0]
    # Being somewhere in agent/ is no place yet.
    return room(parent) if parent and parent != "agent" else None


def imports(source: str) -> Iterator[str]:
    """Iterate all that is imported: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level + (node.module or "")
                continue
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
            # `from agent import doctor` imports a module, `from agent.units import x` a name.
            yield from (name if base == "agent" else base for name in names)


def violations(module: str, source: str) -> list[str]:
    """Return what is wrong with one module, a line each."""
    home = room(module)
    if home is None:
        return [f"{module} is not in the table of floors: add it to FLOORS"]
    found = (_violation(module, home, imported) for imported in imports(source))
    return sorted({line for line in found if line})


def _violation(module: str, home: str, imported: str) -> str | None:
    top = imported.partition(".")[0]
    if imported.startswith("."):
        return f"{module} imports {imported}: write the full name"
    if top in OUTSIDERS:
        floor, exceptions = OUTSIDERS[top]
        fine = FLOORS[home] >= floor or module in exceptions
        return None if fine else f"{module} imports {imported}: allowed from floor {floor} on"
    return _climb(module, home, imported) if top in ("agent", "native") else None


def _climb(module: str, home: str, imported: str) -> str | None:
    there = room(imported)
    if there is None:
        return f"{module} imports {imported}, which is not in the table of floors"
    up = FLOORS[there] > FLOORS[home]
    aside = FLOORS[there] == FLOORS[home] and there != home
    if up or (aside and there not in NEIGHBOURS.get(home, set())):
        return f"{module} (floor {FLOORS[home]}) imports {imported} (floor {FLOORS[there]})"
    return None


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> list[Path]:
    found = [path for top in ("agent", "native") for path in (ROOT / top).rglob("*.py*")]
    return sorted(path for path in found if path.suffix in (".py", ".pyi"))


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_go_downwards(path: Path) -> None:
    assert violations(name_of(path), path.read_text()) == []


def test_kernels_import_nothing_of_the_agent() -> None:
    kernels = [*(ROOT / "native").glob("*.pyx"), *(ROOT / "native").glob("*.pxd")]
    wrong = [
        f"{path.name}: {line}"
        for path in kernels
        for line in path.read_text().splitlines()
        if re.match(r"\s*(from|import|cimport)\s+(agent|warmsync|grpc|asyncio)\b", line)
    ]
    assert kernels
    assert wrong == []


def test_every_module_is_looked_at() -> None:
    names = {name_of(path) for path in modules()}
    assert {"agent.errors", "agent.tracker.scan", "agent.carrier.grpc", "native.frame"} <= names


def test_neighbours_are_neighbours_and_make_no_circle() -> None:
    assert all(
        FLOORS[home] == FLOORS[other] for home, others in NEIGHBOURS.items() for other in others
    )
    left = {home: set(others) for home, others in NEIGHBOURS.items()}
    while left:
        leaves = [home for home, others in left.items() if not others & left.keys()]
        assert leaves, f"these import each other in a circle: {sorted(left)}"
        for home in leaves:
            del left[home]


SEEDED = {
    "upwards": ("agent.rounds", "from agent.source import Source"),
    "upwards by package": ("agent.device", "from agent import source"),
    "upwards by plain import": ("agent.device", "import agent.rpc.server"),
    "upwards in a function": ("agent.state", "def f() -> None:\n    import agent.device"),
    "upwards for types only": (
        "agent.planner",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import agent.device",
    ),
    "sideways": ("agent.state", "from agent.rounds import Verdict"),
    "sideways, the other way": ("agent.estimate", "from agent.rounds import Verdict"),
    "out of the ground": ("native.frame", "from agent.errors import DataLoss"),
    "asyncio among the brains": ("agent.rounds", "import asyncio.events"),
    "asyncio in the ground": ("native", "from asyncio import sleep"),
    "grpc below the doors": ("agent.source", "import grpc.aio"),
    "grpc in another carrier": ("agent.carrier.tcp", "import grpc"),
    "stubs below the doors": ("agent.migration", "from warmsync.v1 import migration_pb2"),
    "a homeless module": ("agent.attic", "import os"),
    "a homeless import": ("agent.source", "from agent.attic import box"),
    "a homeless import by package": ("agent.source", "from agent import attic"),
    "relative": ("agent.rpc.server", "from . import client"),
    "relative to a module": ("agent.rpc.server", "from .client import x"),
}


@pytest.mark.parametrize("name", SEEDED)
def test_the_checker_notices(name: str) -> None:
    module, source = SEEDED[name]
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("agent.rounds", "from agent.estimate import Estimate"),
        ("agent.source", "from agent.rounds import Verdict\nfrom native.bitmap import DirtyBitmap"),
        ("agent.rpc.server", "from agent.rpc import listening\nimport grpc"),
        ("agent.carrier.grpc", "import grpc.aio\nfrom warmsync.v1 import peer_service_pb2"),
        ("agent.device", "import asyncio, os.path"),
        ("native.frame", "from native.buffer import AlignedBuffer"),
        ("agent.cli.host", "from agent import doctor"),
    ],
)
def test_the_checker_is_no_pedant(module: str, source: str) -> None:
    assert violations(module, source) == []
