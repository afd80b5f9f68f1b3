"""docs/correctness.md names tests and code that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/correctness.md").read_text()
TABLE = [line.split("|")[1:-1] for line in PAGE.splitlines() if re.match(r"\| \d", line)]


def sources(*folders: str) -> str:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return "\n".join(path.read_text() for path in paths)


def test_every_rule_is_there() -> None:
    assert {int(row[0].split()[0]) for row in TABLE} == set(range(1, 14))


def test_every_test_exists() -> None:
    defined = set(re.findall(r"^ *def (test_\w+)", sources("tests"), re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert named
    assert named - defined == set()
    assert all("`test_" in row[3] for row in TABLE)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0].strip())
def test_every_place_exists(row: list[str]) -> None:
    code = sources("agent")
    for place in re.findall(r"`([^`]+)`", row[1]):
        if "/" in place:
            assert list(ROOT.glob(place)), place
        else:
            for name in place.replace("*", "").split("."):
                assert re.search(rf"\b(class|def|self\.) ?{name}", code) or name == "pending", name
