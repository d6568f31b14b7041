"""The command that looks ahead: preflight."""

from pathlib import Path
from typing import Annotated

import typer

from attnscope.cli.app import FOUND, app, one_line_errors

FIGURE = Path("variance.png")


@app.command()
def preflight(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG|MODULE:FACTORY",
            help="TOML file, or what makes (model, batch); without one, the default config.",
            show_default=False,
        ),
    ] = None,
    no_scale: Annotated[
        bool, typer.Option("--no-scale", help="Leave out 1/sqrt(d_head), beside a scaled twin.")
    ] = False,
    no_control: Annotated[bool, typer.Option("--no-control", help="With --no-scale: without the scaled twin.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.SETTING=VALUE",
            help="Any setting of the config, as often as you like.",
            show_default=False,
        ),
    ] = None,
    causal: Annotated[
        bool | None,
        typer.Option(
            "--causal/--no-causal",
            help="What a model in hand is meant to be.  [default: say what it is]",
            show_default=False,
        ),
    ] = None,
    variance: Annotated[
        bool,
        typer.Option("--variance", help="Measure and draw why q.k is divided by sqrt(d_head); no target."),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"PNG that --variance draws.  [default: {FIGURE}]",
            show_default=False,
        ),
    ] = None,
    fail_on: Annotated[
        str | None,
        typer.Option(
            metavar="error|warning|RULE",
            help="Exit with code 3 if there is such a finding; a failed check is an error.",
            show_default=False,
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Everything as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Say what a config or a model will do, before it is trained.

    Two steps on a throw-away copy, beside what theory predicts; the rules of diagnose judge them.

    Example: attnscope preflight configs/silent_saturation.toml
    """
    with one_line_errors(debug=debug):
        from attnscope.cli.findings import fails
        from attnscope.cli.preflights import preflight_and_print, variance_and_print

        wanted = fails(fail_on)  # says what is wrong before anything is measured
        if variance:
            given = {
                "--no-scale": no_scale or no_control,
                "--set": bool(settings),
                "--causal": causal is not None,
                "--fail-on": fail_on is not None,
            }
            variance_and_print(target, out or FIGURE, given=given, as_json=json_output)
            return
        said = preflight_and_print(
            target,
            settings=settings or [],
            no_scale=no_scale,
            control=not no_control,
            causal=causal,
            out=out,
            as_json=json_output,
        )
        if any(map(wanted, said.diagnosis.findings)) or (fail_on in ("error", "warning") and said.failed):
            raise typer.Exit(FOUND)
