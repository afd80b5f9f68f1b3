"""The state machine: by transcripts that read like a session, and by random events."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import state as state_module
from agent.errors import FailedPrecondition
from agent.state import MOVES, TERMINAL, Entry, Event, Machine, State

# An event, then what becomes of it: `-> STATE` or `! REASON`. "force" is a cutover with force.
TRANSCRIPTS = {
    "the main job": """
        seed -> SEEDING
        sync -> SYNCING
        converge -> CONVERGED
        cut over -> CUTTING_OVER
        release -> CUT_OVER
        finish -> COMPLETED
    """,
    "a cutover needs convergence": """
        cut over ! NOT_CONVERGED
        seed -> SEEDING
        cut over ! NOT_CONVERGED
        sync -> SYNCING
        cut over ! NOT_CONVERGED
        converge -> CONVERGED
        diverge -> SYNCING
        cut over ! NOT_CONVERGED
        force -> CUTTING_OVER
        cut over ! ILLEGAL_TRANSITION
        release -> CUT_OVER
        cut over ! ILLEGAL_TRANSITION
    """,
    "force does not open what is closed": """
        force ! ILLEGAL_TRANSITION
        seed -> SEEDING
        force ! ILLEGAL_TRANSITION
        pause -> PAUSED
        force ! ILLEGAL_TRANSITION
        cut over ! ILLEGAL_TRANSITION
    """,
    "force does no harm to one that converged": """
        seed -> SEEDING
        sync -> SYNCING
        converge -> CONVERGED
        force -> CUTTING_OVER
    """,
    "not quiesced": """
        seed -> SEEDING
        sync -> SYNCING
        converge -> CONVERGED
        cut over -> CUTTING_OVER
        refuse -> SYNCING
        cut over ! NOT_CONVERGED
        converge -> CONVERGED
        cut over -> CUTTING_OVER
        release -> CUT_OVER
        refuse ! ILLEGAL_TRANSITION
        roll back -> ROLLED_BACK
        finish ! ILLEGAL_TRANSITION
    """,
    "pauses": """
        pause ! ILLEGAL_TRANSITION
        resume ! ILLEGAL_TRANSITION
        seed -> SEEDING
        pause -> PAUSED
        pause ! ILLEGAL_TRANSITION
        sync ! ILLEGAL_TRANSITION
        resume -> SEEDING
        resume ! ILLEGAL_TRANSITION
        sync -> SYNCING
        pause -> PAUSED
        converge ! ILLEGAL_TRANSITION
        resume -> SYNCING
        converge -> CONVERGED
        pause -> PAUSED
        resume -> SYNCING
        converge -> CONVERGED
        cut over -> CUTTING_OVER
        pause ! ILLEGAL_TRANSITION
        resume ! ILLEGAL_TRANSITION
    """,
    "cancelled while it cuts over": """
        seed -> SEEDING
        sync -> SYNCING
        force -> CUTTING_OVER
        cancel -> CANCELLED
        release ! ILLEGAL_TRANSITION
        cancel ! ILLEGAL_TRANSITION
    """,
    "cancelled before it began": """
        cancel -> CANCELLED
        seed ! ILLEGAL_TRANSITION
    """,
    "after the cutover it neither fails nor is cancelled": """
        seed -> SEEDING
        sync -> SYNCING
        force -> CUTTING_OVER
        release -> CUT_OVER
        fail ! ILLEGAL_TRANSITION
        cancel ! ILLEGAL_TRANSITION
        pause ! ILLEGAL_TRANSITION
        finish -> COMPLETED
        roll back ! ILLEGAL_TRANSITION
    """,
    "a person says who owns, for want of an answer": """
        settle for the source ! ILLEGAL_TRANSITION
        seed -> SEEDING
        sync -> SYNCING
        settle for the target ! ILLEGAL_TRANSITION
        force -> CUTTING_OVER
        settle for the source -> ROLLED_BACK
        settle for the target ! ILLEGAL_TRANSITION
        release ! ILLEGAL_TRANSITION
    """,
    "a person says so after the cutover": """
        seed -> SEEDING
        sync -> SYNCING
        force -> CUTTING_OVER
        release -> CUT_OVER
        settle for the target -> COMPLETED
        roll back ! ILLEGAL_TRANSITION
        settle for the source ! ILLEGAL_TRANSITION
    """,
    "a person says so after a failure": """
        seed -> SEEDING
        sync -> SYNCING
        force -> CUTTING_OVER
        fail -> FAILED
        settle for the source -> ROLLED_BACK
    """,
    "a failure during a pause": """
        seed -> SEEDING
        pause -> PAUSED
        fail -> FAILED
        resume ! ILLEGAL_TRANSITION
        fail ! ILLEGAL_TRANSITION
    """,
}

SETTLED = {State.ROLLED_BACK, State.COMPLETED}
"""Where a person's word leads, once the agents cannot learn who owns."""

