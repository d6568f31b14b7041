"""Every command: parse, call one function, print, name the next command.

Whatever is heavy is imported inside the command, so that `--help` costs nothing.
"""

import contextlib
import shlex
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from attnscope.config import Config

app = typer.Typer(
    name="attnscope",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130  # what a shell expects after Ctrl-C
FOUND = 3  # diagnose --fail-on


class FailOn(StrEnum):
    """Which findings make `diagnose` fail."""

    cause = "cause"
    symptom = "symptom"
    any = "any"


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"attnscope {version('attnscope')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Say the version and stop.", callback=_say_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Why transformer training becomes unstable, and how to see it before it does.

    Example: attnscope train --no-scale
    """


@app.command()
def train(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG", help="TOML file; without one, the defaults.", show_default=False
        ),
    ] = None,
    no_scale: Annotated[
        bool, typer.Option("--no-scale", help="Leave out 1/sqrt(d_head), beside a scaled twin.")
    ] = False,
    no_control: Annotated[
        bool, typer.Option("--no-control", help="With --no-scale: without the scaled twin.")
    ] = False,
    lr: Annotated[str | None, typer.Option(help="optimizer.lr", show_default=False)] = None,
    clip: Annotated[str | None, typer.Option(help="clip.threshold", show_default=False)] = None,
    init: Annotated[str | None, typer.Option(help="init.scheme", show_default=False)] = None,
    gain: Annotated[str | None, typer.Option(help="init.gain", show_default=False)] = None,
    steps: Annotated[str | None, typer.Option(help="train.steps", show_default=False)] = None,
    seed: Annotated[str | None, typer.Option(help="train.seed", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="train.device", show_default=False)] = None,
    precision: Annotated[
        str | None, typer.Option(help="precision.dtype", show_default=False)
    ] = None,
    compile_model: Annotated[
        bool, typer.Option("--compile", help="train.compile: run the model through torch.compile.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.SETTING=VALUE",
            help="Any setting, as often as you like.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run directory.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run directory.")] = Path("runs"),
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Go on with this run.", show_default=False),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="The result as JSON on stdout.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Train small transformers and record their attention.

    Example: attnscope train --no-scale
    """
    with one_line_errors(debug=debug):
        from attnscope.cli.live import watch_training
        from attnscope.cli.tables import print_result

        typed = {
            "optimizer.lr": lr,
            "clip.threshold": clip,
            "init.scheme": init,
            "init.gain": gain,
            "train.steps": steps,
            "train.seed": seed,
            "train.device": device,
            "precision.dtype": precision,
        }
        changes = {key: value for key, value in typed.items() if value is not None}
        if compile_model:
            changes["train.compile"] = "true"
        if resume is not None:
            _refuse_with_resume(config, no_scale, name, [*changes, *(settings or [])])
            path, status = watch_training(None, resume, command=_command())
        else:
            resolved = _resolve(config, changes, settings or [], no_scale, no_control)
            stem = "no-scale" if no_scale else config.stem if config else "train"
            path, status = watch_training(resolved, _run_path(out, name, stem), command=_command())
        print_result(path, as_json=json_output)
        if status != "finished":
            note(f"Interrupted. Go on with: attnscope train --resume {shlex.quote(str(path))}")
            raise typer.Exit(INTERRUPTED)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)],
    json_output: Annotated[
        bool, typer.Option("--json", help="What the report says as JSON on stdout.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Write the report of a run: Markdown and figures.

    It is made from the run directory alone: a run that is still training, was killed, or was sent by somebody else
    will do.

    Example: attnscope report runs/no-scale-001
    """
    with one_line_errors(debug=debug):
        from attnscope.cli.tables import print_result

        print_result(run, as_json=json_output)


@app.command()
def diagnose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)],
    fail_on: Annotated[
        FailOn | None,
        typer.Option(help="Exit with code 3 if there is such a finding.", show_default=False),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="The findings as JSON on stdout.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Say what went wrong in a run, with the numbers behind it.

    Causes come before symptoms.

    Example: attnscope diagnose runs/no-scale-001
    """
    with one_line_errors(debug=debug):
        from attnscope.cli.findings import print_findings

        kinds = print_findings(run, as_json=json_output)
        if kinds and (fail_on is FailOn.any or fail_on in kinds):
            raise typer.Exit(FOUND)


@app.command()
def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="With run directories in it.")
    ] = Path("runs"),
    json_output: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """List runs, how each ended and who was trained in it.

    Example: attnscope runs
    """
    with one_line_errors(debug=debug):
        from attnscope.cli.tables import print_runs

        print_runs(folder, as_json=json_output)


