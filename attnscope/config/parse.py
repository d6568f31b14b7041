"""TOML, dictionaries and `section.setting=value` texts in, `Config` out; and back to TOML.

Every error is one line: place, setting, value, what is allowed, and the nearest name where there is one.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from attnscope.config.checks import Text
from attnscope.config.schema import SECTIONS, SETTINGS, Arm, Config, check_of
from attnscope.config.wording import nearest, one_line, shown, toml_of
from attnscope.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20
MAX_ARMS = 10_000
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
    changes = _flatten({key: value for key, value in table.items() if key != "arm"}, where)
    config = apply_changes(Config(), changes, where=where)
    return replace(config, arms=_arms(table.get("arm", []), where))


def _arms(tables: object, where: str) -> tuple[Arm, ...]:
    if not isinstance(tables, list) or not all(isinstance(each, Mapping) for each in tables):
        raise ConfigError(f"{where}: arm must be a list of tables. Write [[arm]], not [arm].")
    if len(tables) > MAX_ARMS:
        raise ConfigError(
            f"{where}: there are {len(tables)} arms, but at most {MAX_ARMS} fit a run."
        )
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
            raise ConfigError(
                f"{where}: arm {number}: the name {shown(name)} is taken. Give every arm its own name."
            )
        place = f"{where}: arm {name}"
        changes = _flatten({key: value for key, value in table.items() if key != "name"}, place)
        checked = apply_changes(Config(), changes, where=place)
        arms[name] = Arm(name=name, changes={key: get_setting(checked, key) for key in changes})
    return tuple(arms.values())


def _is_name(name: object) -> bool:
    return (
        isinstance(name, str)
        and bool(name.strip())
        and name.isprintable()
        and len(name) <= MAX_NAME
    )


def parse_assignment(text: str) -> tuple[str, object]:
    """Split `model.d_model=128` into its setting and a TOML value; a bare word is a text."""
    where = f"--set {one_line(text)}"
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals or not key or not raw:
        raise ConfigError(f"{where}: write section.setting=value, for example model.d_model=64.")
    _known(key, where)
    try:
        table = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):  # not TOML, or of a size that Python refuses
        return key, raw
    value: object = table["value"]
    # A file may be called 2024, and a line break must not bring in a second setting.
    is_bare = isinstance(check_of(SETTINGS[key]), Text) and not isinstance(value, str)
    return key, raw if is_bare or len(table) > 1 else value


def apply_changes(config: Config, changes: Mapping[str, object], *, where: str) -> Config:
    """A copy of `config` with `{"section.setting": value}` checked and applied.

    Raises:
        ConfigError: a setting that does not exist or a value that it may not have.
    """
    where = one_line(where)
    checked: dict[str, dict[str, object]] = {}
    for key, value in changes.items():
        _known(key, where)
        check = check_of(SETTINGS[key])
        section, name = key.split(".")
        try:
            checked.setdefault(section, {})[name] = check(value)
        except ValueError as error:
            reason = f" {error}" if str(error) else ""
            hint = nearest(value, getattr(check, "options", getattr(check, "words", ())))
            raise ConfigError(
                f"{where}: {key} is {shown(value)}, but must be {check.allowed}.{reason}{hint}"
            ) from None
    sections: dict[str, Any] = {
        section: replace(getattr(config, section), **new) for section, new in checked.items()
    }
    return replace(config, **sections)


def get_setting(config: Config, key: str) -> object:
    """The value of "section.setting"."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def to_table(config: Config) -> dict[str, object]:
    """The whole config as nested dictionaries that JSON and `parse_table` understand."""
    table: dict[str, object] = {
        section: {
            entry.name: _plain(getattr(getattr(config, section), entry.name))
            for entry in fields(kind)
        }
        for section, kind in SECTIONS.items()
    }
    if config.arms:
        table["arm"] = [
            {"name": arm.name, **_nest({key: _plain(value) for key, value in arm.changes.items()})}
            for arm in config.arms
        ]
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
    return "\n".join(lines)


def _known(key: str, where: str) -> None:
    if key in SETTINGS:
        return
    section, dot, name = key.partition(".")
    if section not in SECTIONS:
        at = [known for known in SETTINGS if known.split(".")[1] == section and not dot]
        hint = f" Did you mean {at[0]}?" if at else nearest(section, SECTIONS)
        raise ConfigError(
            f"{where}: there is no section {shown(section)}.{hint} Sections: {', '.join(SECTIONS)}."
        )
    names = [entry.name for entry in fields(SECTIONS[section])]
    elsewhere = [known for known in SETTINGS if known.split(".")[1] == name]
    hint = nearest(name, names) or (f" Did you mean {elsewhere[0]}?" if elsewhere else "")
    raise ConfigError(
        f"{where}: [{section}] has no setting {shown(name)}.{hint} Settings: {', '.join(names)}."
    )


def _flatten(table: Mapping[str, object], where: str) -> dict[str, object]:
    changes: dict[str, object] = {}
    for section, body in table.items():
        if section not in SECTIONS:
            if isinstance(body, list) and any(isinstance(each, Mapping) for each in body):
                raise ConfigError(
                    f"{where}: {shown(section)} is a list of tables, but only [[arm]] may be one."
                )
            _known(section, where)
            raise ConfigError(
                f"{where}: {section} must stand in its section. Write it without quotes."
            )
        if not isinstance(body, Mapping):
            raise ConfigError(
                f"{where}: {section} is {shown(body)}, but must be a section. Write [{section}]."
            )
        for name, value in body.items():
            changes[f"{section}.{name}"] = value
    return changes


def _nest(changes: Mapping[str, object]) -> dict[str, dict[str, object]]:
    table: dict[str, dict[str, object]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        table.setdefault(section, {})[name] = value
    return table


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
