"""[sweep]: which settings vary and over which seeds; from there to arms, one per cell and seed.

[sweep]
seeds = 5                              # train.seed and the four after it; or a list
vary.attention.scale = ["inverse_sqrt", "none"]
vary.optimizer.lr = "log:1e-4:1e-1:7"  # or lin:LOW:HIGH:COUNT, or a list
baseline.attention.scale = "none"      # compare with this cell; else the config's own values
"""

import itertools
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NoReturn

from attnscope.config.change import apply_changes, check_name, flatten, get_setting
from attnscope.config.checks import OneLine
from attnscope.config.schema import SETTINGS, Arm, Axis, Config, Sweep, check_of
from attnscope.config.wording import nearest, one_line, shown
from attnscope.errors import ConfigError

MAX_MEMBERS = 10_000
MAX_VALUES = 1_000  # along one axis
MAX_NAME = 80  # characters of a member's name, which tables and legends must hold
DIGITS = 4  # significant ones, of the values between the ends of a range
SEED = "train.seed"

_RANGE = re.compile(r"(log|lin):([^:]+):([^:]+):([^:]+)")
_PIECE = r"""\s*(?:\[[^\[\]]*\]|"[^"]*"|'[^']*'|[^,\[\]"']+)\s*"""
_PIECES = re.compile(rf"{_PIECE}(?:,{_PIECE})*")


def parse_sweep(config: Config, table: object, *, where: str) -> Config:
    """`config` with the sweep that a [sweep] table describes.

    Raises:
        ConfigError: there is nothing to vary, or the table contradicts itself or the config.
    """
    where = f"{one_line(where)}: sweep"
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} is {shown(table)}, but must be a section. Write [sweep].")
    for key in table:
        if key not in ("vary", "seeds", "baseline"):
            raise ConfigError(
                f"{where} has no setting {shown(key)}.{nearest(key, ('vary', 'seeds', 'baseline'))} "
                "Settings: vary, seeds, baseline."
            )
    vary = _by_setting(table.get("vary", {}), f"{where}.vary")
    baseline = _by_setting(table.get("baseline", {}), f"{where}.baseline")
    axes = [Axis(key=key, values=_values(key, given, f"{where}.vary")) for key, given in vary.items()]
    seeds = table.get("seeds", 1)
    return make_sweep(config, axes, seeds=seeds, baseline=baseline, where=where)


def make_sweep(
    config: Config,
    axes: Sequence[Axis],
    *,
    seeds: object,
    baseline: Mapping[str, object],
    where: str,
) -> Config:
    """`config` with a sweep over `axes`, checked.

    Args:
        config: what does not vary; its arms are crossed with the axes.
        axes: the slowest first.
        seeds: how many, from train.seed on, or which.
        baseline: setting to value, of any of the axes; the others take the config's own value, or their first.
        where: names the place in errors.

    Raises:
        ConfigError: there is nothing to vary, or settings contradict each other.
    """
    chosen = _seeds(seeds, config.train.seed, where)
    if not axes and len(chosen) < 2 and not config.arms:
        raise ConfigError(
            f"{where}: nothing varies. Add settings, for example --vary attention.scale=inverse_sqrt,none, or --seeds 5."
        )
    cells = math.prod(len(axis.values) for axis in axes) * max(1, len(config.arms))
    if cells * len(chosen) > MAX_MEMBERS:
        raise ConfigError(
            f"{where}: {cells} cells x {len(chosen)} seeds are {cells * len(chosen)} members, but at most "
            f"{MAX_MEMBERS} fit a run. Vary less."
        )
    keys = [axis.key for axis in axes]
    for key, count in Counter(keys).items():
        if count > 1:
            raise ConfigError(f"{where}: {key} varies twice. Put all its values into one list.")
    for arm in config.arms:
        for key in arm.changes:
            if key in keys or (key == SEED and chosen != (config.train.seed,)):
                raise ConfigError(f"{where}: {key} varies, but arm {arm.name} sets it too. Drop one of them.")
    names = [axis.key for axis in axes]
    for key in baseline:
        if key not in names:
            raise ConfigError(
                f"{where}: the baseline sets {shown(key)}, which does not vary.{nearest(key, names)} "
                f"Varied: {', '.join(names) or 'nothing'}."
            )
    chosen_baseline: dict[str, object] = {}
    for axis in axes:
        own = get_setting(config, axis.key)
        value = own if own in axis.values else axis.values[0]
        if axis.key in baseline:
            value = _checked(axis.key, baseline[axis.key], f"{where}: baseline")
            if value not in axis.values:
                raise ConfigError(
                    f"{where}: the baseline has {axis.key} = {value_text(value)}, which is none of its values: "
                    f"{', '.join(value_text(allowed) for allowed in axis.values[:8])}."
                )
        chosen_baseline[axis.key] = value
    sweep = Sweep(vary=tuple(axes), seeds=chosen, baseline=chosen_baseline)
    return replace(config, sweep=sweep)


