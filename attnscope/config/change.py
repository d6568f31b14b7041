"""Settings by name: look one up, check and change it, and tables of tables as `section.setting`."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from attnscope.config.schema import SECTIONS, SETTINGS, Config, check_of
from attnscope.config.wording import nearest, one_line, shown
from attnscope.errors import ConfigError


def apply_changes(config: Config, changes: Mapping[str, object], *, where: str) -> Config:
    """A copy of `config` with `{"section.setting": value}` checked and applied.

    Raises:
        ConfigError: a setting that does not exist or a value that it may not have.
    """
    where = one_line(where)
    checked: dict[str, dict[str, object]] = {}
    for key, value in changes.items():
        check_name(key, where)
        check = check_of(SETTINGS[key])
        section, name = key.split(".")
        try:
            checked.setdefault(section, {})[name] = check(value)
        except ValueError as error:
            reason = f" {error}" if str(error) else ""
            hint = nearest(value, getattr(check, "options", getattr(check, "words", ())))
            raise ConfigError(f"{where}: {key} is {shown(value)}, but must be {check.allowed}.{reason}{hint}") from None
    sections: dict[str, Any] = {section: replace(getattr(config, section), **new) for section, new in checked.items()}
    return replace(config, **sections)


def get_setting(config: Config, key: str) -> object:
    """The value of "section.setting"."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def check_name(key: str, where: str) -> None:
    """Refuse a setting that does not exist, and name the nearest."""
    if key in SETTINGS:
        return
    section, dot, name = key.partition(".")
    if section not in SECTIONS:
        at = [known for known in SETTINGS if known.split(".")[1] == section and not dot]
        hint = f" Did you mean {at[0]}?" if at else nearest(section, SECTIONS)
        raise ConfigError(f"{where}: there is no section {shown(section)}.{hint} Sections: {', '.join(SECTIONS)}.")
    names = [entry.name for entry in fields(SECTIONS[section])]
    elsewhere = [known for known in SETTINGS if known.split(".")[1] == name]
    hint = nearest(name, names) or (f" Did you mean {elsewhere[0]}?" if elsewhere else "")
    raise ConfigError(f"{where}: [{section}] has no setting {shown(name)}.{hint} Settings: {', '.join(names)}.")


def flatten(table: Mapping[str, object], where: str) -> dict[str, object]:
    """Tables in tables, as TOML gives them, to `{"section.setting": value}`."""
    changes: dict[str, object] = {}
    for section, body in table.items():
        if section not in SECTIONS:
            if isinstance(body, list) and any(isinstance(entry, Mapping) for entry in body):
                raise ConfigError(f"{where}: {shown(section)} is a list of tables, but only [[arm]] may be one.")
            check_name(section, where)
            raise ConfigError(f"{where}: {section} must stand in its section. Write it without quotes.")
        if not isinstance(body, Mapping):
            raise ConfigError(f"{where}: {section} is {shown(body)}, but must be a section. Write [{section}].")
        for name, value in body.items():
            changes[f"{section}.{name}"] = value
    return changes


def nest(changes: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """The inverse of `flatten`."""
    table: dict[str, dict[str, object]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        table.setdefault(section, {})[name] = value
    return table


def plain(value: object) -> object:
    """A value as TOML and JSON have it."""
    return list(value) if isinstance(value, tuple) else value
