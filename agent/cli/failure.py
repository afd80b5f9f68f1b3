"""How commands end: exit codes, and errors as people and programs read them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError

from agent.errors import WarmsyncError
from agent.view import describe_error

DONE, FAILED, USAGE, TIMED_OUT, INTERRUPTED = 0, 1, 2, 3, 130


class CommandFailed(WarmsyncError):  # noqa: N818 - named like its base's other children
    """A command that failed although the agent answered; `shown` goes into the JSON as well."""

    def __init__(
        self, error: WarmsyncError, shown: dict[str, Any] | None = None, code: int = FAILED
    ) -> None:
        super().__init__(error.reason, str(error), **error.values)
        self.shown = shown or {}
        self.code = code


class FailingGroup(click.Group):
    """A group whose errors are one line on stderr, and with --json an object on stdout."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> Any:
        """Run a command line and exit with its code."""
        arguments = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        sys.exit(
            _finish(
                lambda: super(FailingGroup, self).main(arguments, *more, **extra),
                as_json="--json" in arguments,
            )
        )


def _finish(run: Callable[[], Any], *, as_json: bool) -> int:
    try:
        code = run()
    except NoArgsIsHelpError as error:
        error.show()
        return USAGE
    except click.UsageError as error:
        _report(WarmsyncError("USAGE", _usage(error)), as_json=as_json)
        return USAGE
    except WarmsyncError as error:
        _report(error, as_json=as_json)
        return _code(error)
    except (KeyboardInterrupt, click.Abort):
        click.echo("warmsync: interrupted", err=True)
        return INTERRUPTED
    return code if isinstance(code, int) else DONE


def _report(error: WarmsyncError, *, as_json: bool) -> None:
    click.echo(f"warmsync: error: {' '.join(str(error).split())}", err=True)
    if as_json:
        shown = error.shown if isinstance(error, CommandFailed) else {}
        click.echo(json.dumps({**shown, "error": describe_error(error)}))


def _code(error: WarmsyncError) -> int:
    if isinstance(error, CommandFailed):
        return error.code
    return TIMED_OUT if error.reason == "DEADLINE_EXCEEDED" else FAILED


def _usage(error: click.UsageError) -> str:
    command = error.ctx.command_path if error.ctx else "warmsync"
    return f"{error.format_message()} (see {command} --help)"
