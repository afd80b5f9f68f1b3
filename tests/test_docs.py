"""The documents hold what they promise: links resolve, commands exist, nothing is orphaned."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from agent.cli import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_resolve(page: Path) -> None:
    links = [link.partition("#")[0] for link in LINK.findall(page.read_text())]
    targets = [(page.parent / link).resolve() for link in links if link and ":" not in link]
    missing = [_name(target) for target in targets if not target.exists()]
    assert missing == []


def test_all_documents_are_linked_from_the_readme() -> None:
    linked = set(LINK.findall(README))
    assert [
        name for page in PAGES if (name := _name(page)).startswith("docs/") and name not in linked
    ] == []


def _commands(text: str) -> list[list[str]]:
    """Return the words of every `warmsync ...` in blocks of code and in quotes."""
    lines = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"(?:^|`|\$ )warmsync ([a-z][^`\n#]*)", lines, re.MULTILINE)
    return [line.split() for line in found]


@pytest.mark.parametrize("page", [page for page in PAGES if _commands(page.read_text())], ids=_name)
def test_commands_exist(page: Path) -> None:
    for name, *words in _commands(page.read_text()):
        command = cli.commands.get(name)
        if isinstance(command, click.Group):
            command = command.commands.get(words[0])
        assert command is not None, f"{_name(page)}: warmsync {name}"
        context = click.Context(command)
        known = {flag for item in command.get_params(context) for flag in item.opts}
        unknown = [word for word in words if word.startswith("--") and word not in known]
        assert unknown == [], f"{_name(page)}: warmsync {name} {' '.join(words)}"


def test_make_targets_of_the_readme_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)) <= set(targets)


def test_the_manual_names_every_state() -> None:
    from warmsync.v1.migration_pb2 import State

    manual = (ROOT / "docs/operations.md").read_text()
    states = [name.removeprefix("STATE_") for name in State.keys()[1:]]
    assert [state for state in states if f"| {state} |" not in manual] == []


def test_every_dependency_has_a_reason() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in project["dependency-groups"].values():
        wanted += [spec for spec in extra if isinstance(spec, str)]
    names = {re.split(r"[><=\[ ]", spec)[0] for spec in wanted}
    for listing in ("apt-build.txt", "apt-test.txt"):
        names |= set((ROOT / "packaging" / listing).read_text().split())
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE)
    explained = {name.strip() for row in rows for name in row.split(",")}
    named = {"types-*" if name.startswith("types-") else name for name in names}
    assert named - explained == set()
