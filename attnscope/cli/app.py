"""Every command: parse, call one function, print, name the next command.

Whatever is heavy is imported inside the command, so that `--help` costs nothing.
"""

import contextlib
import shlex
import traceback
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
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
        from attnscope.cli.resolve import (
            command_line,
            config_to_train,
            refuse_with_resume,
            run_path,
        )
        from attnscope.cli.tables import print_result

        flags = {
            "--lr": lr,
            "--clip": clip,
            "--init": init,
            "--gain": gain,
            "--steps": steps,
            "--seed": seed,
            "--device": device,
            "--precision": precision,
            "--compile": "true" if compile_model else None,
        }
        if resume is not None:
            refuse_with_resume(
                config,
                {**flags, "--no-scale": no_scale or None, "--name": name, "--set": settings},
            )
            path, status = watch_training(None, resume, command=command_line())
        else:
            resolved = config_to_train(
                config, flags, settings or [], no_scale=no_scale, control=not no_control
            )
            stem = "no-scale" if no_scale else config.stem if config else "train"
            where = run_path(out, name, stem)
            path, status = watch_training(resolved, where, command=command_line())
        print_result(path, as_json=json_output)
        if status != "finished":
            note(f"Interrupted. Go on with: attnscope train --resume {shlex.quote(str(path))}")
            raise typer.Exit(INTERRUPTED)


@app.command()
def sweep(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG", help="TOML file; without one, the defaults.", show_default=False
        ),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION.SETTING=VALUES",
            help="Values with commas, log:LOW:HIGH:COUNT or lin:LOW:HIGH:COUNT; as often as you like.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="How many, or which, with commas.  [default: 1]", show_default=False
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION.SETTING=VALUE",
            help="What the others are compared with, where it is not the config itself.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.SETTING=VALUE",
            help="Any setting that does not vary.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Parts that are trained at the same time.")] = 1,
    use_ray: Annotated[
        bool, typer.Option("--ray", help="Train the parts as Ray tasks, on a Ray of this machine.")
    ] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Of the Ray cluster to use instead.", show_default=False
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="For all parts at the same time, like 6GiB.  [default: most of what is free]",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained, how long and how large.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Name of the run directory.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run directory.")] = Path("runs"),
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Train what this sweep has not finished.", show_default=False
        ),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="The result as JSON on stdout.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Train a grid of settings, and map where training breaks.

    Members that differ in numbers alone share one batched part; parts are sized to memory.

    Example: attnscope sweep --vary attention.scale=inverse_sqrt,none --vary init.gain=0.5,1 --seeds 3
    """
    with one_line_errors(debug=debug):
        from attnscope.cli.resolve import (
            command_line,
            config_to_sweep,
            memory_in_bytes,
            refuse_with_resume,
            run_path,
        )
        from attnscope.cli.sweeping import plan_of, print_plan, watch_sweep, workers_for
        from attnscope.cli.tables import print_result

        limit = memory_in_bytes(memory) if memory is not None else None
        resolved = None
        if resume is not None:
            given = {"--vary": vary, "--seeds": seeds, "--baseline": baseline, "--set": settings}
            unfit = {"--name": name, "--memory": memory, "--dry-run": dry_run}
            refuse_with_resume(config, {**given, **unfit})
        else:
            resolved = config_to_sweep(
                config,
                vary=vary or [],
                seeds=seeds,
                baseline=baseline or [],
                settings=settings or [],
            )
        with workers_for(jobs, resolved, ray=use_ray, address=ray_address) as workers:
            if resolved is not None:
                plan = plan_of(resolved, workers, jobs=jobs, memory_bytes=limit)
                if dry_run:
                    print_plan(resolved, plan, as_json=json_output)
                    return
                path = run_path(out, name, config.stem if config else "sweep")
                end = watch_sweep(resolved, plan, path, workers=workers, command=command_line())
            else:
                assert resume is not None
                path = resume
                end = watch_sweep(None, None, path, workers=workers, command=command_line())
        print_result(path, as_json=json_output)
        for failure in end.failures:
            members = "1 member" if len(failure.members) == 1 else f"{len(failure.members)} members"
            note(f"error: part {failure.part} ({members}) {failure.reason}; all others are kept.")
        if end.status != "finished":
            again = f"attnscope sweep --resume {shlex.quote(str(path))}"
            note(f"{end.status.capitalize()}. Train what is missing: {again}")
            raise typer.Exit(1 if end.failures else INTERRUPTED)


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
        typer.Option(
            help="Folder of the report.  [default: below comparisons]", show_default=False
        ),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", help="The result as JSON on stdout.")
    ] = False,
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
    json_output: Annotated[
        bool, typer.Option("--json", help="What the report says as JSON on stdout.")
    ] = False,
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


@app.command(context_settings={"allow_interspersed_args": False})
def watch(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SCRIPT [ARGS]...",
            help="What to run, with its own arguments.",
            show_default=False,
        ),
    ],
    module: Annotated[
        bool, typer.Option("-m", help="SCRIPT is a module, as in python -m.")
    ] = False,
    every: Annotated[
        int, typer.Option(min=1, help="Measure attention and parameters at every so many steps.")
    ] = 10,
    rows: Annotated[
        str, typer.Option(metavar="N|all", help="Query rows measured per head and call.")
    ] = "32",
    name: Annotated[
        str | None, typer.Option(help="Name of the run directory.", show_default=False)
    ] = None,
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
            command=command_line(),
        )
    raise typer.Exit(code)


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
