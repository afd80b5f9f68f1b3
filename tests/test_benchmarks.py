"""The benchmarks' machinery: its statistics and reports are right, and what is cheap runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from benchmarks import devices, latency, live_figures
from benchmarks.__main__ import BENCHMARKS, run
from benchmarks.agents import pair
from benchmarks.contender import OURS, Contender, Copied, compare, in_turns
from benchmarks.live_figures import Lived
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
from benchmarks.picture import draw
from benchmarks.processes import run_measured, server
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


@pytest.mark.parametrize("name", ["copy", "tls", "delta", "live", "link"])
def test_contenders_run(name: str) -> None:
    require("loop", "bpf")
    outcome = run(BENCHMARKS[name], Options(quick=True))
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    assert all(figure.spread.count == 1 for figure in outcome.figures)
    assert any(figure.goal for figure in outcome.figures)
    names = [figure.name for figure in outcome.figures]
    assert len(set(names)) == len(names)


def test_ours_is_compared_with_the_best_other_of_each_turn() -> None:
    yardstick = Contender("loop", _never, is_yardstick=True)
    contenders = [
        Contender(OURS, _never),
        yardstick,
        Contender("a", _never),
        Contender("b", _never),
    ]
    runs = {
        OURS: [Copied(2.0, 1.0, 1.0), Copied(2.0, 1.0, 2.0)],
        "loop": [Copied(1.0, 0.1, 0.1), Copied(3.0, 0.1, 0.1)],
        "a": [Copied(3.0, 2.0, 2.0), Copied(5.0, 1.0, 1.0)],
        "b": [Copied(4.0, 0.5, 0.5), Copied(4.0, 3.0, 3.0)],
    }
    figures = {one.name: one for one in compare(contenders, runs, 1 << 30, speed=at_least(1.25))}
    assert figures["speed against the best other"].spread == Spread(1.75, 1.5, 2.0, 2)
    assert figures["speed against the best other"].is_met
    assert figures["speed against the loop"].spread == Spread(1.0, 0.5, 1.5, 2)
    assert figures["cpu, both ends, to the lowest other's"].spread == Spread(1.75, 1.5, 2.0, 2)
    assert figures["b: cpu, both ends"].spread == Spread(3.5, 1.0, 6.0, 2)


def test_contenders_take_turns_and_who_does_not_copy_is_told() -> None:
    require("loop")
    order: list[str] = []

    def copying(name: str) -> Contender:
        def copy(source: str, target: str) -> Copied:
            order.append(name)
            if name != "idle":
                devices.run("dd", f"if={source}", f"of={target}", "bs=1M", "oflag=direct")
            return Copied(1.0, 1.0, 1.0)

        return Contender(name, copy)

    size = 2 * devices.MIB
    with (
        devices.loop_device(size, devices.fill_mixed) as source,
        devices.loop_device(size) as target,
    ):
        runs = in_turns([copying("a"), copying(OURS)], source, target, 3)
        assert order == ["a", OURS, OURS, "a", "a", OURS]
        assert {name: len(made) for name, made in runs.items()} == {"a": 3, OURS: 3}
        with pytest.raises(RuntimeError, match="the copy of idle is not equal"):
            in_turns([copying("idle")], source, target, 1)


def test_a_command_is_measured_with_its_children() -> None:
    ran = run_measured("sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo done")
    assert ran.output == "done\n"
    assert 0 < ran.cpu_seconds <= ran.seconds * 2
    with pytest.raises(RuntimeError, match="exited with 3: oh"):
        run_measured("sh", "-c", "echo oh; exit 3")


def test_a_server_that_does_not_serve_is_an_error() -> None:
    with (
        pytest.raises(RuntimeError, match="does not get ready"),
        server("true", ready=lambda _: False),
    ):
        pass


def test_a_log_of_latencies_is_cut_and_summed_up() -> None:
    # Windows of a tenth of a second that end at 10.1, 10.2, 10.3; no coarseness: bucket = ns.
    text = "10100, 1, 4096, 5, 0, 0\n10200, 1, 4096, 0, 98, 2\n10300, 1, 4096, 0, 100, 0\n"
    windows = latency.parse(text)
    both = latency.cut(windows, 10.1, 10.35, 0)
    assert both.counts == (0, 198, 2)
    assert both.iops == pytest.approx(1000)
    assert both.percentile_seconds(0.99) == pytest.approx(1.5e-9)
    assert both.percentile_seconds(1.0) == pytest.approx(2.5e-9)
    # A stretch shorter than a window takes the next that begins in it.
    assert latency.cut(windows, 10.15, 10.16, 0).counts == (0, 100, 0)
    with pytest.raises(ValueError, match="ends too early"):
        latency.cut(windows, 10.3, 10.4, 0)


def test_buckets_of_latencies_are_those_of_fio() -> None:
    # fio 3.33's plat_idx_to_val: the middle of bucket 1000 is 1 << 14 + 40.5 * (1 << 14).
    counts = (*[0] * 1000, 1)
    expected = ((1 << 20) + 40.5 * (1 << 14)) / 1e9
    assert latency.Latencies(1.0, counts, 0).percentile_seconds(0.5) == pytest.approx(expected)
    coarse = latency.Latencies(1.0, (*[0] * 125, 1), 3).percentile_seconds(0.5)
    assert coarse == pytest.approx(((1 << 20) + 44 * (1 << 14)) / 1e9)


def test_figures_of_a_move_in_use() -> None:
    ours = Lived(1.0, 110, 0.06, (100.0, 99.0), (0.001, 0.002), 0.02, (("send", 0.05),))
    never = Lived(None, 400, 2.0, (100.0, 50.0), (0.001, 0.010))
    ready = Lived(3.0, 200, 0.1, (100.0, 50.0), (0.001, 0.020))
    runs = {OURS: [ours, ours], "background": [never, ready], "background+nodelay": [ready, ready]}
    figures = {one.name: one for one in live_figures.figures(5, 100, runs)}
    assert figures["5 MiB/s: bytes sent, to background's"].spread.median == pytest.approx(0.55)
    assert figures["5 MiB/s: guest's p99 during, to background's"].spread.most == pytest.approx(0.2)
    beyond = figures["5 MiB/s: downtime beyond dirty bytes / throughput"]
    assert beyond.spread.median == pytest.approx(40)
    assert beyond.is_met
    assert figures["5 MiB/s: background: ready in time"].spread.median == 0.5
    assert figures["5 MiB/s: background: time to ready"].spread == Spread(3.0, 3.0, 3.0, 1)
    assert figures[f"5 MiB/s: {OURS}: bytes sent / device"].is_met
    assert figures[f"5 MiB/s: {OURS}: downtime, send"].spread.median == pytest.approx(50)


def test_the_picture_shows_each_contender(tmp_path: Path) -> None:
    spread = Spread(1.5, 1.0, 2.0, 3)
    copy = [Figure(f"{name}: speed", "GB/s", spread) for name in (OURS, "qemu-img")]
    lived = [
        Figure(f"5 MiB/s: {name}: {what}", "ms", spread)
        for name in (OURS, "background")
        for what in ("downtime", "time to ready")
        if (name, what) != ("background", "time to ready")
    ]
    outcomes = (
        Outcome("copy", "a copy", tuple(copy)),
        Outcome("tls", "skipped", skipped="no tool"),
        Outcome("live", "in use", tuple(lived)),
    )
    file = tmp_path / "picture.svg"
    draw(file, Report({"processor": "some"}, "command", "now", outcomes))
    text = ElementTree.parse(file).getroot()
    shown = {"".join(one.itertext()).strip() for one in text.iter() if one.tag.endswith("text")}
    assert {OURS, "qemu-img", "background", "never", "5 MiB/s"} <= shown
    assert not any("TLS" in words for words in shown)
    draw(file, Report({}, "command", "now", ()))
    assert "nothing to draw" in file.read_text()


def _never(_source: str, _target: str) -> Copied:
    raise AssertionError("not to be run")


def test_nothing_stays_when_it_is_ended() -> None:
    require("loop")
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
        backing = Path(f"/sys/block/{Path(path).name}/loop/backing_file").read_text().strip()
        scratch = Path(backing).parent  # of this one: other workers have theirs
        assert scratch.name.startswith("warmsync-bench-")
        assert scratch.exists()
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert path.startswith("/dev/loop")
    assert not scratch.exists()
