"""The reader of certificates: whatever a stranger hands over, nothing forged holds."""

from __future__ import annotations

from agent.certificate import Certificate, dump, load, verify
from agent.certificate.statement import canonical
from agent.errors import InvalidArgument, WarmsyncError
from agent.migration import Depth, Role
from tests.agent.certificates import certificate, signer

HEAD_BYTES = 0
KEYS = {role: signer(role).fingerprint for role in Role}
WHOLE = {depth: certificate(depth) for depth in Depth}


def survive(data: bytes) -> Certificate | None:
    """Load and verify; only what says the same as one of WHOLE may hold, and is returned."""
    try:
        found = load(data)
    except InvalidArgument as error:
        if error.reason != "BAD_CUTOVER_CERTIFICATE" or not str(error).isprintable():
            raise
        return None
    assert load(dump(found)) == found
    assert canonical(found.statement)
    try:
        verify(found, KEYS)
    except WarmsyncError:
        return None
    assert found.statement in [whole.statement for whole in WHOLE.values()], "it was forged"
    return found