bench_app = typer.Typer(
    help="Measure what attnscope costs on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bench_app, name="bench")


@bench_app.command()
def overhead(
    rounds: Annotated[int, typer.Option(min=40, help="Interleaved rounds.")] = 400,
    json_output: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Time what recording costs and an ensemble saves.

    Recording against no recording, the loop against a plain one, sixteen members against sixteen runs; about two
    minutes.

    Example: attnscope bench overhead
    """
    with one_line_errors(debug=debug):
        from attnscope.bench.overhead import measure_overhead
        from attnscope.cli.tables import print_overhead

        print_overhead(measure_overhead(rounds=rounds), as_json=json_output)


def note(text: str) -> None:
    """A line for people, on stderr."""
    typer.echo(text, err=True)


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


def _resolve(
    path: Path | None,
    changes: dict[str, str],
    settings: list[str],
    no_scale: bool,
    no_control: bool,
) -> "Config":
    """Config file, then flags, then --set; later ones win. Warnings go to stderr."""
    from attnscope.config import (
        Config,
        apply_changes,
        load_config,
        members_of,
        parse_assignment,
        warnings_of,
        with_control,
        without_control,
    )
    from attnscope.errors import ConfigError

    config = load_config(path) if path else Config()
    if no_control and not no_scale:
        raise ConfigError(
            "--no-control has no effect without --no-scale. Add it, or drop the flag."
        )
    for key, value in changes.items():
        config = apply_changes(config, dict([parse_assignment(f"{key}={value}")]), where=_flag(key))
    for text in settings:
        config = apply_changes(config, dict([parse_assignment(text)]), where=f"--set {text}")
    if no_scale:
        if config.attention.scale == "learned":
            config = replace(config, attention=replace(config.attention, scale="inverse_sqrt"))
        config = without_control(config) if no_control else with_control(config)
    where = str(path) if path else "command line"
    warnings = [
        warning
        for member in members_of(config, where=where)
        for warning in warnings_of(member.config)
    ]
    for warning in dict.fromkeys(warnings):
        note(f"warning: {warning}.")
    return config


def _flag(key: str) -> str:
    words = {"clip.threshold": "clip", "init.scheme": "init", "precision.dtype": "precision"}
    return f"--{words.get(key, key.split('.')[1])}"


def _run_path(out: Path, name: str | None, stem: str) -> Path:
    from attnscope.errors import RunError

    if name is None:
        from attnscope.train.run import next_run_path

        return next_run_path(out, stem)
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise RunError(
            f"--name is {name!r}, but must be the name of a folder. Use --out for where it stands."
        )
    return out / name


def _refuse_with_resume(
    config: Path | None, no_scale: bool, name: str | None, changed: list[str]
) -> None:
    from attnscope.errors import ConfigError

    given = [str(config)] if config else []
    given += ["--no-scale"] if no_scale else []
    given += ["--name"] if name else []
    given += changed
    if given:
        raise ConfigError(
            f"--resume goes on with a run as it was configured, but {given[0]} was given too. Drop one of them."
        )


def _command() -> tuple[str, ...]:
    return ("attnscope", *sys.argv[1:])
