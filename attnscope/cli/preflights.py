"""`attnscope preflight` on stdout: predicted beside measured, what the rules say, and what to type next."""

import contextlib
import itertools
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from attnscope.cli.checking import print_checks
from attnscope.cli.findings import print_diagnosis
from attnscope.errors import ConfigError, RunWriteError
from attnscope.report.numbers import number
from attnscope.runs.layout import to_json

if TYPE_CHECKING:
    from attnscope.preflight.result import Expected, LayerFacts, Needed, Preflight, Quantity

# Title of a column, the quantity in it; Σp² is 1 - softmax_gain.
LAYER_COLUMNS = (
    ("logit_std", "logit_std"),
    ("entropy", "entropy"),
    ("max_prob", "max_prob"),
    ("Σp²", "softmax_gain"),
    ("residual", "activation_rms"),
)
MOST_LAYERS = 12  # lines; of more the first and the last are shown
MOST_MEMBERS = 4  # whose numbers are shown
LONGEST_NUMBER = 6  # characters
LONGEST_NAME = 16  # characters of a module's path
SHOWN_KEYS = 512  # of the table over d_head
NOTHING = "–"

_Item = TypeVar("_Item")


def preflight_and_print(
    target: str | None,
    *,
    settings: Sequence[str],
    no_scale: bool,
    control: bool,
    causal: bool | None,
    out: Path | None,
    as_json: bool,
) -> "Preflight":
    """Preflight a config, or the model that a factory makes, and print what is to be expected.

    Raises:
        AttnscopeError: the target or an option cannot be used.
    """
    if out is not None:
        raise ConfigError("--out is where --variance draws. Add --variance, or drop it.")
    if target is not None and is_factory(target):
        for flag, is_given in (("--set", bool(settings)), ("--no-scale", no_scale), ("--no-control", not control)):
            if is_given:
                raise ConfigError(f"{flag} changes a config, but {target} makes a model. Drop one of them.")
        said = _of_factory(target, causal=causal)
    else:
        if causal is not None:
            raise ConfigError("--causal is for a model in hand; of a config, model.kind says it. Drop it.")
        said = _of_config(target, settings, no_scale=no_scale, control=control)
    if as_json:
        from attnscope.preflight.result import as_json as table_of

        typer.echo(to_json(table_of(said), indent=1))
    else:
        _print(said)
    return said


def is_factory(target: str) -> bool:
    """Whether it names a function rather than a file."""
    return ":" in target and not target.endswith(".toml") and not Path(target).exists()


def variance_and_print(target: str | None, out: Path, *, given: Mapping[str, bool], as_json: bool) -> None:
    """Measure the variance law, draw it, and print its numbers.

    Raises:
        ConfigError: something was given that has no part in it.
        RunWriteError: the figure cannot be written.
    """
    for name, is_given in {target or "": target is not None, **given}.items():
        if is_given:
            raise ConfigError(f"--variance is measured on random q and k, but {name} was given too. Drop one of them.")
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out is {str(out)!r}, but must be a file that ends in .png.")
    if out.is_dir() or not out.absolute().parent.is_dir():
        why = "it is a folder" if out.is_dir() else f"there is no folder {out.absolute().parent}"
        raise RunWriteError(f"{out}: the figure cannot be written: {why}. Choose another place with --out.")
    from attnscope.preflight.variance import law_as_table, variance_law
    from attnscope.report.figures.variance import draw_variance_law
    from attnscope.runs.atomic import reason_of, replace_file

    with Console(stderr=True).status("Measuring"):
        law = law_as_table(variance_law())
        figure = draw_variance_law(law["cells"], law["freezing"])
    try:
        replace_file(out, figure.png)
    except OSError as error:
        raise RunWriteError(
            f"{out}: the figure cannot be written: {reason_of(error)}. Choose another place with --out."
        ) from None
    if as_json:
        typer.echo(to_json({"figure": str(out), **law}, indent=1))
        return
    console = Console(highlight=False)
    _print_law(console, law)
    console.print()
    console.print(Text(f"Figure: {out}"), soft_wrap=True)
    console.print(Text("Next:   attnscope preflight --no-scale"), soft_wrap=True)


def _of_config(target: str | None, settings: Sequence[str], *, no_scale: bool, control: bool) -> "Preflight":
    from attnscope.cli.resolve import command_line, config_to_train

    path = None if target is None else Path(target)
    config = config_to_train(path, {}, settings, no_scale=no_scale, control=control)
    from attnscope.preflight.lab import preflight_config

    words = [target] if target is not None else []
    words += ["--no-scale"] * no_scale + ["--no-control"] * (not control)
    words += [word for text in settings for word in ("--set", text)]
    with Console(stderr=True).status(Text(f"Rehearsing {target or 'the default config'}")):
        return preflight_config(config, target=" ".join(map(shlex.quote, words)), command=command_line())


