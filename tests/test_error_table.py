"""docs/errors.md lists every reason in the code with its status, and no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from agent import errors
from agent.rpc.errors import to_status

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/errors.md").read_text()
CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.WarmsyncError)
}
PASSED_ON = {"error.reason", "info.reason"}
"""Reasons that are somebody else's, told again."""
CODES = {
    0: "OK",
    1: "CANCELLED",
    3: "INVALID_ARGUMENT",
    5: "NOT_FOUND",
    6: "ALREADY_EXISTS",
    7: "PERMISSION_DENIED",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    15: "DATA_LOSS",
}


def reasons_in(source: str) -> Iterator[tuple[str, str]]:
    """Iterate (reason, class) of all errors that are made; variable parts of a reason are `*`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
            continue
        first = node.args[0]
        if node.func.id in CLASSES or (node.func.id == "kind" and _is_text(first)):
            yield _reason(first), node.func.id


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr | ast.Constant)


def _reason(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else "*" for p in node.values)
    return ast.unparse(node)


@cache
def made() -> dict[str, set[str]]:
    """Return the classes of all reasons that the agent makes."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "agent").rglob("*.py")):
        for reason, kind in reasons_in(path.read_text()):
            if reason not in PASSED_ON:
                found.setdefault(reason, set()).add(kind)
    return found


@cache
def listed() -> dict[str, tuple[str, str]]:
    """Return (status, exit code) of all reasons in the page."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines()]
    return {
        reason: (row[2], row[3])
        for row in rows
        if len(row) == 5
        for reason in re.findall(r"`([A-Z_*]+)`", row[1])
    }


def entries(reason: str) -> list[str]:
    """Return what the page has of a reason of the code."""
    if reason in listed():
        return [reason]
    form = re.compile(re.escape(reason).replace(r"\*", "[A-Z_]+"))
    # PEER_* must not take PEER_LOST, which has a row of its own.
    return [row for row in listed() if "*" in reason and row not in made() and form.fullmatch(row)]


def test_every_reason_is_listed() -> None:
    assert [reason for reason in made() if not entries(reason)] == []


def test_nothing_else_is_listed() -> None:
    assert set(listed()) - {row for reason in made() for row in entries(reason)} == set()


@pytest.mark.parametrize("reason", sorted(made()))
def test_the_status_is_the_codes(reason: str) -> None:
    kinds = made()[reason]
    for row in entries(reason):
        if kinds == {"kind"}:
            assert listed()[row][0] == "the answer's"
        else:
            statuses = {CODES[to_status(CLASSES[kind]("X", "x")).code] for kind in kinds}
            assert set(listed()[row][0].split(", ")) == statuses


def test_every_row_has_a_mend_and_an_exit_code() -> None:
    for line in PAGE.splitlines():
        if re.match(r"\|.*`[A-Z_*]+`", line):
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            assert len(cells) == 5, line
            assert cells[3] in ("1", "2", "3", "130", "-"), line
            assert cells[4], line


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise NotFound('X', 'y')", "X"),
        ("NotFound(f'{a}_B', 'y')", "*_B"),
        ("kind(f'A_{b}', 'y')", "A_*"),
    ],
)
def test_reasons_are_found(source: str, reason: str) -> None:
    assert [found for found, _ in reasons_in(source)] == [reason]