def parse_vary(text: str) -> Axis:
    """`optimizer.lr=log:1e-4:1e-1:7` or `init.gain=0.5,1,2` as an axis.

    Raises:
        ConfigError: the setting or one of its values is impossible.
    """
    where = f"--vary {one_line(text)}"
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals or not key:
        raise ConfigError(f"{where}: write section.setting=value,value,... for example init.gain=0.5,1,2.")
    check_name(key, where)
    if not raw:
        raise ConfigError(f"{where}: {key} has no values. Write them after =, with commas between.")
    if _RANGE.fullmatch(raw):
        return Axis(key=key, values=_values(key, raw, where))
    if not _PIECES.fullmatch(raw):
        raise ConfigError(
            f"{where}: the values of {key} cannot be told apart. Write one comma between two of them, lists in [], and "
            'texts with a comma or a bracket in "".'
        )
    pieces = [piece.strip() for piece in re.findall(_PIECE, raw)]
    return Axis(key=key, values=_values(key, [parse_value(key, piece) for piece in pieces], where))


def parse_value(key: str, raw: str) -> object:
    """A TOML value as it is typed on a command line, where a bare word is a text."""
    try:
        table = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):  # not TOML, or of a size that Python refuses
        return raw
    value: object = table["value"]
    # A file may be called 2024, and a line break must not bring in a second setting.
    is_bare = isinstance(check_of(SETTINGS[key]), OneLine) and not isinstance(value, str)
    return raw if is_bare or len(table) > 1 else value


