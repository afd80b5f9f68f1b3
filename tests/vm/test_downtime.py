"""The benchmark of guests' downtime runs: each way moves a machine."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import BENCHMARKS, run
from benchmarks.contender import OURS
from benchmarks.downtime_figures import COLD, MIRROR, REBOOT
from benchmarks.measure import Options
from tests.devices import require
from tests.vm import guest


@pytest.mark.vm
@pytest.mark.timeout(900)
def test_each_way_moves_a_machine() -> None:
    require("loop", "bpf", "guests")
    outcome = run(BENCHMARKS["downtime"], Options(quick=True))
    if outcome.skipped:
        pytest.skip(outcome.skipped)
    found = {figure.name: figure.spread for figure in outcome.figures}
    assert len(found) == len(outcome.figures)
    for name in (OURS, MIRROR, COLD, REBOOT):
        assert found[f"heavy: {name}: downtime"].median > 0
        assert found[f"heavy: {name}: boot (taken out)"].median > 0
    for name in (OURS, MIRROR, COLD):
        # More than a half of the least disk is data.
        assert found[f"heavy: {name}: bytes sent / device"].median > 0.4
    assert f"predicted, 200 GB at 10 Gbit/s: heavy: {COLD}: downtime" in found
    assert guest.LIVE == []
