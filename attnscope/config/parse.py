"""TOML, dictionaries and `section.setting=value` texts in, `Config` out; and back to TOML.

Every error is one line: place, setting, value, what is allowed, and the nearest name where there is one.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from attnscope.config.change import apply_changes, check_name, flatten, get_setting, nest, plain
from attnscope.config.schema import SECTIONS, Arm, Config
from attnscope.config.sweep import MAX_MEMBERS, parse_sweep, parse_value
from attnscope.config.wording import nearest, one_line, shown, toml_of
from attnscope.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20
MAX_NAME = 60  # characters of an arm's name, which tables and legends must hold


def load_config(path: str | Path) -> Config:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing, is not TOML, or says something impossible.
    """
    path, where = Path(path), one_line(path)
    try:
        with path.open("rb") as file:  # never more than that: it may be a device without an end
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except IsADirectoryError:
        raise ConfigError(f"{where} is a folder. Give the path of a TOML file.") from None
    except (FileNotFoundError, ValueError):  # ValueError: a null character in the path
        beside = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise ConfigError(f"{where}: no such config file.{nearest(path.name, beside)}") from None
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}.") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"{where} has more than {MAX_CONFIG_BYTES} bytes, too many for a config. Is it the right file?"
        )
    try:
        text = raw.decode("utf-8-sig")  # some editors begin with a byte order mark
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not text in UTF-8. Save it as UTF-8.") from None
    return parse_toml(text, where=where)


def parse_toml(text: str, *, where: str = "config") -> Config:
    """Turn the text of a TOML file into a `Config`; `where` names it in errors."""
    where = one_line(where)
    try:
        # With a line break at the end, errors there have a line number too.
        table = tomllib.loads(f"{text}\n")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not valid TOML: {one_line(error)}.") from None
    except RecursionError:
        raise ConfigError(f"{where}: lists or tables are nested too deeply.") from None
    except ValueError:  # the only one left that Python's TOML reader lets through
        raise ConfigError(f"{where}: a number has thousands of digits.") from None
    return parse_table(table, where=where)


def parse_table(table: Mapping[str, object], *, where: str = "config") -> Config:
    """Turn nested dictionaries, as TOML gives them, into a `Config`."""
    where = one_line(where)
    settings = {key: value for key, value in table.items() if key not in ("arm", "sweep")}
    config = apply_changes(Config(), flatten(settings, where), where=where)
    config = replace(config, arms=_arms(table.get("arm", []), where))
    return parse_sweep(config, table["sweep"], where=where) if "sweep" in table else config


def _arms(tables: object, where: str) -> tuple[Arm, ...]:
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise ConfigError(f"{where}: arm must be a list of tables. Write [[arm]], not [arm].")
    if len(tables) > MAX_MEMBERS:
        raise ConfigError(f"{where}: there are {len(tables)} arms, but at most {MAX_MEMBERS} fit a run.")
    arms: dict[str, Arm] = {}
    for number, table in enumerate(tables, start=1):
        if "name" not in table:
            raise ConfigError(f'{where}: arm {number} has no name. Add a line like name = "rope".')
        name = table["name"]
        if not _is_name(name):
            raise ConfigError(
                f"{where}: the name of arm {number} is {shown(name)}, but must be a text on one line, not "
                f"empty, without invisible characters, of at most {MAX_NAME} characters."
            )
        if name in arms:
            raise ConfigError(f"{where}: arm {number}: the name {shown(name)} is taken. Give every arm its own name.")
        where_it_stands = f"{where}: arm {name}"
        changes = flatten({key: value for key, value in table.items() if key != "name"}, where_it_stands)
        checked = apply_changes(Config(), changes, where=where_it_stands)
        arms[name] = Arm(name=name, changes={key: get_setting(checked, key) for key in changes})
    return tuple(arms.values())


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(name.strip()) and name.isprintable() and len(name) <= MAX_NAME


def parse_assignment(text: str) -> tuple[str, object]:
    """Split `model.d_model=128` into its setting and a TOML value; a bare word is a text."""
    where = f"--set {one_line(text)}"
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals or not key or not raw:
        raise ConfigError(f"{where}: write section.setting=value, for example model.d_model=64.")
    check_name(key, where)
    return key, parse_value(key, raw)


def to_table(config: Config) -> dict[str, object]:
    """The whole config as nested dictionaries that JSON and `parse_table` understand."""
    table: dict[str, object] = {
        section: {entry.name: plain(getattr(getattr(config, section), entry.name)) for entry in fields(kind)}
        for section, kind in SECTIONS.items()
    }
    if config.arms:
        table["arm"] = [
            {"name": arm.name, **nest({key: plain(value) for key, value in arm.changes.items()})} for arm in config.arms
        ]
    if config.sweep:
        table["sweep"] = {
            "seeds": list(config.sweep.seeds),
            # By whole names: nested by section they would lose their order.
            "vary": {axis.key: plain(axis.values) for axis in config.sweep.vary},
            "baseline": {key: plain(value) for key, value in config.sweep.baseline.items()},
        }
    return table


def to_toml(config: Config) -> str:
    """The whole config as TOML, ready to be trained again."""
    lines: list[str] = []
    for section, kind in SECTIONS.items():
        lines.append(f"[{section}]")
        values = getattr(config, section)
        lines += [f"{item.name} = {toml_of(getattr(values, item.name))}" for item in fields(kind)]
        lines.append("")
    for arm in config.arms:
        lines += ["[[arm]]", f"name = {toml_of(arm.name)}"]
        lines += [f"{key} = {toml_of(value)}" for key, value in arm.changes.items()]
        lines.append("")
    if sweep := config.sweep:
        lines += ["[sweep]", f"seeds = {toml_of(sweep.seeds)}"]
        # By whole names: nested by section they would lose their order.
        lines += [f'vary."{axis.key}" = {toml_of(axis.values)}' for axis in sweep.vary]
        lines += [f'baseline."{key}" = {toml_of(value)}' for key, value in sweep.baseline.items()]
        lines.append("")
    return "\n".join(lines)
