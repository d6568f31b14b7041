"""The command line itself: the app that commands register with, and how errors are shown.

Whatever is heavy is imported inside a command, so that `--help` costs nothing.
"""

import contextlib
import traceback
from collections.abc import Iterator
from typing import Annotated

import typer

app = typer.Typer(
    name="attnscope",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130  # what a shell expects after Ctrl-C
FOUND = 3  # --fail-on
MOST_TEXT = 4000  # characters of a line that foreign names may be in


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"attnscope {version('attnscope')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Say the version and stop.", callback=_say_version, is_eager=True),
    ] = False,
) -> None:
    """Why transformer training becomes unstable, and how to see it before it does.

    Example: attnscope train --no-scale
    """


def note(text: str) -> None:
    """Lines for people, on stderr, that do nothing but show themselves."""
    from attnscope.runs.foreign import printable

    for line in text.splitlines():
        typer.echo(printable(line, MOST_TEXT), err=True)


@contextlib.contextmanager
def one_line_errors(*, debug: bool) -> Iterator[None]:
    """Errors that a user can cause become one line and exit code 1."""
    from attnscope.errors import AttnscopeError

    try:
        yield
    except AttnscopeError as error:
        if debug:
            traceback.print_exc()
        note(f"error: {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        note("error: stopped at once; what was recorded before is kept.")
        raise typer.Exit(INTERRUPTED) from None
