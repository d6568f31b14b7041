"""Commands that measure attnscope: bench overhead, bench sweep, bench report."""

from typing import Annotated

import typer

from attnscope.cli.app import app, one_line_errors

bench_app = typer.Typer(
    help="Measure what attnscope costs on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(bench_app, name="bench")


@bench_app.command()
def overhead(
    watch: Annotated[
        bool, typer.Option("--watch", help="What watching costs a loop of nanoGPT's shape instead.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=40, help="Interleaved rounds.")] = 400,
    json_output: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Time what recording costs and an ensemble saves.

    Recording against no recording, the loop against a plain one, sixteen members against sixteen runs; about two
    minutes. With --watch, about four.

    Example: attnscope bench overhead
    """
    with one_line_errors(debug=debug):
        if watch:
            from attnscope.bench.watching import measure_watching
            from attnscope.cli.tables import print_watch_overhead

            print_watch_overhead(measure_watching(rounds=rounds // 25), as_json=json_output)
            return
        from attnscope.bench.overhead import measure_overhead
        from attnscope.cli.tables import print_overhead

        print_overhead(measure_overhead(rounds=rounds), as_json=json_output)


@bench_app.command("sweep")
def bench_sweep(
    rounds: Annotated[int, typer.Option(min=2, help="Interleaved rounds.")] = 5,
    json_output: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Time what a sweep saves by training its members together.

    Against single runs, one after another and two at a time; about three minutes.

    Example: attnscope bench sweep
    """
    with one_line_errors(debug=debug):
        from attnscope.bench.sweeps import measure_sweeps
        from attnscope.cli.tables import print_sweep_gain

        print_sweep_gain(measure_sweeps(rounds=rounds), as_json=json_output)


@bench_app.command("report")
def bench_report(
    json_output: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Time opening, analysing and reporting large synthetic runs.

    1,000 members of 200 steps, and one of 100,000 steps with 8 layers of 8 heads; about two minutes.

    Example: attnscope bench report
    """
    with one_line_errors(debug=debug):
        from attnscope.bench.reports import measure_reports
        from attnscope.cli.tables import print_report_costs

        print_report_costs(measure_reports(), as_json=json_output)