def _of_factory(target: str, *, causal: bool | None) -> "Preflight":
    from attnscope.check.factory import made_by
    from attnscope.cli.resolve import command_line
    from attnscope.preflight.foreign import preflight_model

    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no result
        model, batch = made_by(target)
        with Console(stderr=True).status(Text(f"Looking at {target}")):
            return preflight_model(model, batch, causal=causal, target=target, command=command_line())


def _print(said: "Preflight") -> None:
    console = Console(highlight=False)
    for member in said.members[:MOST_MEMBERS]:
        _print_member(console, member)
    if len(said.members) > MOST_MEMBERS:
        console.print(Text(f"The numbers of {len(said.members) - MOST_MEMBERS} more members are in --json.\n"))
    for needed in said.needs:
        _print_needed(console, needed, is_alone=len(said.needs) == 1)
    console.print()
    by_member: dict[str, list[object]] = {}
    for name, check in said.checks:
        by_member.setdefault(name, []).append(check)
    for name, checks in by_member.items():
        if len(by_member) > 1:
            console.print(Text(f"Masks and leaks of {name}", style="bold"), soft_wrap=True)
        print_checks(console, checks)  # type: ignore[arg-type]
        console.print()
    print_diagnosis(console, said.diagnosis)
    looked, of = said.rules
    console.print(Text(_verdict(said)), soft_wrap=False)
    console.print(Text(f"{looked} of {of} rules could look at so few steps; the others wait for training."))
    console.print()
    console.print(Text(f"Next: {_next(said)}"), soft_wrap=True)


def _verdict(said: "Preflight") -> str:
    counts = {name: sum(f.severity == name for f in said.diagnosis.findings) for name in ("error", "warning")}
    counts["failed check"] = len(said.failed)
    against = [f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count]
    return f"Not ready: {', '.join(against)}." if against else "Ready: no rule and no check objects."


def _next(said: "Preflight") -> str:
    is_model = bool(said.target) and is_factory(said.target.split(" ")[0])
    if not said.ready:
        return f"change it, then again: attnscope preflight {said.target}".rstrip()
    return "attnscope watch train.py" if is_model else f"attnscope train {said.target}".rstrip()


def _print_member(console: Console, member: "Expected") -> None:
    console.print(Text(f"{member.member}: predicted / measured before the first step", style="bold"), soft_wrap=True)
    layers = list(member.layers)
    if not layers:
        console.print(Text("  no attention was seen"))
    shown = _first_and_last(layers)
    columns = [(title, name) for title, name in LAYER_COLUMNS if layers and name in _by_name(layers[0])]
    is_named = any(layer.name is not None for layer in layers)
    rows = [["layer", *(title for title, _ in columns)]]
    rows += [[_label(layer), *(_pair(_by_name(layer)[name], name) for _, name in columns)] for layer in shown]
    _print_columns(console, rows, words=(0,) if is_named else ())
    if len(shown) < len(layers):
        console.print(Text(f"  ({len(layers) - len(shown)} layers between them are in --json)"))
    console.print()
    _print_gradients(console, member)
    rows = [["", "predicted", "measured", "compare with"]]
    rows += [
        [
            quantity.name,
            _shown(quantity.predicted),
            _shown(quantity.measured),
            ", ".join(f"{words} {_plain(value)}" for words, value in quantity.compared),
        ]
        for quantity in member.quantities
    ]
    _print_columns(console, rows, words=(0, 3))
    console.print()


def _print_gradients(console: Console, member: "Expected") -> None:
    """Norms of gradients, a line per layer and a column per group."""
    by_layer: dict[int, dict[str, float]] = {}
    for each in member.gradients:
        by_layer.setdefault(each.layer, {})[each.group] = each.norm
    outside = by_layer.pop(-1, {})
    groups = list(dict.fromkeys(group for layer in by_layer.values() for group in layer))
    widths = [max(len(group), LONGEST_NUMBER) + 2 for group in groups]
    groups = _as_many_as_fit(console, groups, widths, len("gradient"))
    if groups:
        rows = [["gradient", *groups]]
        rows += [
            [str(layer), *(_shown(by_layer[layer].get(group)) for group in groups)]
            for layer in _first_and_last(sorted(by_layer))
        ]
        _print_columns(console, rows, words=())
    if outside:
        widths = [len(group) + LONGEST_NUMBER + 2 for group in outside]
        names = _as_many_as_fit(console, list(outside), widths, len("outside of layers: "))
        others = ", ".join(f"{group} {number(outside[group])}" for group in names)
        console.print(Text(f"outside of layers: {others}"), soft_wrap=True)
    if member.gradients:
        console.print()


