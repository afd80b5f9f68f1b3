"""`python -m agent` and the `warmsync` command."""

from __future__ import annotations

import os


def main() -> None:
    """Run the command line."""
    # gRPC's core tells refused handshakes on stderr, in a form of its own; what matters of them
    # comes back as errors. It reads this once, when it is imported.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from agent.cli import cli

    cli(prog_name="warmsync")


if __name__ == "__main__":
    main()
