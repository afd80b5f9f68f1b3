"""The benchmarks' machinery: its statistics and reports are right, and what is cheap runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import devices
from benchmarks.__main__ import BENCHMARKS, run
from benchmarks.agents import pair
from benchmarks.measure import (
    Figure,
    ImpossibleError,
    Options,
    Spread,
    at_least,
    at_most,
    between_neighbours,
    steps,
)
from benchmarks.moves import migration
from benchmarks.report import (
    BEGIN,
    END,
    Outcome,
    Report,
    number,
    print_outcome,
    to_json,
    to_markdown,
    write_markdown,
)
from tests import host
from tests.devices import require

ROOT = Path(__file__).parents[1]
MET = Figure("fast", "ratio", Spread(0.97, 0.9, 1.0, 5), at_least(0.97))
MISSED = Figure("small", "MiB", Spread(201, 201, 201, 1), at_most(200), "a note")
PLAIN = Figure("seen", "GB/s", Spread(1.5, 1.0, 2.0, 2))
REPORT = Report(
    {"kernel": "some"},
    "python -m benchmarks",
    "2026-01-02 03:04 UTC",
    (
        Outcome("first", "the first", (MET, MISSED, PLAIN)),
        Outcome("second", "the second", skipped="no such thing"),
    ),
)


def test_spread_is_of_all_values() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0, 4)
    assert Spread.of(iter([4.0])) == Spread(4.0, 4.0, 4.0, 1)
    with pytest.raises(ValueError, match="no measurements"):
        Spread.of([])


def test_goals_include_their_bound() -> None:
    assert [at_least(2).is_met(value) for value in (1.99, 2, 2.01)] == [False, True, True]
    assert [at_most(2).is_met(value) for value in (1.99, 2, 2.01)] == [True, True, False]
    assert (MET.is_met, MISSED.is_met, PLAIN.is_met) == (True, False, None)


def test_an_even_drift_cancels_out_between_neighbours() -> None:
    # Each measurement is 10 less than the one before; the inner ones cost a tenth.
    outer, inner = [100.0, 80.0, 60.0], [90.0 * 0.9, 70.0 * 0.9]
    assert between_neighbours(outer, inner) == pytest.approx([0.9, 0.9])
    with pytest.raises(ValueError, match="do not lie between"):
        between_neighbours([1.0, 2.0], [1.0, 2.0])


def test_steps_are_ratios_to_the_one_before() -> None:
    assert steps([2.0, 3.0, 1.5]) == [1.5, 0.5]


def test_options_choose_sizes_and_rounds() -> None:
    assert (Options().pick(10, 1), Options(quick=True).pick(10, 1)) == (10, 1)
    assert (Options().repeat(5), Options(quick=True).repeat(5)) == (5, 1)
    assert (Options(3).repeat(5), Options(3, quick=True).repeat(5)) == (3, 3)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.98765, "0.988"), (9.99, "9.990"), (12.34, "12.3"), (1234.5, "1234"), (-0.5, "-0.500")],
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown


def test_the_json_holds_all() -> None:
    shown = json.loads(json.dumps(to_json(REPORT)))
    assert shown["machine"] == {"kernel": "some"}
    first, second = shown["benchmarks"]
    assert second == {
        "name": "second",
        "title": "the second",
        "skipped": "no such thing",
        "figures": [],
    }
    assert first["figures"][0] == {
        "name": "fast",
        "unit": "ratio",
        "median": 0.97,
        "min": 0.9,
        "max": 1.0,
        "runs": 5,
        "goal": {"at_least": 0.97},
        "met": True,
        "note": "",
    }
    assert first["figures"][1]["goal"] == {"at_most": 200}
    assert (first["figures"][2]["goal"], first["figures"][2]["met"]) == (None, None)


def test_the_markdown_is_a_table_a_benchmark() -> None:
    lines = to_markdown(REPORT).splitlines()
    assert "| fast | 0.970 | 0.900 .. 1.000 | >= 0.97 | yes | 5 |" in lines
    assert "| small (a note) | 201 MiB |  | <= 200 | NO | 1 |" in lines
    assert "| seen | 1.500 GB/s | 1.000 .. 2.000 |  |  | 2 |" in lines
    assert "Skipped: no such thing." in lines
    columns = {line.count("|") for line in lines if line.startswith("|")}
    assert columns == {7}


def test_the_markdown_goes_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{BEGIN}\nold \\1\n{END}\n\nAfter\n")
    write_markdown(page, REPORT)
    write_markdown(page, REPORT)
    text = page.read_text()
    assert text.startswith(f"# Before\n\n{BEGIN}\n\nMeasured 2026-01-02")
    assert text.endswith(f"{END}\n\nAfter\n")
    assert "old" not in text
    assert text.count("### first") == 1
    write_markdown(tmp_path / "new.md", REPORT)
    assert "### first" in (tmp_path / "new.md").read_text()


def test_the_page_of_the_documentation_has_the_marks() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text()
    assert 0 < text.index(BEGIN) < text.index(END)


def test_the_terminal_shows_figures_and_reasons() -> None:
    console = Console(file=StringIO(), width=80)
    for outcome in REPORT.outcomes:
        print_outcome(console, outcome)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in shown for word in ("0.970", ">= 0.97", "NO", "201 MiB", "no such thing"))


def test_missed_goals_are_named() -> None:
    assert REPORT.unmet == ["first: small"]


def test_what_a_host_cannot_do_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_memory_bytes: int) -> None:
        raise ImpossibleError("no memory")

    monkeypatch.setattr("benchmarks.scan_speed.require_devices", refuse)
    outcome = run(BENCHMARKS["scan"], Options(quick=True))
    assert (outcome.figures, outcome.skipped) == ((), "no memory")


def test_mixed_content_is_mixed(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"")
    devices.fill_mixed(image, 10 * devices.MIB)
    pieces = [
        image.read_bytes()[start : start + devices.MIB]
        for start in range(0, 10 * devices.MIB, devices.MIB)
    ]
    zero = bytes(devices.MIB)
    assert sum(piece == zero for piece in pieces) == 2
    assert sum(b"lazy dog" in piece for piece in pieces) == 1
    assert len(set(pieces)) == 9


def test_unequal_devices_are_noticed(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    size = 5 * devices.MIB
    for path in (first, second):
        path.write_bytes(bytes(size))
    devices.check_equal(str(first), str(second))
    with second.open("r+b") as file:
        file.seek(size - 1)
        file.write(b"x")
    with pytest.raises(RuntimeError, match="differ from 4194304 on"):
        devices.check_equal(str(first), str(second))


def test_cheap_benchmarks_run(tmp_path: Path) -> None:
    require("loop")
    command = [sys.executable, "-m", "benchmarks", "take", "scan", "--quick"]
    command += ["--json", str(tmp_path / "out.json"), "--markdown", str(tmp_path / "out.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert [one["name"] for one in found["benchmarks"]] == ["take", "scan"]
    for benchmark in found["benchmarks"]:
        assert benchmark["figures"], benchmark["skipped"]
        assert all(figure["median"] > 0 for figure in benchmark["figures"])


def test_a_copy_by_agents_is_measured() -> None:
    require("loop", "bpf")
    size = 8 * devices.MIB
    with (
        devices.loop_device(size, devices.fill_mixed) as source,
        devices.loop_device(size) as target,
        pair(source, target) as (sender, receiver),
    ):
        with migration(sender, receiver, source, target) as move:
            assert 0 < move.seed_seconds(60) < 60
            assert move.look().progress.total_bytes == size
        devices.check_equal(source, target)
        assert sender.cpu_seconds() > 0
        assert sender.peak_bytes() >= sender.resident_bytes() > devices.MIB


def test_nothing_stays_when_it_is_ended() -> None:
    require("loop")
    before = _leftovers()
    code = (
        "import signal\n"
        "from benchmarks.__main__ import end_cleanly\n"
        "from benchmarks.devices import loop_device\n"
        "signal.signal(signal.SIGTERM, end_cleanly)\n"
        "with loop_device(1 << 20) as path:\n"
        "    print(path, flush=True)\n"
        "    signal.pause()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        path = process.stdout.readline().strip()
        assert Path(f"/sys/block/{Path(path).name}/loop/backing_file").exists()
        scratch = _leftovers() - before
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert path.startswith("/dev/loop")
    assert scratch
    assert not scratch & _leftovers()


def _leftovers() -> set[str]:
    return {name for name in os.listdir(host.SCRATCH) if name.startswith("warmsync-bench-")}
