"""Commands that measure attnscope: bench overhead, bench sweep, bench report, bench faults."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from attnscope.cli.app import app, one_line_errors
from attnscope.cli.faults import print_faults

if TYPE_CHECKING:
    from collections.abc import Sequence

    from attnscope.bench.faults.answered import Answered
    from attnscope.bench.overhead import Overhead
    from attnscope.bench.reports import ReportCost
    from attnscope.bench.sweeps import SweepGain
    from attnscope.bench.watching import WatchOverhead

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

            print_watch_overhead(measure_watching(rounds=rounds // 25), as_json=json_output)
            return
        from attnscope.bench.overhead import measure_overhead

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

        print_report_costs(measure_reports(), as_json=json_output)


WORTH_IT = 1.2  # times as fast


@bench_app.command("faults")
def bench_faults(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the programs' runs, and of the data, the score and its figures; what is done in it is not done again. "
            "Without --published: runs/faults."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, of one thread each.")] = 2,
    small: Annotated[
        bool, typer.Option("--small", help="Each fault at its greatest strength, in a few programs.")
    ] = False,
    published: Annotated[
        bool, typer.Option("--published", help="Score the answers that attnscope comes with; nothing is trained.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="As JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Measure how often diagnose is right.

    Trains programs written in plain PyTorch, under watch, and runs of the lab, with a known fault in them and without, and
    asks every rule.
    Thresholds may be chosen on one half of the programs; what is told is of the other half.

    Example: attnscope bench faults --published
    """
    with one_line_errors(debug=debug):
        from attnscope.bench.faults.answered import PUBLISHED, read_answers
        from attnscope.bench.faults.score import answers, score

        if published and small:
            raise typer.BadParameter("--small trains, --published does not.", param_hint="--small")
        if published:
            answered = read_answers(PUBLISHED)
        else:
            out = Path("runs/faults") if out is None else out
            answered = _trained_and_asked(out, jobs=jobs, small=small)
        scored = score(answers(answered))
        if out is not None:
            from attnscope.bench.faults.publish import write_outcome

            write_outcome(answered, scored, out)
        print_faults(scored, as_json=json_output)


def _trained_and_asked(folder: Path, *, jobs: int, small: bool) -> "list[Answered]":
    from attnscope.bench.faults.answered import FILE, ask_all, read_answers, write_answers
    from attnscope.bench.faults.bases import BASES, available
    from attnscope.bench.faults.population import N_HEALTHY, SMALL_HEALTHY, SMALL_SEEDS, Done, cases, train_all

    if absent := sorted({*BASES} - {*available()}):
        typer.echo(
            f"transformers is not installed: {', '.join(absent)} left out. pip install 'attnscope[hf]'", err=True
        )
    population = cases(
        n_seeds=SMALL_SEEDS if small else 3, n_healthy=SMALL_HEALTHY if small else N_HEALTHY, strongest=small
    )

    def told(done: Done, left: int) -> None:
        typer.echo(f"{done.case}: loss {done.final_loss:.3g}, held out {done.held_out_loss:.3g}; {left} left", err=True)

    def asked(left: int) -> None:
        if left % 50 == 0:
            typer.echo(f"every rule was asked; {left} programs left", err=True)

    done = train_all(population, folder, jobs=jobs, on_done=told)
    write_answers(ask_all(done, folder, jobs=jobs, on_asked=asked), folder / FILE)
    return read_answers(folder / FILE)  # rounded as they are published, so that both score alike


def print_overhead(overhead: "Overhead", *, as_json: bool) -> None:
    """Print what `attnscope bench overhead` measured."""
    if as_json:
        _print_json(asdict(overhead))
        return
    for line in (
        "Ratios of step times: median (middle half); d_model 128, 4 layers, seq_len 64, batch 16.",
        f"recording on / off                    {overhead.recording}",
        f"tokens/s, recording on / plain loop   {overhead.plain}",
        f"plain loop / itself                   {overhead.plain_twice}",
        f"16 tiny members at once / one by one  {overhead.ensemble}",
        f"tables on disk                        {overhead.mb_per_1000_steps:.2f} MB per 1,000 steps",
        f"tokens/s                              {overhead.recorded_tokens_s:,.0f} recorded, "
        f"{overhead.plain_tokens_s:,.0f} plain",
    ):
        typer.echo(line)


def print_watch_overhead(overhead: "WatchOverhead", *, as_json: bool) -> None:
    """Print what `attnscope bench overhead --watch` measured."""
    if as_json:
        _print_json(asdict(overhead))
        return
    for line in (
        "Ratios of step times: median (middle half); d_model 256, 4 layers, seq_len 256, batch 8, fused attention, AdamW.",
        f"watched, every step / not watched        {overhead.every_step}",
        f"watched, every {overhead.every} steps / not watched    {overhead.default}",
        f"not watched / itself                     {overhead.unwatched}",
        f"step without attnscope                   {overhead.step_ms:.0f} ms",
    ):
        typer.echo(line)


def print_sweep_gain(gain: "SweepGain", *, as_json: bool) -> None:
    """Print what `attnscope bench sweep` measured."""
    if as_json:
        _print_json(asdict(gain))
        return
    gains = gain.large.median > WORTH_IT
    for line in (
        "Ratios of member-steps per second: median (middle half); d_model 32, 2 layers, seq_len 16.",
        f"64 members at once / one by one            {gain.loop}",
        f"64 members at once / one by one, two jobs  {gain.jobs}",
        f"default model at once / one by one, {gain.large_on:<6} {gain.large}",
        f"member-steps/s, 64 tiny members            {gain.member_steps_s:,.0f}",
        "The default model gains from being trained together."
        if gains
        else "The default model gains nothing from being trained together here: one member keeps the cores busy.",
    ):
        typer.echo(line)


def print_report_costs(costs: "Sequence[ReportCost]", *, as_json: bool) -> None:
    """Print what `attnscope bench report` measured."""
    if as_json:
        _print_json([asdict(cost) for cost in costs])
        return
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("run", "MB", "opened", "analysed", "reported"):
        table.add_column(title, justify="left" if title == "run" else "right")
    for report_cost in costs:
        shape = report_cost.shape
        table.add_row(
            f"{shape.n_members:,} x {shape.n_steps:,} steps x {shape.n_layers} x {shape.n_heads} heads",
            f"{report_cost.mb:.0f}",
            *(
                f"{cost.seconds:.1f} s, {cost.peak_bytes / 2**30:.2f} GiB"
                for cost in (report_cost.opened, report_cost.analysed, report_cost.reported)
            ),
        )
    console.print(table)


def _print_json(said: object) -> None:
    from attnscope.runs.layout import to_json  # imports numpy

    typer.echo(to_json(said, indent=1))
