"""Commands that look at code that is not ours: watch, check."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from attnscope.cli.app import FOUND, app, one_line_errors


class FailOnCheck(StrEnum):
    """Which checks make `check` fail."""

    failed = "failed"
    not_looked = "not-looked"


class LogTo(StrEnum):
    """Trackers that `watch` logs to."""

    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"


@app.command(context_settings={"allow_interspersed_args": False})
def watch(
    words: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT [ARGS]...", help="What to run, with its own arguments.", show_default=False),
    ],
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module, as in python -m.")] = False,
    every: Annotated[
        int,
        typer.Option(min=1, help="Measure attention and parameters at every so many steps, and at the first 20."),
    ] = 10,
    rows: Annotated[str, typer.Option(metavar="N|all", help="Query rows measured per head and call.")] = "32",
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Measure only attention layers with such names, as in '*.h.0.*'; may be given again.",
            show_default=False,
        ),
    ] = None,
    stop_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Stop the script at nonfinite, explosion, what a rule such as entropy_collapse finds, or COLUMN>NUMBER such as "
            "max_logit>1e4; exit code 3.",
            show_default=False,
        ),
    ] = None,
    snapshot: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="K",
            help="Keep weights and batches of the last K steps, and write them when training breaks.  [default: none]",
            show_default=False,
        ),
    ] = 0,
    log_to: Annotated[
        LogTo | None,
        typer.Option(
            help="Log a few columns to the script's active run, too; tensorboard: in the run directory.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run directory.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run directory.")] = Path("runs"),
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Run a training script, unmodified, and record its attention.

    Losses, output, exit code and random numbers are those of plain python.

    Example: attnscope watch train.py --batch_size=16
    """
    with one_line_errors(debug=debug):
        from attnscope.cli.resolve import command_line
        from attnscope.cli.watching import watch_program

        code = watch_program(
            words,
            is_module=module,
            name=name,
            out=out,
            every=every,
            rows=rows,
            layers=layers or [],
            stop_on=stop_on or [],
            snapshot=snapshot,
            log_to=None if log_to is None else log_to.value,
            command=command_line(),
        )
    raise typer.Exit(code)


@app.command()
def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="Or FILE.py:FACTORY; factory() returns (model, batch).",
            show_default=False,
        ),
    ],
    causal: Annotated[
        bool | None,
        typer.Option(
            "--causal/--no-causal",
            help="What the model is meant to be.  [default: say what it is]",
            show_default=False,
        ),
    ] = None,
    fail_on: Annotated[
        FailOnCheck | None,
        typer.Option(
            help="Exit with code 3 if a check failed; not-looked: also if one could not be made.",
            show_default=False,
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="The checks as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Check a model for leaks, broken masks and a wrong scale, before it is trained.

    A batch with two sequences, one of them padded, makes every check apply.

    Example: attnscope check model.py:build --causal --fail-on failed
    """
    with one_line_errors(debug=debug):
        from attnscope.cli.checking import check_and_print

        statuses = check_and_print(target, causal=causal, as_json=json_output)
        stops_at = {"failed"} if fail_on == FailOnCheck.failed else {"failed", "not looked"}
        if fail_on is not None and stops_at & statuses:
            raise typer.Exit(FOUND)
