"""Commands that train: train, sweep."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from attnscope.cli.app import FOUND, INTERRUPTED, app, note, one_line_errors


@app.command()
def train(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="TOML file; without one, the defaults.", show_default=False),
    ] = None,
    no_scale: Annotated[
        bool, typer.Option("--no-scale", help="Leave out 1/sqrt(d_head), beside a scaled twin.")
    ] = False,
    no_control: Annotated[bool, typer.Option("--no-control", help="With --no-scale: without the scaled twin.")] = False,
    lr: Annotated[str | None, typer.Option(help="optimizer.lr", show_default=False)] = None,
    clip: Annotated[str | None, typer.Option(help="clip.threshold", show_default=False)] = None,
    init: Annotated[str | None, typer.Option(help="init.scheme", show_default=False)] = None,
    gain: Annotated[str | None, typer.Option(help="init.gain", show_default=False)] = None,
    steps: Annotated[str | None, typer.Option(help="train.steps", show_default=False)] = None,
    seed: Annotated[str | None, typer.Option(help="train.seed", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="train.device", show_default=False)] = None,
    precision: Annotated[str | None, typer.Option(help="precision.dtype", show_default=False)] = None,
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
    stop_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Stop, with a checkpoint, at nonfinite, explosion, what a rule such as entropy_collapse finds, or "
            "COLUMN>NUMBER such as max_logit>1e4; exit code 3.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run directory.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run directory.")] = Path("runs"),
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with this run.", show_default=False)] = None,
    json_output: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Train small transformers and record their attention.

    Example: attnscope train --no-scale
    """
    with one_line_errors(debug=debug):
        from attnscope.cli.live import watch_training
        from attnscope.cli.resolve import command_line, config_to_train, refuse_with_resume, run_path
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
            refuse_with_resume(config, {**flags, "--no-scale": no_scale or None, "--name": name, "--set": settings})
            path, status = watch_training(None, resume, stop_on=stop_on or [], command=command_line())
        else:
            resolved = config_to_train(config, flags, settings or [], no_scale=no_scale, control=not no_control)
            stem = "no-scale" if no_scale else config.stem if config else "train"
            where = run_path(out, name, stem)
            path, status = watch_training(resolved, where, stop_on=stop_on or [], command=command_line())
        print_result(path, as_json=json_output)
        if status != "finished":
            note(f"{status.capitalize()}. Go on with: attnscope train --resume {shlex.quote(str(path))}")
            raise typer.Exit(FOUND if status == "stopped" else INTERRUPTED)


@app.command()
def sweep(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="TOML file; without one, the defaults.", show_default=False),
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
        typer.Option(metavar="N", help="How many, or which, with commas.  [default: 1]", show_default=False),
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
        typer.Option(metavar="ADDRESS", help="Of the Ray cluster to use instead.", show_default=False),
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
    stop_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Stop all parts, with a checkpoint, at nonfinite, explosion, what a rule such as entropy_collapse finds, or "
            "COLUMN>NUMBER such as max_logit>1e4; exit code 3.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run directory.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run directory.")] = Path("runs"),
    resume: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Train what this sweep has not finished.", show_default=False),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="The result as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Errors with a traceback.")] = False,
) -> None:
    """Train a grid of settings, and map where training breaks.

    Members that differ in numbers alone share one batched part; parts are sized to memory.

    Example: attnscope sweep --vary attention.scale=inverse_sqrt,none --vary init.gain=0.5,1 --seeds 3
    """
    with one_line_errors(debug=debug):
        from attnscope.cli.resolve import command_line, config_to_sweep, memory_in_bytes, refuse_with_resume, run_path
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
        with workers_for(jobs, resolved, ray=use_ray, address=ray_address, stop_on=stop_on or []) as workers:
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
            codes = {"failed": 1, "stopped": FOUND}
            raise typer.Exit(codes.get(end.status, INTERRUPTED))
