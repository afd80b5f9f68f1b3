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
    "agent.certificate.fields": 2,
    "agent.heat": 2,
    "agent.layout": 2,
    "agent.layout.partitions": 2,
    "agent.saving": 2,
    "agent.planner": 2,
    "agent.layout.reach": 2,
    "agent.record": 2,
    "agent.certificate.roots": 2,
    "agent.rounds": 2,
    "agent.state": 2,
    "agent.certificate.statement": 2,
    "agent.layout.superblock": 2,
    "agent.unread": 2,
    "agent.layout.xfs_log": 2,
    # Hands: they touch the host.
    "agent.ahead": 3,
    "agent.bell": 3,
    "agent.brake": 3,
    "agent.cgroup": 3,
    "agent.counters": 3,
    "agent.device": 3,
    "agent.doctor": 3,
    "agent.hook": 3,
    "agent.inventory": 3,
    "agent.journal": 3,
    "agent.nameplate": 3,
    "agent.qemu": 3,
    "agent.signer": 3,
    "agent.resize": 3,
    "agent.store": 3,
    "agent.threads": 3,
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
    "agent.source.autopilot": 5,
    "agent.target.booting": 5,
    "agent.source.books": 5,
    "agent.source.comparisons": 5,
    "agent.target.claim": 5,
    "agent.source.course": 5,
    "agent.source.cutover": 5,
    "agent.target.delivery": 5,
    "agent.source.doubts": 5,
    "agent.registry.ended": 5,
    "agent.registry.fence": 5,
    "agent.source.ending": 5,
    "agent.target.growth": 5,
    "agent.target.inlet": 5,
    "agent.target.intake": 5,
    "agent.target.ledger": 5,
    "agent.source.proof": 5,
    "agent.source.guest": 5,
    "agent.source.handover": 5,
    "agent.source.settling": 5,
    "agent.registry.settling": 5,
    "agent.target.settling": 5,
    "agent.target.holding": 5,
    "agent.source.link": 5,
    "agent.source.patience": 5,
    "agent.registry.leftovers": 5,
    "agent.registry.places": 5,
    "agent.registry.preparation": 5,
    "agent.source.prepared": 5,
    "agent.registry.reception": 5,
    "agent.source.reconcile": 5,
    "agent.registry": 5,
    "agent.registry.reservations": 5,
    "agent.registry.revival": 5,
    "agent.registry.waiting": 5,
    "agent.sender": 5,
    "agent.shrinkage": 5,
    "agent.source": 5,
    "agent.source.stall": 5,
    "agent.target": 5,
    "agent.source.verify": 5,
    "agent.target.witness": 5,
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
    "agent.certificate": {"agent.certificate.fields", "agent.certificate.statement"},
    "agent.certificate.statement": {"agent.certificate.fields", "agent.certificate.roots"},
    "agent.rounds": {"agent.estimate"},
    "agent.easing": {"agent.rounds"},
    "agent.layout": {"agent.layout.partitions", "agent.layout.superblock"},
    "agent.layout.partitions": {"agent.layout.superblock"},
    "agent.layout.reach": {
        "agent.layout.partitions",
        "agent.layout.superblock",
        "agent.layout.xfs_log",
    },
    "agent.layout.xfs_log": {"agent.layout.superblock"},
    "agent.brake": {"agent.cgroup", "agent.device"},
    "agent.counters": {"agent.device"},
    "agent.doctor": {"agent.qemu", "agent.resize", "agent.signer"},
    "agent.inventory": {"agent.device"},
    "agent.nameplate": {"agent.device"},
    "agent.record": {"agent.estimate", "agent.state"},
    "agent.registry.leftovers": {"agent.registry.places"},
    "agent.qemu": {"agent.device", "agent.nameplate"},
    "agent.tracker": {"agent.device", "agent.qemu", "agent.store"},
    "agent.tree": {"agent.device", "agent.store"},
    "agent.imprint": {"agent.reader"},
    "agent.peer": {"agent.carrier"},
    "agent.source.cutover": {"agent.sender", "agent.shrinkage"},
    "agent.source.proof": {"agent.sender"},
    "agent.registry.preparation": {
        "agent.registry.places",
        "agent.source.prepared",
        "agent.shrinkage",
    },
    "agent.registry.reception": {
        "agent.registry.places",
        "agent.target.claim",
        "agent.target.growth",
        "agent.sender",
        "agent.target",
        "agent.target.witness",
    },
    "agent.registry.ended": {"agent.registry.fence", "agent.source.ending"},
    "agent.registry.revival": {
        "agent.registry.ended",
        "agent.registry.fence",
        "agent.registry.preparation",
        "agent.registry.reception",
        "agent.registry.reservations",
        "agent.registry.waiting",
        "agent.sender",
        "agent.source",
        "agent.source.ending",
        "agent.target",
    },
    "agent.registry.waiting": {
        "agent.registry.ended",
        "agent.registry.fence",
        "agent.registry.preparation",
    },
    "agent.registry": {
        "agent.registry.leftovers",
        "agent.registry.places",
        "agent.registry.ended",
        "agent.registry.fence",
        "agent.registry.preparation",
        "agent.registry.reception",
        "agent.registry.reservations",
        "agent.registry.revival",
        "agent.registry.settling",
        "agent.registry.waiting",
        "agent.sender",
        "agent.source",
        "agent.target",
    },
    "agent.saving": {"agent.estimate"},
    "agent.target.claim": {"agent.target.growth"},
    "agent.target.delivery": {"agent.target.holding", "agent.target.intake", "agent.target.ledger"},
    "agent.target.holding": {
        "agent.target.claim",
        "agent.target.growth",
        "agent.target.ledger",
        "agent.sender",
        "agent.target.witness",
    },
    "agent.target.intake": {"agent.target.holding", "agent.target.inlet", "agent.target.ledger"},
    "agent.target.ledger": {"agent.target.booting"},
    "agent.target": {
        "agent.target.claim",
        "agent.target.delivery",
        "agent.target.growth",
        "agent.target.holding",
        "agent.target.inlet",
        "agent.target.intake",
        "agent.target.ledger",
        "agent.target.settling",
        "agent.sender",
        "agent.target.witness",
    },
    "agent.source.books": {
        "agent.source.autopilot",
        "agent.source.cutover",
        "agent.source.prepared",
        "agent.sender",
    },
    "agent.source.course": {
        "agent.source.books",
        "agent.source.doubts",
        "agent.source.guest",
        "agent.source.handover",
        "agent.source.proof",
        "agent.sender",
    },
    "agent.source.doubts": {
        "agent.source.books",
        "agent.source.proof",
        "agent.source.reconcile",
        "agent.sender",
    },
    "agent.source.ending": {
        "agent.source.autopilot",
        "agent.source.books",
        "agent.source.comparisons",
        "agent.source.cutover",
        "agent.source.guest",
        "agent.source.handover",
        "agent.source.proof",
        "agent.sender",
    },
    "agent.source.settling": {
        "agent.source.cutover",
        "agent.source.books",
        "agent.source.ending",
        "agent.source.handover",
    },
    "agent.registry.settling": {
        "agent.registry.ended",
        "agent.registry.fence",
        "agent.registry.revival",
        "agent.source.ending",
        "agent.source.settling",
    },
    "agent.target.settling": {"agent.target.claim", "agent.target.ledger"},
    "agent.source.handover": {
        "agent.source.books",
        "agent.source.cutover",
        "agent.source.doubts",
        "agent.source.guest",
        "agent.source.prepared",
        "agent.source.proof",
        "agent.sender",
    },
    "agent.source.link": {
        "agent.source.books",
        "agent.source.cutover",
        "agent.source.doubts",
        "agent.source.handover",
        "agent.source.prepared",
        "agent.sender",
    },
    "agent.source.stall": {"agent.sender"},
    "agent.source.patience": {
        "agent.source.books",
        "agent.source.cutover",
        "agent.source.handover",
        "agent.sender",
    },
    "agent.source": {
        "agent.source.autopilot",
        "agent.source.books",
        "agent.source.comparisons",
        "agent.source.course",
        "agent.source.cutover",
        "agent.source.doubts",
        "agent.source.ending",
        "agent.source.guest",
        "agent.source.handover",
        "agent.source.link",
        "agent.source.patience",
        "agent.source.prepared",
        "agent.source.proof",
        "agent.source.settling",
        "agent.sender",
        "agent.source.stall",
        "agent.source.verify",
    },
    "agent.source.reconcile": {"agent.sender", "agent.source.verify"},
    "agent.source.verify": {"agent.sender"},
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
