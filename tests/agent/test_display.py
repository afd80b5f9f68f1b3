from __future__ import annotations

import io

import pytest
from rich.console import Console
from warmsync.v1 import migration_pb2 as pb

from agent.display import LineDisplay, LiveDisplay, ShareDisplay, line, open_display, picture
from agent.errors import DataLoss
from agent.rpc.errors import to_status
from agent.view import page
from tests.agent.messages import migration


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def recorder(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80, color_system=None)
    return console, out


def text_of(message: pb.Migration) -> str:
    console, out = recorder()
    console.print(picture(message))
    return out.getvalue()


def test_a_line_names_what_matters() -> None:
    assert line(migration()) == (
        "web1 SYNCING, round 3, 25% of 4.0 MiB, dirty 5.0 MiB, throughput 100.0 MiB/s, "
        "dirty rate 20.0 MiB/s, predicted downtime 180 ms (budget 500 ms)"
    )


def test_the_downtime_is_the_measured_one_once_there_is_one() -> None:
    message = migration(state=pb.STATE_CUT_OVER, downtime_seconds=0.25)
    assert "downtime 250 ms (budget 500 ms)" in line(message)
    assert "predicted" not in line(message)
    message.progress.ClearField("downtime_seconds")
    message.progress.ClearField("predicted_downtime_seconds")
    assert "predicted downtime not known yet" in line(message)


def test_a_resize_is_not_part_of_what_is_predicted() -> None:
    message = migration()
    message.resize = True
    assert "predicted downtime 180 ms and the resize (budget 500 ms)" in line(message)
    assert "~180 ms and the resize (budget 500 ms)" in page(message)


def test_lines_come_when_something_changed_and_at_most_one_a_second() -> None:
    (console, out), clock = recorder(), Clock()
    with LineDisplay(console, clock) as display:
        display.update(migration(rounds=0))
        for _ in range(5):
            clock.now += 1.1
            display.update(migration(rounds=0, dirty_bytes=int(clock.now)))  # no news
        display.update(migration(rounds=1))
        clock.now += 0.5
        display.update(migration(rounds=2))  # too soon
        clock.now += 0.6
        display.update(migration(rounds=3))
    rounds = [text.split(", ")[1] for text in out.getvalue().splitlines()]
    assert rounds == ["round 0", "round 1", "round 3"]


def test_the_last_state_is_said_even_if_too_soon() -> None:
    (console, out), clock = recorder(), Clock()
    with LineDisplay(console, clock) as display:
        display.update(migration())
        display.update(migration(state=pb.STATE_CONVERGED))
        assert "CONVERGED" not in out.getvalue()
    assert out.getvalue().count("CONVERGED") == 1


def test_a_long_round_shows_that_it_lives() -> None:
    (console, out), clock = recorder(), Clock()
    with LineDisplay(console, clock) as display:
        for _ in range(31):
            display.update(migration(rounds=0))
            clock.now += 1
    assert len(out.getvalue().splitlines()) == 4


def test_stalling_is_news_with_its_advice() -> None:
    (console, out), clock = recorder(), Clock()
    with LineDisplay(console, clock) as display:
        display.update(migration())
        clock.now += 2
        display.update(migration(stalled=True, advice="raise the limit [or] wait"))
    assert "STALLED: raise the limit [or] wait" in out.getvalue().splitlines()[1]


def test_a_slowed_guest_is_news() -> None:
    (console, out), clock = recorder(), Clock()
    slowed = migration(guest_limit_bytes_per_second=3 << 20)
    with LineDisplay(console, clock) as display:
        display.update(migration())
        clock.now += 2
        display.update(slowed)
    assert ", guest throttled to 3.0 MiB/s" in out.getvalue().splitlines()[1]
    assert "guest throttled to 3.0 MiB/s" in text_of(slowed)


def test_a_picture_shows_rounds_rates_and_the_bar() -> None:
    text = text_of(migration())
    for part in (
        *("web1", "SYNCING", "round 3", "tracker ebpf", "sent 3.0 GiB of 2.0 GiB"),
        *("1.0 MiB of 4.0 MiB in this round", "dirty 5.0 MiB", "throughput 100.0 MiB/s"),
        *("dirty rate 20.0 MiB/s", "predicted downtime 180 ms (budget 500 ms)"),
    ):
        assert part in text
    assert "stalled" not in text
    assert len(text.splitlines()) == 4


def test_a_picture_shows_trouble() -> None:
    message = migration(state=pb.STATE_FAILED, stalled=True, advice="slow down [the] guest")
    message.error.CopyFrom(to_status(DataLoss("X", "disk [broken]: mend it")))
    text = text_of(message)
    assert "slow down [the] guest" in text
    assert "disk [broken]: mend it" in text


def test_an_empty_round_is_a_full_bar() -> None:
    assert "100% of 0 B" in line(migration(round_bytes=0, round_done_bytes=0))


def test_the_display_suits_the_console() -> None:
    assert isinstance(open_display(recorder()[0]), LineDisplay)
    assert isinstance(open_display(recorder(terminal=True)[0]), LiveDisplay)


def test_live_keeps_the_last_picture() -> None:
    console, out = recorder(terminal=True)
    with open_display(console) as display:
        display.update(migration())
        display.update(migration(state=pb.STATE_CONVERGED))
    last = out.getvalue().rpartition("web1")[2]
    assert "CONVERGED" in last
    assert "predicted downtime" in last


def test_shares_in_lines() -> None:
    console, out = recorder()
    with ShareDisplay(console, "compared") as display:
        for done in range(0, 101, 2):
            display.update(done, 100)
    assert out.getvalue().splitlines()[-1] == "compared 100 B of 100 B"
    assert len(out.getvalue().splitlines()) == 10


@pytest.mark.parametrize("total", [0, 10])
def test_shares_on_a_terminal(total: int) -> None:
    console, out = recorder(terminal=True)
    with ShareDisplay(console, "compared") as display:
        display.update(total, total)
    assert f"compared {total} B of {total} B" in out.getvalue()