def arms_of(config: Config) -> tuple[Arm, ...]:
    """One arm per member: those of the config, in every cell and with every seed of its sweep."""
    sweep = config.sweep
    if sweep is None:
        return config.arms
    words = short_names([axis.key for axis in sweep.vary])
    given: tuple[Arm | None, ...] = config.arms or (None,)
    arms: list[Arm] = []
    grid = list(itertools.product(*(axis.values for axis in sweep.vary)))
    for arm, values, seed in itertools.product(given, grid, sweep.seeds):
        cell = dict(zip((axis.key for axis in sweep.vary), values, strict=True))
        name = [arm.name] if arm else []
        name += [f"{words[key]}={value_text(value)}" for key, value in cell.items()]
        name += [f"seed={seed}"] if len(sweep.seeds) > 1 or not name else []
        changes = {**(arm.changes if arm else {}), **cell}
        if sweep.seeds != (config.train.seed,):
            changes[SEED] = seed
        arms.append(Arm(name=" ".join(name), changes=changes))
    names = {arm.name for arm in arms}
    if max(map(len, names)) > MAX_NAME or len(names) < len(arms):
        digits = len(str(len(arms) // len(sweep.seeds) - 1))
        arms = [
            replace(
                arm,
                name=f"cell-{number // len(sweep.seeds):0{digits}d} seed={sweep.seeds[number % len(sweep.seeds)]}",
            )
            for number, arm in enumerate(arms)
        ]
    return tuple(arms)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Settings without their section where that leaves no doubt: attention.scale -> scale, optimizer.name -> optimizer."""
    keys = list(keys)
    short = {key: _short(key) for key in keys}
    counts = Counter(short.values())
    return {key: key if counts[short[key]] > 1 else short[key] for key in keys}


def _short(key: str) -> str:
    section, _, name = key.rpartition(".")
    return section if section and name == "name" else name


def value_text(value: object) -> str:
    """A setting's value as tables and names show it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, tuple | list):
        return "[" + ",".join(value_text(entry) for entry in value) + "]"
    return str(value)


def _by_setting(table: object, where: str) -> dict[str, object]:
    """Nested tables, or texts like "optimizer.lr" as keys, to settings."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} is {shown(table)}, but must be a table of settings.")
    settings: dict[str, object] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            more = flatten({name: value}, where)
        else:
            check_name(name, where)
            more = {name: value}
        if twice := settings.keys() & more.keys():
            raise ConfigError(f"{where}: {min(twice)} stands there twice. Keep one of them.")
        settings |= more
    return settings


def _values(key: str, given: object, where: str) -> tuple[object, ...]:
    check_name(key, where)
    if key == SEED:
        raise ConfigError(f"{where}: {key} is what seeds are for. Use --seeds, or seeds in [sweep].")
    if isinstance(given, str):
        given = _range(key, given, where)
    if not isinstance(given, Sequence) or not given:
        raise ConfigError(
            f'{where}: {key} is {shown(given)}, but must be a list of values, or a range like "log:1e-4:1e-1:7".'
        )
    if len(given) > MAX_VALUES:
        raise ConfigError(f"{where}: {key} has {len(given)} values, but at most {MAX_VALUES} fit.")
    values = tuple(_checked(key, value, where) for value in given)
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ConfigError(f"{where}: {key} has the value {shown(twice[0])} twice. Name each once.")
    return values


def _checked(key: str, value: object, where: str) -> object:
    return get_setting(apply_changes(Config(), {key: value}, where=where), key)


def _range(key: str, text: str, where: str) -> list[float]:
    """log:LOW:HIGH:COUNT at equal ratios, lin:LOW:HIGH:COUNT at equal distances, both ends included."""

    def refuse(reason: str) -> NoReturn:
        raise ConfigError(f"{where}: {key} is {shown(text)}, {reason}. Write log:LOW:HIGH:COUNT or lin:LOW:HIGH:COUNT.")

    match = _RANGE.fullmatch(text.strip())
    if not match:
        refuse("which is no range")
    try:
        low, high, count = float(match[2]), float(match[3]), int(match[4])
    except ValueError:
        refuse("whose numbers cannot be read")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        refuse("but LOW must be below HIGH")
    if not 2 <= count <= MAX_VALUES:
        refuse(f"but COUNT must be at least 2 and at most {MAX_VALUES}")
    if match[1] == "log" and low <= 0:
        refuse("but equal ratios need LOW above 0")
    parts = [i / (count - 1) for i in range(count)]
    if match[1] == "log":
        spaced = [low * (high / low) ** part for part in parts]
    else:
        spaced = [low + (high - low) * part for part in parts]
    short = [low, *(float(f"{value:.{DIGITS}g}") for value in spaced[1:-1]), high]
    is_rising = all(a < b for a, b in itertools.pairwise(short))
    return short if is_rising else [low, *spaced[1:-1], high]


def _seeds(given: object, first: int, where: str) -> tuple[int, ...]:
    refusal = ConfigError(
        f"{where}: seeds is {shown(given)}, but must be a whole number, at least 1, or a list of different ones."
    )
    if isinstance(given, int) and not isinstance(given, bool):
        if not 1 <= given <= MAX_MEMBERS:
            raise refusal
        return tuple(range(first, first + given))
    if not isinstance(given, list | tuple) or not given:
        raise refusal
    if not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in given):
        raise refusal
    if len(set(given)) < len(given):
        raise refusal
    return tuple(given)
