"""run.json in and out. Coming in, every type and size is checked: the file may be anybody's."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from attnscope.errors import RunError
from attnscope.runs.checksums import KEY, is_as_sealed, sealed
from attnscope.runs.foreign import printable, read_file
from attnscope.runs.layout import (
    KINDS,
    MAX_INDEX,
    MAX_JSON_BYTES,
    MAX_MEMBERS,
    MAX_PART,
    RUN_FILE,
    SCHEMA_VERSION,
    Manifest,
    MemberEntry,
    to_json,
    with_special,
)


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of run.json."""
    return (sealed(to_json(asdict(manifest), indent=1), space="\n ") + "\n").encode()


def read_manifest(run: Path, *, as_written: bool = False) -> Manifest:
    """Read run.json of a run directory.

    Args:
        run: the directory.
        as_written: a file that was changed later is an error, too: what is trained from it would not be the same run.

    Raises:
        RunError: it is missing, damaged, too large, or of a newer version of the format.
    """
    name = printable(run / RUN_FILE, 400)
    raw = read_json(run / RUN_FILE, name=name, limit=MAX_JSON_BYTES, as_written=False)

    def damaged(what: str, value: object, allowed: str) -> NoReturn:
        raise RunError(
            f"{name} is damaged: {what} is {printable(repr(value), 60)}, but must be {allowed}. "
            "Restore the file, or leave this run out."
        )

    def take(table: dict[str, Any], key: str, good: Callable[[Any], bool], allowed: str) -> Any:
        value = table.get(key)
        if not good(value):
            damaged(key, value, allowed)
        return value

    version = take(raw, "schema_version", lambda x: is_whole(x, 1, 2**31), "a whole number above 0")
    if version > SCHEMA_VERSION:
        raise RunError(
            f"{name} was made by a newer attnscope: its format is {version}, this one reads "
            f"{SCHEMA_VERSION}. Upgrade: pip install --upgrade attnscope."
        )
    entries = take(raw, "members", lambda x: isinstance(x, list) and len(x) > 0, "a list of members")
    if len(entries) > MAX_MEMBERS:
        damaged("the number of members", len(entries), f"at most {MAX_MEMBERS}")
    members: list[MemberEntry] = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            damaged(f"member {number}", entry, "a table")
        members.append(
            MemberEntry(
                name=take(entry, "name", lambda x: isinstance(x, str), "a text"),
                part=take(entry, "part", lambda x: is_whole(x, 0, MAX_PART), f"0 to {MAX_PART}"),
                index=take(entry, "index", lambda x: is_whole(x, 0, MAX_INDEX), f"0 to {MAX_INDEX}"),
                settings=take(entry, "settings", _is_table, "a table"),
            )
        )
    if len({(member.part, member.index) for member in members}) < len(members):
        damaged("members", "a list", "a list where part and index together occur once")
    command = take(raw, "command", _is_texts, "a list of texts")
    kind = raw.get("kind", "train")  # runs of attnscope versions that could not watch do not say
    if kind not in KINDS:
        damaged("kind", kind, " or ".join(KINDS))
    if as_written and (changed := change_of(run)):
        raise RunError(f"{printable(run, 400)}: {changed}.")
    return Manifest(
        schema_version=version,
        kind=kind,
        created=printable(take(raw, "created", lambda x: isinstance(x, str), "a text"), 40),
        command=tuple(printable(word, 1000) for word in command),
        config=take(raw, "config", _is_table, "a table"),
        members=_with_names_to_show(members),
        environment=_special(take(raw, "environment", _is_table, "a table")),
        data=_special(take(raw, "data", _is_table, "a table")),
    )


def change_of(run: Path) -> str:
    """What to say of a run.json that is not as it was written; empty where it is, or nobody can tell.

    Raises:
        RunError: it cannot be read.
    """
    if is_as_sealed(read_file(run / RUN_FILE, name=RUN_FILE, limit=MAX_JSON_BYTES)):
        return ""
    return (
        f"{RUN_FILE} was changed after it was written: its checksum is another. Restore it, or, if that was meant, "
        f"take its last entry, {KEY}, out"
    )


def read_json(
    path: Path,
    *,
    name: str,
    limit: int,
    as_written: bool = True,
    way_out: str = ". Restore the file, or leave this run out.",
) -> dict[str, Any]:
    """The JSON object in a file; `name` is what errors call it, `way_out` what they end with.

    Raises:
        RunError: it cannot be read, is no JSON object, or (`as_written`) does not fit its checksum.
    """
    try:
        data = read_file(path, name=name, limit=limit)
        value = json.loads(data.decode())
        if isinstance(value, dict):
            with_special(value)  # nested too deep for one is too deep for all
            if is_as_sealed(data) or not as_written:
                return value
            problem = "its checksum is another"
        else:
            problem = "not a table"
    except RecursionError:
        problem = "nested too deep"
    except ValueError as error:  # also UnicodeDecodeError, and whole numbers of 5000 digits
        problem = printable(error, 100)
    raise RunError(f"{name} is damaged: {problem}{way_out}")


def is_whole(value: object, low: int, high: int) -> TypeGuard[int]:
    """Whether a JSON value is a whole number from `low` to `high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_table(value: object) -> bool:
    return isinstance(value, dict)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _special(table: dict[str, object]) -> dict[str, object]:
    return {key: with_special(value) for key, value in table.items()}


def _with_names_to_show(members: list[MemberEntry]) -> tuple[MemberEntry, ...]:
    """The same members with names that are printable and differ, whatever the file calls them."""
    named: dict[str, MemberEntry] = {}
    for member in members:
        name = printable(member.name, 80).strip() or "unnamed"
        while name in named:
            name = f"{name} ({member.part}.{member.index})"
        named[name] = replace(member, name=name)
    return tuple(named.values())
