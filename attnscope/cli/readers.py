"""Commands that read runs: compare, report, diagnose, runs, export. None of them needs torch."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from attnscope.cli.app import FOUND, app, one_line_errors


class ExportTo(StrEnum):
    """What `export` writes for."""

    csv = "csv"
    parquet = "parquet"
    tensorboard = "tensorboard"
    wandb = "wandb"
    mlflow = "mlflow"


@app.command()
def compare(
    members: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_MEMBER...",
            help="Run directories, or RUN:MEMBER for one member.",
            show_default=False,
        ),
    ],
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION.SETTING=VALUE",
            help="What the others are compared with.  [default: the first]",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the report.  [default: below comparisons]", show_default=False),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Put runs or members side by side: only what differs, then what became of it.

    Members that share seed and data are compared in pairs.

    Example: attnscope compare runs/no-scale-001 runs/no-scale-002:scaled
    """
    with one_line_errors(debug=debug):
        from attnscope.cli.comparing import compare_runs

        compare_runs(members, baseline=baseline or [], out=out, as_json=json_output)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)],
    json_output: Annotated[bool, typer.Option("--json", help="What the report says as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Write the report of a run: one HTML file, Markdown, figures, findings.

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
        str | None,
        typer.Option(
            metavar="error|warning|RULE",
            help="Exit with code 3 if there is such a finding; a warning is also there where an error is.",
            show_default=False,
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="The findings as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Say what went wrong in a run, with the numbers behind it.

    Causes come before symptoms; a note is an odd setting of which no harm was measured, and fails nothing but its own name.

    Example: attnscope diagnose runs/no-scale-001
    """
    with one_line_errors(debug=debug):
        from attnscope.cli.findings import fails, print_findings

        is_met = fails(fail_on)
        if any(map(is_met, print_findings(run, as_json=json_output))):
            raise typer.Exit(FOUND)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="With run directories in it.")] = Path("runs"),
    json_output: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """List runs, how each ended and who was trained in it.

    Example: attnscope runs
    """
    with one_line_errors(debug=debug):
        from attnscope.cli.tables import print_runs

        print_runs(folder, as_json=json_output)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.", show_default=False)],
    to: Annotated[ExportTo, typer.Option(help="What to write it for.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(help="New folder to write.  [default: export/TARGET in the run, replaced]", show_default=False),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="What was written as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Hand a run to other tools: a file per table, or a run per member in a tracker.

    WANDB_MODE and MLFLOW_TRACKING_URI say where wandb and mlflow send it.

    Example: attnscope export runs/no-scale-001 --to parquet
    """
    with one_line_errors(debug=debug):
        from attnscope.cli.exporting import export_and_print

        export_and_print(run, to.value, out=out, as_json=json_output)
