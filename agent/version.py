"""The version of the installed distribution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def agent_version() -> str:
    """Return the version, such as "0.1.0"."""
    try:
        return version("warmsync")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "unknown"
