"""What is written down of a migration, as plain values: there and back. Pure.

Owns the form of the journal's records. Whoever reads one of another form gets a ValueError.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from agent import errors
from agent.errors import WarmsyncError
from agent.estimate import Sample
from agent.migration import (
    CarrierKind,
    Depth,
    DowntimeParts,
    GuestThrottle,
    Mode,
    Plan,
    Progress,
    Resize,
    Scheme,
    Step,
    Volume,
)
from agent.state import Entry, Machine, State

_Record = TypeVar("_Record")
_ERRORS = ("error", "stopped", "boot_error")


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """A migration at its source. `volumes` of the plan have their sizes.

    `devices` is what each source was (major, minor, disk sequence); `epoch` counts the connections
    to the target; `releasing`: the fence may be up and the target asked to take over; `opening`:
    how fast round 0 was; `step`, `attempt`, `stopped`, `off_at_seconds` and `step_boot_id` (none in
    records of older agents) are the autopilot's;
    `owed`: it has failed or was cancelled, and its fence or its target may not be let go yet;
    `nameplates`: what the sources are on every boot (none in records of older agents).
    """

    plan: Plan
    scheme: Scheme
    scheme_reason: str
    secret: str
    epoch: int
    boot_id: str
    devices: tuple[tuple[int, int, int], ...]
    history: tuple[Entry, ...]
    generation: int
    progress: Progress
    releasing: bool = False
    opening: Sample | None = None
    error: WarmsyncError | None = None
    certificate: str = ""
    step: Step = Step.NONE
    attempt: int = 0
    stopped: WarmsyncError | None = None
    off_at_seconds: float | None = None
    owed: bool = False
    nameplates: tuple[str, ...] = ()
    step_boot_id: str = ""

    def nameplate(self, index: int) -> str:
        """Return what a source is on every boot; empty if nobody knows."""
        return self.nameplates[index] if index < len(self.nameplates) else ""


@dataclass(frozen=True, slots=True)
class TargetRecord:
    """A session at its target. `generation` is the last that is durable; `boot_id` and `devices`
    are of when it was written down, as a source's are, `nameplates` what they are on every boot
    (none in records of older agents); `certificate` is there once it is released;
    `resizing`: a resize was begun, so what is there is not what was acknowledged. `boot_attempt` is
    the last that was begun; it has ended once there are seconds or an error.
    """

    plan: Plan
    secret: str
    epoch: int
    history: tuple[Entry, ...]
    generation: int
    progress: Progress
    error: WarmsyncError | None = None
    boot_id: str = ""
    devices: tuple[tuple[int, int, int], ...] = ()
    certificate: str = ""
    resizing: bool = False
    boot_attempt: int = 0
    boot_seconds: float | None = None
    boot_error: WarmsyncError | None = None
    nameplates: tuple[str, ...] = ()


def dump(record: SourceRecord | TargetRecord) -> dict[str, Any]:
    """Return a record as values that JSON knows."""
    errors_in = [name for name in _ERRORS if hasattr(record, name)]
    bare: dict[str, Any] = dict.fromkeys(errors_in)
    progress = replace(record.progress, resizes=())
    # An exception cannot be copied.
    found = asdict(replace(record, progress=progress, **bare))
    for name in errors_in:
        found[name] = _dump_error(getattr(record, name))
    found["progress"]["resizes"] = [
        {**asdict(replace(one, error=None)), "error": _dump_error(one.error)}
        for one in record.progress.resizes
    ]
    return found


def load_source(values: dict[str, Any]) -> SourceRecord:
    """Return a source's record. ValueError."""
    return _load(
        SourceRecord,
        values,
        scheme=Scheme,
        devices=_pairs,
        opening=_opening,
        step=Step,
        off_at_seconds=_time,
        nameplates=_texts,
    )


def load_target(values: dict[str, Any]) -> TargetRecord:
    """Return a target's record. ValueError."""
    return _load(TargetRecord, values, devices=_pairs, nameplates=_texts)


def _load(kind: type[_Record], values: dict[str, Any], **readers: Any) -> _Record:
    common = {
        "plan": _plan,
        "history": _history,
        "progress": _progress,
        "epoch": _count,
        "generation": _count,
        **dict.fromkeys(_ERRORS, _error),
        **readers,
    }
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    try:
        found = {
            name: common[name](value) if name in common else value
            for name, value in values.items()
            if name in names
        }
        return kind(**found)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a record of another form: {error}") from error


def _count(value: object) -> int:
    """JSON knows numbers that count nothing: NaN is what a fuzzer found."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} counts nothing")
    return value


def _plan(values: dict[str, Any]) -> Plan:
    throttle = values["guest_throttle"]
    known = {
        **values,
        "volumes": tuple(Volume(**volume) for volume in values["volumes"]),
        "scheme": Scheme(values["scheme"]),
        "carrier": CarrierKind(values["carrier"]),
        "verify": Depth(values.get("verify", Depth.NONE)),
        "mode": Mode(values.get("mode", Mode.MANUAL)),
        "guest_throttle": None if throttle is None else GuestThrottle(**throttle),
    }
    return Plan(**known)


def _history(values: list[dict[str, Any]]) -> tuple[Entry, ...]:
    entries = [Entry(State(one["state"]), float(one["at_seconds"])) for one in values]
    return Machine.restore(entries).history


def _progress(values: dict[str, Any]) -> Progress:
    return Progress(
        **{
            **values,
            "downtime_parts": DowntimeParts(**values["downtime_parts"]),
            "resizes": tuple(_resize(one) for one in values.get("resizes", ())),
        }
    )


def _resize(values: dict[str, Any]) -> Resize:
    return Resize(**{**values, "error": _error(values["error"])})


def _time(value: float | None) -> float | None:
    return None if value is None else float(value)


def _opening(values: dict[str, Any] | None) -> Sample | None:
    return None if values is None else Sample(**values)


def _pairs(values: list[list[int]]) -> tuple[tuple[int, int, int], ...]:
    return tuple((int(a), int(b), int(c)) for a, b, c in values)


def _texts(values: list[str]) -> tuple[str, ...]:
    if isinstance(values, str) or not all(isinstance(one, str) for one in values):
        raise ValueError(f"{values!r} is no list of texts")
    return tuple(values)


def _dump_error(error: WarmsyncError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {
        "kind": type(error).__name__,
        "reason": error.reason,
        "message": str(error),
        "values": error.values,
    }


def _error(values: dict[str, Any] | None) -> WarmsyncError | None:
    if values is None:
        return None
    kind = getattr(errors, values["kind"], WarmsyncError)
    if not (isinstance(kind, type) and issubclass(kind, WarmsyncError)):
        raise ValueError(f"an error of no known kind: {values['kind']}")
    return kind(values["reason"], values["message"], **values["values"])