# Written out a second time, as the design says it; the code's own table is not trusted here.
LEGAL = {
    State.PENDING: {State.SEEDING, State.CANCELLED, State.FAILED},
    State.SEEDING: {State.SYNCING, State.PAUSED, State.CANCELLED, State.FAILED},
    State.SYNCING: {
        State.CONVERGED,
        State.CUTTING_OVER,
        State.PAUSED,
        State.CANCELLED,
        State.FAILED,
    },
    State.CONVERGED: {
        State.SYNCING,
        State.CUTTING_OVER,
        State.PAUSED,
        State.CANCELLED,
        State.FAILED,
    },
    State.CUTTING_OVER: {
        State.SYNCING,
        State.CUT_OVER,
        State.CANCELLED,
        State.FAILED,
        State.ROLLED_BACK,
        State.COMPLETED,
    },
    State.PAUSED: {State.SEEDING, State.SYNCING, State.CANCELLED, State.FAILED},
    State.CUT_OVER: {State.ROLLED_BACK, State.COMPLETED},
    State.FAILED: set(SETTLED),
    State.CANCELLED: set(),
    State.ROLLED_BACK: set(),
    State.COMPLETED: set(),
}


def play(machine: Machine, word: str, at_seconds: float) -> str:
    event = Event.CUT_OVER if word == "force" else Event(word)
    try:
        return f"{word} -> {machine.apply(event, at_seconds, force=word == 'force')}"
    except FailedPrecondition as error:
        return f"{word} ! {error.reason}"


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_transcript(name: str) -> None:
    expected = [line.strip() for line in TRANSCRIPTS[name].strip().splitlines()]
    machine = Machine(0.0)
    words = [line.replace(" ! ", " -> ").split(" -> ")[0] for line in expected]
    assert [play(machine, word, at) for at, word in enumerate(words)] == expected


def test_history_has_each_state_and_its_time() -> None:
    machine = Machine(1.0)
    machine.apply(Event.SEED, 2.0)
    with pytest.raises(FailedPrecondition):
        machine.apply(Event.FINISH, 3.0)
    machine.apply(Event.FAIL, 4.0)
    assert machine.history == (
        Entry(State.PENDING, 1.0),
        Entry(State.SEEDING, 2.0),
        Entry(State.FAILED, 4.0),
    )


def test_refusal_says_what_is_possible() -> None:
    machine = Machine(0.0)
    machine.apply(Event.SEED, 1.0)
    with pytest.raises(FailedPrecondition) as refusal:
        machine.apply(Event.RESUME, 2.0)
    assert str(refusal.value) == (
        "cannot resume a migration that is SEEDING; possible now: pause, cancel"
    )
    assert refusal.value.values == {
        "state": "SEEDING",
        "event": "resume",
        "possible": "pause, cancel",
    }


def test_refusal_names_the_way_out_of_a_cutover_that_nobody_answers() -> None:
    machine = Machine(0.0)
    for event in (Event.SEED, Event.SYNC, Event.CONVERGE, Event.CUT_OVER):
        machine.apply(event, 1.0)
    with pytest.raises(FailedPrecondition, match=r"possible now: cancel, settle$"):
        machine.apply(Event.FINISH, 2.0)


def test_refusal_of_a_dead_one_says_so() -> None:
    machine = Machine(0.0)
    machine.apply(Event.CANCEL, 1.0)
    with pytest.raises(FailedPrecondition, match="CANCELLED; nothing is possible any more"):
        machine.apply(Event.PAUSE, 2.0)


def test_early_cutover_offers_force_only_where_force_works() -> None:
    machine = Machine(0.0)
    machine.apply(Event.SEED, 1.0)
    with pytest.raises(FailedPrecondition) as early:
        machine.apply(Event.CUT_OVER, 2.0)
    assert "force" not in str(early.value)
    machine.apply(Event.SYNC, 3.0)
    with pytest.raises(FailedPrecondition, match="force it"):
        machine.apply(Event.CUT_OVER, 4.0)


