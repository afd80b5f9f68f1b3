"""Any value in any place of a certificate. The fuzzer puts a few there, but seeks the branches."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from agent.certificate import dump
from agent.migration import Depth
from tests.fuzz.certificate_fuzz import WHOLE, survive

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


@settings(max_examples=400)
@given(
    depth=st.sampled_from(Depth),
    path=st.lists(st.integers(0, 50), min_size=1, max_size=5),
    value=JSON,
    name=st.none() | st.text(max_size=3),
)
def test_a_spoilt_value_is_survived(
    depth: Depth, path: list[int], value: object, name: str | None
) -> None:
    """Put any value in any place, in place of what is there or under another name."""
    values: Any = json.loads(dump(WHOLE[depth]))
    place, last = values, path[-1]
    for step in path[:-1]:
        inner = place[_key(place, step)]
        if not isinstance(inner, dict | list) or not inner:
            break
        place = inner
    if isinstance(place, dict) and name is not None:
        place[name] = value
    else:
        place[_key(place, last)] = value
    survive(json.dumps(values).encode())


def _key(place: dict[str, Any] | list[Any], step: int) -> Any:
    keys = list(place) if isinstance(place, dict) else range(len(place))
    return keys[step % len(keys)]
