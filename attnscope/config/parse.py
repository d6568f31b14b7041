"""TOML, dictionaries and `section.setting=value` texts in, `Config` out; and back to TOML.

Every error is one line: place, setting, value, what is allowed, and the nearest name where there is one.
"""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path

from attnscope.config.schema import SECTIONS, SETTINGS, Arm, Config, check_of
from attnscope.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20


def load_config(path: str | Path) -> Config:
    """Read a TOML file.

    Raises:
        ConfigError: the file is missing, is not TOML, or says something impossible.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder. Give the path of a TOML file.") from None
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such config file.{nearest(path.name, beside)}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} has {len(raw)} bytes; a config has at most {MAX_CONFIG_BYTES}.")
    try:
        return parse_toml(raw.decode(), where=str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text in UTF-8. Save it as UTF-8.") from None


def parse_toml(text: str, *, where: str = "config") -> Config:
    """Turn the text of a TOML file into a `Config`; `where` names it in errors."""
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not valid TOML: {error}.") from None
    return parse_table(table, where=where)


def parse_table(table: Mapping[str, object], *, where: str = "config") -> Config:
    """Turn nested dictionaries, as TOML gives them, into a `Config`."""
    arms: list[Arm] = []
    raw_arms = table.get("arm", [])
    if not isinstance(raw_arms, list) or not all(isinstance(item, dict) for item in raw_arms):
        raise ConfigError(f"{where}: arm must be a list of tables. Write [[arm]], not [arm].")
    for number, raw in enumerate(raw_arms):
        place = f"{where}: arm {number + 1}"
        name = raw.get("name")
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise ConfigError(
                f'{place} has no name, or one that cannot be shown. Add a line like name = "rope".'
            )
        if name in {arm.name for arm in arms}:
            raise ConfigError(f"{place}: the name {name!r} is taken. Give every arm its own name.")
        rest = {key: value for key, value in raw.items() if key != "name"}
        arms.append(_arm(name, _flatten(rest, f"{where}: arm {name}"), f"{where}: arm {name}"))
    changes = _flatten({key: value for key, value in table.items() if key != "arm"}, where)
    config = apply_changes(Config(), changes, where=where)
    return replace(config, arms=tuple(arms))


def _arm(name: str, changes: Mapping[str, object], where: str) -> Arm:
    checked = apply_changes(Config(), changes, where=where)
    return Arm(name=name, changes={key: get_setting(checked, key) for key in changes})


def parse_assignment(text: str) -> tuple[str, object]:
    """Split `model.d_model=128` into its setting and a TOML value; a bare word is a text."""
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals or not key or not raw:
        raise ConfigError(
            f"--set {text}: write section.setting=value, for example model.d_model=64."
        )
    try:
        value: object = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    _known(key, "--set")
    return key, value


def apply_changes(config: Config, changes: Mapping[str, object], *, where: str) -> Config:
    """A copy of `config` with `{"section.setting": value}` checked and applied.

    Raises:
        ConfigError: a setting that does not exist or a value that it may not have.
    """
    checked: dict[str, dict[str, object]] = {}
    for key, value in changes.items():
        _known(key, where)
        check = check_of(SETTINGS[key])
        try:
            good = check(value)
        except ValueError:
            shown = _shown(value)
            hint = nearest(value, getattr(check, "options", getattr(check, "words", ())))
            raise ConfigError(
                f"{where}: {key} is {shown}, but must be {check.allowed}.{hint}"
            ) from None
        section, name = key.split(".")
        checked.setdefault(section, {})[name] = good
    return replace(
        config,
        **{section: replace(getattr(config, section), **new) for section, new in checked.items()},
    )


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
        lines += [f"{item.name} = {_toml(getattr(values, item.name))}" for item in fields(kind)]
        lines.append("")
    for arm in config.arms:
        lines += ["[[arm]]", f"name = {_toml(arm.name)}"]
        lines += [f"{key} = {_toml(value)}" for key, value in arm.changes.items()]
        lines.append("")
    return "\n".join(lines)


def nearest(name: object, known: Iterable[str]) -> str:
    """A sentence "Did you mean x?" with a space before it where a known name is close, else nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def _known(key: str, where: str) -> None:
    if key in SETTINGS:
        return
    section, dot, name = key.partition(".")
    if section not in SECTIONS:
        if not dot:
            at = [known for known in SETTINGS if known.split(".")[1] == section]
            hint = f" Did you mean {at[0]}?" if at else nearest(section, SECTIONS)
        else:
            hint = nearest(section, SECTIONS)
        sections = ", ".join(SECTIONS)
        raise ConfigError(
            f"{where}: there is no section {_shown(section)}.{hint} Sections: {sections}."
        )
    names = [entry.name for entry in fields(SECTIONS[section])]
    elsewhere = [known for known in SETTINGS if known.split(".")[1] == name]
    hint = nearest(name, names) or (f" Did you mean {elsewhere[0]}?" if elsewhere else "")
    raise ConfigError(
        f"{where}: [{section}] has no setting {_shown(name)}.{hint} Settings: {', '.join(names)}."
    )


def _flatten(table: Mapping[str, object], where: str) -> dict[str, object]:
    changes: dict[str, object] = {}
    for section, body in table.items():
        if section not in SECTIONS:
            _known(section, where)
            raise ConfigError(
                f"{where}: {section} must stand in its section. Write it without quotes."
            )
        if not isinstance(body, Mapping):
            raise ConfigError(
                f"{where}: {section} is {_shown(body)}, but must be a section. Write [{section}]."
            )
        for name, value in body.items():
            changes[f"{section}.{name}"] = value
    return changes


def _nest(changes: Mapping[str, object]) -> dict[str, dict[str, object]]:
    table: dict[str, dict[str, object]] = {}
    for key, value in changes.items():
        section, name = key.split(".")
        table.setdefault(section, {})[name] = value
    return table


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: object) -> str:
    """A value as it would stand in TOML; whatever is long or unprintable is cut and escaped."""
    if isinstance(value, int) and abs(value) >= 10**60:
        return "a whole number of more than 60 digits"
    text = json.dumps(value) if isinstance(value, str) else _toml(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _TOML_ESCAPED.sub(
            lambda match: f"\\u{ord(match[0]):04X}", json.dumps(value, ensure_ascii=False)
        )
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return repr(value) if isinstance(value, int | float) else str(value)


_TOML_ESCAPED = re.compile(r"[\x7f\u2028\u2029]")
