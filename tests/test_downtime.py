"""The benchmark of guests' downtime: its model's arithmetic, its figures, what it listens to."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import downtime_figures, tables
from benchmarks.boots import check_kept
from benchmarks.contender import OURS
from benchmarks.downtime_figures import COLD, MIRROR, REBOOT, Host, Moved
from benchmarks.measure import Figure
from benchmarks.scaling import (
    Warm,
    Whole,
    fit,
    follow_seconds,
    last_bytes,
    link_bytes_per_second,
    warm_seconds,
    whole_seconds,
)
from benchmarks.serial import listening
from benchmarks.ways import Handed

# Scattered rounds go at a quarter of 4 GB/s: 1 GB/s here, 0.5 GB/s over the link below.
WARM = Warm(
    fixed_seconds=0.03,
    last_bytes=8e6,
    unread_bytes=20e6,
    read_bytes_per_second=2e9,
    copy_bytes_per_second=4e9,
    write_bytes_per_second=0.1e9,
    table_seconds=0.02,
)
LINK = 0.5e9
HOST = Host(read_bytes_per_second=2e9, table_seconds=0.02)
PARTS = (("send", 0.01), ("verify", 0.05))
WARM_RUN = Moved(
    0.2, 0.048, 4.0, 2.0, 0.1e9, Handed(2_008_000_000, 8_000_000, 20_000_000, 0.5, 0, 0.4, PARTS)
)
RUNS = {
    OURS: [WARM_RUN, WARM_RUN],
    MIRROR: [Moved(0.2, 0.3, 5.0, 3.0, 0.1e9, Handed(1_000_000_000, 0, 0, 1.0))] * 2,
    COLD: [
        Moved(0.2, 1.1, 4.0, 1.3, 0.1e9, Handed(2_000_000_000, 2_000_000_000, 0, 0.95, 0, 0, PARTS))
    ]
    * 2,
    REBOOT: [Moved(0.4, 0.0, 4.0, 0.4, 0.1e9, Handed())] * 2,
}


def test_a_link_carries_its_bits_less_the_headers() -> None:
    assert link_bytes_per_second(10) == pytest.approx(1.175e9)
    assert link_bytes_per_second(100) == pytest.approx(10 * link_bytes_per_second(10))


def test_the_downtime_is_the_sum_of_its_parts() -> None:
    # 30 ms fixed, 20 ms tables, 8 MB at 1 GB/s, 20 MB read at 2 GB/s.
    assert warm_seconds(WARM) == pytest.approx(0.03 + 0.02 + 0.008 + 0.010)


def test_a_slower_link_sends_slower_and_leaves_more() -> None:
    # The guest writes at a tenth of what could be sent here, at a fifth of the link.
    assert last_bytes(WARM, LINK) == pytest.approx(8e6 * 0.9 / 0.8)
    assert warm_seconds(WARM, LINK) == pytest.approx(0.03 + 0.02 + 0.018 + 0.010)


def test_a_link_quicker_than_the_host_changes_nothing() -> None:
    assert warm_seconds(WARM, 1e12) == warm_seconds(WARM)
    assert whole_seconds(Whole(0.1, 2e9), 2e9, 1e12) == pytest.approx(1.1)


@pytest.mark.parametrize("link", [0.1e9, 0.05e9])
def test_a_guest_as_quick_as_the_link_never_converges(link: float) -> None:
    assert warm_seconds(WARM, link) == math.inf
    assert follow_seconds(WARM, 1e9, link) == math.inf


def test_the_copy_beside_the_guest_takes_what_it_writes_too() -> None:
    assert follow_seconds(WARM, 200e9, LINK) == pytest.approx(200e9 / LINK / 0.8)
    assert follow_seconds(WARM, 200e9, math.inf) == pytest.approx(50 / (1 - 0.025))


def test_a_cold_copy_goes_with_the_size_and_the_slower_of_link_and_host() -> None:
    whole = Whole(fixed_seconds=0.1, copy_bytes_per_second=2e9)
    assert whole_seconds(whole, 200e9) == pytest.approx(100.1)
    assert whole_seconds(whole, 200e9, LINK) == pytest.approx(400.1)


def test_what_is_no_data_is_fixed() -> None:
    fitted = fit(WARM, 0.1)
    assert fitted.fixed_seconds == pytest.approx(0.1 - 0.018)
    assert warm_seconds(replace(fitted, table_seconds=0.0)) == pytest.approx(0.1)
    assert fit(WARM, 0.001).fixed_seconds == 0


def test_runs_become_the_inputs_of_the_model() -> None:
    ours = downtime_figures.warm_of(RUNS[OURS], HOST)
    assert ours.copy_bytes_per_second == pytest.approx(4e9)
    assert ours.fixed_seconds == pytest.approx(0.048 - 0.018)
    # 1.1 s, of which 0.95 s copy and 0.05 s read back 2 GB.
    whole = downtime_figures.whole_of(RUNS[COLD])
    assert (whole.fixed_seconds, whole.copy_bytes_per_second) == pytest.approx((0.1, 2e9))
    assert downtime_figures.mirror_of(RUNS[MIRROR]).fixed_seconds == pytest.approx(0.3)


def test_predictions_are_called_so_and_have_the_power_down() -> None:
    found = _by_name(downtime_figures.predictions("heavy", RUNS, HOST))
    assert all(name.startswith("predicted, 200 GB at ") for name in found)
    assert len(found) == 3 * 5
    at_100 = "predicted, 200 GB at 100 Gbit/s: heavy:"
    # The power-down of all is 0.2 s; then 30 ms, 20 ms of tables, and the data as here.
    assert found[f"{at_100} {OURS}: downtime"] == pytest.approx(0.2 + 0.05 + 0.018)
    assert found[f"{at_100} {MIRROR}: downtime"] == pytest.approx(0.5)
    assert found[f"{at_100} {COLD}: downtime"] == pytest.approx(0.2 + 0.1 + 100)
    assert found[f"{at_100} {OURS}: time beside the guest"] == pytest.approx(50 / (1 - 0.025))
    at_10 = "predicted, 200 GB at 10 Gbit/s: heavy:"
    assert found[f"{at_10} {COLD}: downtime"] == pytest.approx(0.2 + 0.1 + 200 / 1.175)
    # This host copies 2 GB/s, such a link carries 11.75.
    assert found[f"{at_100} {COLD}, link filled: downtime"] == pytest.approx(0.3 + 200 / 11.75)


def test_who_never_converges_has_no_prediction() -> None:
    quick = [replace(WARM_RUN, write_bytes_per_second=2e9)]
    found = _by_name(downtime_figures.predictions("wild", {**RUNS, OURS: quick}, HOST))
    assert not any("10 Gbit/s" in name and OURS in name for name in found)
    assert f"predicted, 200 GB at 10 Gbit/s: wild: {COLD}: downtime" in found


def test_the_model_is_held_against_another_disk() -> None:
    smaller = {
        OURS: [replace(WARM_RUN, switch_seconds=0.096)],
        COLD: [replace(RUNS[COLD][0], switch_seconds=0.55, handed=Handed(1_000_000_000))],
    }
    ours, cold = downtime_figures.check(RUNS, smaller, HOST)
    assert ours.spread.median == pytest.approx(0.5)
    assert cold.spread.median == pytest.approx((0.1 + 0.5) / 0.55)


def test_the_boot_is_no_downtime() -> None:
    found = _by_name(downtime_figures.figures("heavy", 1_000_000_000, RUNS))
    assert found[f"heavy: {OURS}: downtime"] == pytest.approx(0.248)
    assert found[f"heavy: {OURS}: boot (taken out)"] == 4.0
    assert found[f"heavy: downtime of {COLD} to {OURS}'s"] == pytest.approx(1.3 / 0.248)
    assert found[f"heavy: hand-over of {MIRROR} to {OURS}'s"] == pytest.approx(0.3 / 0.048)
    assert found[f"heavy: {OURS}: bytes sent / device"] == pytest.approx(2.008)
    assert found[f"heavy: {OURS}: hand-over, verify"] == pytest.approx(50)
    assert found[f"heavy: {OURS}: hand-over foretold by the agent"] == pytest.approx(400)
    assert f"heavy: {REBOOT}: bytes sent / device" not in found


def test_acknowledged_writes_are_heard_as_they_come(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("size 1\r\nack 1 0a\r\nack 2")
    with listening(log) as heard:
        _eventually(lambda: len(heard.moments) == 1)
        with log.open("a") as file:
            file.write(" 0b\r\nchecked 1 2\r\n")
        _eventually(lambda: len(heard.moments) == 2)
        with pytest.raises(TimeoutError, match="1 records"):
            heard.wait_more(1, 0.05)
        with log.open("a") as file:
            file.write("bad block 7\r\nack 3 0c\r\n")
        with pytest.raises(RuntimeError, match="bad block 7"):
            heard.wait_more(9, 30)
    assert heard.moments == sorted(heard.moments)


def test_a_write_that_is_lost_is_told() -> None:
    check_kept({1: "a", 2: "b"}, {1: "a", 2: "b", 3: "c"})
    with pytest.raises(RuntimeError, match=r"1 of 2 acknowledged writes are lost: \[2\]"):
        check_kept({1: "a", 2: "b"}, {1: "a", 2: "x"})


def test_tables_of_a_large_disk_are_measured() -> None:
    assert tables.table_seconds(1 << 30) > 0


def _by_name(figures: object) -> dict[str, float]:
    found: list[Figure] = list(figures)  # type: ignore[call-overload]
    named = {figure.name: figure.spread.median for figure in found}
    assert len(named) == len(found)
    return named


def _eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)