def test_paused_from_is_remembered() -> None:
    machine = Machine(0.0)
    assert machine.paused_from is None
    for event in (Event.SEED, Event.SYNC, Event.CONVERGE, Event.PAUSE):
        machine.apply(event, 1.0)
    assert machine.paused_from is State.CONVERGED
    machine.apply(Event.RESUME, 2.0)
    assert machine.paused_from is None


def test_terminal_states_are_those_with_no_way_out_but_to_settle_who_owns() -> None:
    ways_out = {state: LEGAL[state] for state in TERMINAL if LEGAL[state]}
    assert ways_out == {State.FAILED: SETTLED}
    assert all(LEGAL[state] for state in State if state not in TERMINAL)
    assert all(state.is_terminal == (state in TERMINAL) for state in State)


def test_every_legal_move_has_an_event() -> None:
    made = {(source, target) for moves in MOVES.values() for source, target in moves.items()}
    made.add((State.PAUSED, State.SEEDING))
    assert made == {(source, target) for source in State for target in LEGAL[source]}


EVENTS = st.lists(st.tuples(st.sampled_from(Event), st.booleans()), max_size=40)


@given(EVENTS)
def test_random_events_never_leave_the_legal_moves(events: list[tuple[Event, bool]]) -> None:
    machine = Machine(0.0)
    for at, (event, force) in enumerate(events, start=1):
        before = machine.history
        was_possible = event in machine.possible()
        early = event is Event.CUT_OVER and not force and before[-1].state is not State.CONVERGED
        if was_possible and not early:
            state = machine.apply(event, float(at), force=force)
            assert machine.history == (*before, Entry(state, float(at)))
        else:
            with pytest.raises(FailedPrecondition):
                machine.apply(event, float(at), force=force)
            assert machine.history == before
    states = [entry.state for entry in machine.history]
    assert all(after in LEGAL[before] for before, after in itertools.pairwise(states))


def test_a_long_history_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest detours go; what is left is legal, begins and ends as it did."""
    monkeypatch.setattr(state_module, "MAX_HISTORY", 12)
    machine = Machine(0.0)
    for event in (Event.SEED, Event.SYNC):
        machine.apply(event, 1.0)
    rounds = [Event.CONVERGE, Event.DIVERGE, Event.PAUSE, Event.RESUME, Event.CONVERGE]
    rounds += [Event.PAUSE, Event.RESUME, Event.CONVERGE, Event.CUT_OVER, Event.REFUSE]
    for at, event in enumerate(rounds * 20, start=2):
        before = machine.history
        state = machine.apply(event, float(at))
        machine.retract()
        assert machine.history[-1] == before[-1]
        machine.apply(event, float(at))
        assert machine.history[-1] == Entry(state, float(at))
        assert len(machine.history) <= 12
        assert Machine.restore(machine.history).history == machine.history
        assert [entry.state for entry in machine.history[:3]] == [
            State.PENDING,
            State.SEEDING,
            State.SYNCING,
        ]


@given(EVENTS)
def test_a_pause_ends_where_it_began(events: list[tuple[Event, bool]]) -> None:
    machine = Machine(0.0)
    for event, force in events:
        play(machine, "force" if event is Event.CUT_OVER and force else event.value, 1.0)
    states = [entry.state for entry in machine.history]
    for before, paused, after in zip(states, states[1:], states[2:], strict=False):
        if paused is State.PAUSED and not after.is_terminal:
            assert after is (State.SEEDING if before is State.SEEDING else State.SYNCING)


@given(EVENTS)
def test_restore_is_the_inverse_of_history(events: list[tuple[Event, bool]]) -> None:
    machine = Machine(0.0)
    for event, force in events:
        play(machine, "force" if event is Event.CUT_OVER and force else event.value, 1.0)
    restored = Machine.restore(machine.history)
    assert restored.history == machine.history
    assert restored.possible() == machine.possible()


@pytest.mark.parametrize(
    "states",
    [
        [],
        [State.SEEDING],
        [State.PENDING, State.CUT_OVER],
        [State.PENDING, State.SEEDING, State.PAUSED, State.SYNCING],
        [State.PENDING, State.CANCELLED, State.SEEDING],
    ],
)
def test_restore_refuses_an_impossible_history(states: list[State]) -> None:
    with pytest.raises(ValueError, match=r"history|no move"):
        Machine.restore([Entry(state, 0.0) for state in states])
