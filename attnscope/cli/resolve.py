"""From a command line to what a command works on: the config, the sweep, the place of the run directory."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import typer

from attnscope.config import (
    SEED,
    Config,
    apply_changes,
    load_config,
    make_sweep,
    members_of,
    parse_assignment,
    parse_vary,
    warnings_of,
    with_control,
    without_control,
)
from attnscope.errors import ConfigError, RunError

FLAGS = {
    "--lr": "optimizer.lr",
    "--clip": "clip.threshold",
    "--init": "init.scheme",
    "--gain": "init.gain",
    "--steps": "train.steps",
    "--seed": "train.seed",
    "--device": "train.device",
    "--precision": "precision.dtype",
    "--compile": "train.compile",
}
MOST_WARNINGS = 5


def config_to_train(
    path: Path | None,
    flags: Mapping[str, str | None],
    settings: Sequence[str],
    *,
    no_scale: bool,
    control: bool,
) -> Config:
    """Config file, then flags, then --set; later ones win. Warnings go to stderr.

    Raises:
        ConfigError: a setting is impossible, flags contradict each other, or the config describes a sweep.
    """
    config = load_config(path) if path else Config()
    if config.sweep is not None:
        raise ConfigError(f"{path} describes a sweep. Run it: attnscope sweep {path}")
    if not control and not no_scale:
        raise ConfigError("--no-control has no effect without --no-scale. Add it, or drop the flag.")
    for flag, value in flags.items():
        if value is not None:
            change = dict([parse_assignment(f"{FLAGS[flag]}={value}")])
            config = apply_changes(config, change, where=flag)
    config = _with_settings(config, settings)
    if no_scale:
        if config.attention.scale == "learned":
            config = replace(config, attention=replace(config.attention, scale="inverse_sqrt"))
        config = with_control(config) if control else without_control(config)
    _warn(config, path)
    return config


def config_to_sweep(
    path: Path | None,
    *,
    vary: Sequence[str],
    seeds: str | None,
    baseline: Sequence[str],
    settings: Sequence[str],
) -> Config:
    """The config with its sweep; --vary adds an axis to those of the file, or replaces the one of the same setting.

    Raises:
        ConfigError: as `attnscope.config.make_sweep`, or a setting is both varied and set.
    """
    loaded = load_config(path) if path else Config()
    before = loaded.sweep
    typed = [parse_vary(text) for text in vary]
    axes = {axis.key: axis for axis in before.vary} if before else {}
    replaced = {axis.key for axis in typed}
    if len(replaced) < len(typed):
        raise ConfigError(
            f"--vary {next(a.key for a in typed if sum(a.key == b.key for b in typed) > 1)} was given twice. "
            "Put all its values into one list."
        )
    axes |= {axis.key: axis for axis in typed}
    config = _with_settings(replace(loaded, sweep=None), settings)
    fixed = {parse_assignment(text)[0] for text in settings}
    for key in axes:
        if key in fixed:
            raise ConfigError(
                f"--set {key}: {key} varies in this sweep. Drop it, or give --vary {key} with that one value."
            )
    if SEED in fixed and before and len(before.seeds) > 1 and seeds is None:
        raise ConfigError(
            f"--set {SEED}: the seeds of this sweep are listed in it. Say how many from there on: --seeds {len(before.seeds)}."
        )
    chosen: object = _seeds(seeds) if seeds is not None else before.seeds if before else 1
    compared = {k: v for k, v in before.baseline.items() if k in axes and k not in replaced} if before else {}
    compared |= dict(parse_assignment(text) for text in baseline)
    config = make_sweep(config, list(axes.values()), seeds=chosen, baseline=compared, where="sweep")
    _warn(config, path)
    return config


def run_path(out: Path, name: str | None, stem: str) -> Path:
    """Where the run directory comes to stand.

    Raises:
        RunError: `name` cannot be the name of a folder.
    """
    if name is None:
        from attnscope.runs.writer import next_run_path

        return next_run_path(out, stem)
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise RunError(f"--name is {name!r}, but must be the name of a folder. Use --out for where it stands.")
    return out / name


def refuse_with_resume(config: Path | None, given: Mapping[str, object]) -> None:
    """A resumed run is as it was configured.

    Args:
        config: the argument.
        given: flag to what was given for it; empty where nothing was.

    Raises:
        ConfigError: something was.
    """
    named = [str(config)] if config else []
    named += [flag for flag, value in given.items() if value]
    if named:
        raise ConfigError(
            f"--resume goes on with a run as it was configured, but {named[0]} was given too. Drop one of them."
        )


def memory_in_bytes(text: str) -> int:
    """`--memory 6` or `--memory 512MiB` in bytes; a number alone counts GiB.

    Raises:
        ConfigError: it is no size.
    """
    units = {"": 30, "gib": 30, "gb": 30, "g": 30, "mib": 20, "mb": 20, "m": 20}
    digits = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(digits) :].strip().lower()
    try:
        size = float(digits) * 2 ** units[unit]
    except (ValueError, KeyError):
        size = 0.0
    if not 2**20 <= size < 2**60:
        raise ConfigError(f"--memory is {text!r}, but must be a size like 6GiB or 512MiB.")
    return int(size)


def command_line() -> tuple[str, ...]:
    """As it was typed, for run.json."""
    return ("attnscope", *sys.argv[1:])


def _with_settings(config: Config, settings: Sequence[str]) -> Config:
    for text in settings:
        config = apply_changes(config, dict([parse_assignment(text)]), where=f"--set {text}")
    return config


def _seeds(text: str) -> object:
    """A number, or several with commas between."""
    try:
        seeds = [int(piece) for piece in text.split(",")]
    except ValueError:
        return text
    return seeds if "," in text else seeds[0]


def _warn(config: Config, path: Path | None) -> None:
    where = str(path) if path else "command line"
    warnings = dict.fromkeys(
        warning for member in members_of(config, where=where) for warning in warnings_of(member.config)
    )
    for warning in list(warnings)[:MOST_WARNINGS]:
        typer.echo(f"warning: {warning}.", err=True)
    if len(warnings) > MOST_WARNINGS:
        typer.echo(f"warning: and {len(warnings) - MOST_WARNINGS} more like these.", err=True)