def _first_and_last(items: "Sequence[_Item]") -> "Sequence[_Item]":
    """At most MOST_LAYERS of them."""
    half = MOST_LAYERS // 2
    return items if len(items) <= MOST_LAYERS else [*items[:half], *items[-half:]]


def _as_many_as_fit(console: Console, names: Sequence[str], widths: Sequence[int], before: int) -> list[str]:
    """The first of them that a line holds."""
    ends = itertools.accumulate(widths, initial=before)
    return [name for name, end in zip(names, itertools.islice(ends, 1, None), strict=True) if end <= console.width]


def _print_needed(console: Console, needed: "Needed", *, is_alone: bool) -> None:
    who = "all" if is_alone else ", ".join(needed.members[:3]) + (", ..." if len(needed.members) > 3 else "")
    rows = [[f"for {who}", "predicted", "measured"]]
    rows += [
        [each.name, _size(each.predicted, each.unit), _size(each.measured, each.unit)] for each in needed.quantities
    ]
    _print_columns(console, rows)


def _print_law(console: Console, law: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    title = f"q and k with entries of variance 1, {SHOWN_KEYS} keys: without the scale / with it"
    console.print(Text(title, style="bold"), soft_wrap=True)
    rows = [["d_head", "√d_head", "logit_std", "beyond ±5", "1−Σp²", "max_prob"]]
    cells = [cell for cell in law["cells"] if cell["n_keys"] == SHOWN_KEYS]
    for one, two in zip(cells[::2], cells[1::2], strict=True):
        both = (one, two)
        rows.append(
            [
                str(one["d_head"]),
                number(one["predicted_std"]),
                " / ".join(number(cell["logit_std"]) for cell in both),
                " / ".join(f"{cell['logits_over_5']:.0%}" for cell in both),
                *(" / ".join(f"{cell[name]:.2f}" for cell in both) for name in ("softmax_gain", "max_prob")),
            ]
        )
    _print_columns(console, rows, words=())
    console.print()
    title = "Σp² where σ is twice √(2 ln T); theory, for many keys: 1 − √(2 ln T)/σ"
    console.print(Text(title, style="bold"), soft_wrap=True)
    rows = [["keys", "√(2 ln T)", "σ", "theory", "measured"]]
    rows += [
        [
            f"{point['n_keys']:,}",
            *(f"{point[name]:.2f}" for name in ("critical", "logit_std", "predicted", "measured")),
        ]
        for point in law["freezing"]
        if math.isclose(point["logit_std"], 2 * point["critical"])
    ]
    _print_columns(console, rows, words=())


def _print_columns(console: Console, rows: Sequence[Sequence[str]], *, words: Sequence[int] = (0,)) -> None:
    """Columns as wide as they must be, numbers to the right, without trailing blanks."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for at, row in enumerate(rows):
        cells = [
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        console.print(Text("  ".join(cells).rstrip(), style="dim" if at == 0 else ""), soft_wrap=True)


def _label(layer: "LayerFacts") -> str:
    """Its number, and as much of its module's path as there is room for, from the end."""
    name = layer.name
    if name is None:
        return str(layer.layer)
    while len(name) > LONGEST_NAME and "." in name:
        name = name.partition(".")[2]
    return f"{layer.layer} {name[-LONGEST_NAME:]}"


def _by_name(layer: "LayerFacts") -> "dict[str, Quantity]":
    return {quantity.name: quantity for quantity in layer.quantities}


def _pair(quantity: "Quantity", name: str) -> str:
    values = (quantity.predicted, quantity.measured)
    if name == "softmax_gain":
        values = tuple(None if value is None else 1 - value for value in values)  # type: ignore[assignment]
    return " / ".join(_shown(value) for value in values)


def _plain(value: float) -> str:
    return number(value) if value < 1e4 else f"{value:,.0f}"


def _shown(value: float | None) -> str:
    return NOTHING if value is None else number(value)


def _size(value: float | None, unit: str) -> str:
    if value is None:
        return NOTHING
    if unit == "seconds":
        return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"
    return f"{value / 2**20:,.1f} MiB" if value < 2**30 else f"{value / 2**30:,.1f} GiB"
