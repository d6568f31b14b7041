"""A run directory that somebody else made executes nothing, leads nowhere, and fails in one line if at all."""

import ast
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import attnscope
from attnscope.errors import RunError
from attnscope.runs.checksums import sealed
from attnscope.runs.foreign import printable
from attnscope.runs.layout import MAX_JSON_BYTES
from attnscope.runs.listing import list_runs
from attnscope.runs.reader import open_run
from attnscope.runs.report_folder import report_dir
from tests.runs import made_up

BAD_NAMES = [
    "../../etc/passwd",
    "<script>alert(1)</script>",
    "\x1b[2J\x1b]0;title\x07",
    "two\nlines\r\n\t",
    "\u202egnp.exe",
    "\x9b31m",
    "\ud800",
    "x" * 10_000_000,
    "",
    " ",
]


@pytest.fixture
def run_path(tmp_path):
    writer = made_up.new_run(tmp_path / "a")
    part = writer.part(0)
    made_up.fill(part, range(3))
    part.event(made_up.event("diverged", step=1, member=0))
    part.finish("finished")
    return writer.path


def edit(run_path, change):
    raw = made_up.unsealed(run_path / "run.json")
    change(raw)
    (run_path / "run.json").write_text(json.dumps(raw))


def look_at_everything(path):
    run = open_run(path)
    assert len(run.members) and all(printable(line, 10_000) == line for line in run.lost)
    _ = run.steps, run.heads, run.layers, run.params, run.events, run.status, run.ends, repr(run)
    try:
        _ = run.config
    except RunError as error:
        assert "\n" not in str(error)
    return run


def files_below(folder):
    return {
        path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain 1/√d_k", "plain 1/√d_k"),
        ("\x1b[31mred", "�[31mred"),
        ("a\nb\r\tc", "a�b��c"),
        ("\x9b\x85\u2028", "���"),
        ("\u202eabc\u2066\u200b", "�abc��"),
        ("x" * 200, "x" * 119 + "…"),
        (Path("a\x07"), "a�"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


@given(st.text(max_size=300), st.integers(1, 200))
def test_printable_is_one_short_line_and_stable(text, limit):
    shown = printable(text, limit)
    assert len(shown) <= limit and shown.isprintable() and printable(shown, limit) == shown


def test_names_are_fit_to_show_and_differ(run_path):
    def change(raw):
        raw["members"] = [
            {"name": name, "part": 0, "index": i, "settings": {name: name}}
            for i, name in enumerate([*BAD_NAMES, *BAD_NAMES])
        ]

    edit(run_path, change)
    names = [member.name for member in look_at_everything(run_path).members]
    assert len(set(names)) == len(names) == 2 * len(BAD_NAMES)
    assert all(name.isprintable() and 0 < len(name) < 100 for name in names)
    assert names[0] == "../../etc/passwd" and names[2] == "�[2J�]0;title�"
    assert names[8:10] == ["unnamed", "unnamed (0.9)"]
    (summary,) = list_runs(run_path.parent)
    assert list(summary.members) == names


def test_commands_and_kinds_are_fit_to_show(run_path):
    edit(run_path, lambda raw: raw.update(command=["attnscope", "\x1b[2J"], created="\x1b[2J"))
    with (run_path / "part-0000" / "events-0000.jsonl").open("a") as file:
        line = '{"kind": "\\u001b[2J", "step": 0, "member": null, "fields": {}}'
        file.write(sealed(line) + "\n")
    run = open_run(run_path)
    assert run.command == ("attnscope", "�[2J") and run.created == "�[2J"
    assert list(run.events["kind"])[-1] == "�[2J"


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("schema_version", "1", "schema_version is '1', but must be a whole number above 0"),
        ("schema_version", True, "schema_version is True, but must be a whole number above 0"),
        ("schema_version", 1.0, "schema_version is 1.0, but must be a whole number above 0"),
        ("schema_version", None, "schema_version is None, but must be a whole number above 0"),
        ("schema_version", 10**400, "must be a whole number above 0"),
        ("members", 1_000_000_000, "members is 1000000000, but must be a list of members"),
        ("members", [], "members is [], but must be a list of members"),
        ("members", [7], "member 0 is 7, but must be a table"),
        ("members", [{}], "name is None, but must be a text"),
        ("members", [{"name": "\x1b[2J", "part": "\n\x1b"}], r"part is '\n\x1b', but must be 0 to 9999"),
        ("members", [{"name": "a", "part": 0, "index": 1e9}], "index is 1000000000.0, but must be 0 to 32767"),
        ("members", [{"name": "a", "part": 10_000}], "part is 10000, but must be 0 to 9999"),
        ("members", [{"name": "a", "part": 0, "index": 0, "settings": []}], "settings is [], but must be a table"),
        ("members", [{"name": "a", "part": 0, "index": 0, "settings": {}}] * 2, "where part and index together occur once"),
        ("members", [0] * 100_001, "the number of members is 100001, but must be at most 100000"),
        ("command", "attnscope", "command is 'attnscope', but must be a list of texts"),
        ("command", [1], "command is [1], but must be a list of texts"),
        ("config", [], "config is [], but must be a table"),
        ("environment", "x" * 10_000_000, "environment is 'xxx"),
        ("data", None, "data is None, but must be a table"),
        ("created", 5, "created is 5, but must be a text"),
    ],
)  # fmt: skip
def test_a_wrong_value_in_run_json_is_one_line(run_path, key, value, complaint):
    edit(run_path, lambda raw: raw.update({key: value}))
    with pytest.raises(RunError) as error:
        open_run(run_path)
    message = str(error.value)
    assert message.startswith(f"{run_path}/run.json is damaged: ") and complaint in message
    assert message.endswith("Restore the file, or leave this run out.")
    assert message.isprintable() and len(message) < 500
    assert list_runs(run_path.parent)[0].problem == message


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"[" * 500_000,
        b'{"a":' * 400 + b"1" + b"}" * 400, b'{"schema_version": ' + b"9" * 6000 + b"}",
        b"\x80\x04cos\nsystem\n",
    ],
)  # fmt: skip
def test_a_run_json_that_is_none_is_one_line(run_path, content):
    (run_path / "run.json").write_bytes(content)
    with pytest.raises(RunError) as error:
        open_run(run_path)
    assert str(error.value).isprintable()


def test_a_huge_run_json_is_not_read(run_path):
    with (run_path / "run.json").open("ab") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(RunError) as error:
        open_run(run_path)
    assert str(error.value) == (f"{run_path}/run.json: has 67108865 bytes, more than the 67108864 that are read")


def test_a_run_of_a_newer_attnscope_says_so(run_path):
    edit(run_path, lambda raw: raw.update(schema_version=2))
    with pytest.raises(RunError, match=r"newer attnscope.* Upgrade"):
        open_run(run_path)


@pytest.mark.parametrize(
    "config",
    [
        {"\x1b[2J": {}},
        {"model": {"d_model": "\x1b[2J"}},
        {"model": 5},
        {"model.d_model": 5},
        {"optimizer": {"lr": 10**400}},
        {"arm": [{"name": "a\n"}]},
        {"train": {"steps": [[[]]]}},
    ],
)
def test_a_config_that_cannot_be_understood_does_not_hide_the_records(run_path, config):
    edit(run_path, lambda raw: raw.update(config=config))
    run = look_at_everything(run_path)
    assert len(run.steps) == 6 and run.members[0].status == "trained"
    with pytest.raises(RunError) as error:
        _ = run.config
    assert str(error.value).isprintable()


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**30) | st.floats() | st.text(max_size=8),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=5), each, max_size=3),
    max_leaves=4,
)  # fmt: skip


def places(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_junk_anywhere_in_run_json_is_an_error_in_one_line_or_harmless(run_path, data):
    original = (run_path / "run.json").read_text()
    raw = json.loads(original)
    *above, last = data.draw(st.sampled_from([place for place in places(raw) if place]))
    table = raw
    for key in above:
        table = table[key]
    table[last] = data.draw(JUNK)
    try:
        (run_path / "run.json").write_text(json.dumps(raw))
        look_at_everything(run_path)
    except RunError as error:
        assert str(error).isprintable()
    finally:
        (run_path / "run.json").write_text(original)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_anywhere_are_an_error_in_one_line_or_harmless(run_path, data):
    path = data.draw(st.sampled_from(sorted(p for p in run_path.rglob("*") if p.is_file())))
    original = path.read_bytes()
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(damaged)
        look_at_everything(run_path)
    except RunError as error:
        assert path.name == "run.json" and str(error).isprintable()
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("name", ["steps-0000.arrow", "heads-0000.arrow", "events-0000.jsonl", "end.json"])
def test_a_link_in_a_part_is_not_followed(run_path, tmp_path, name):
    path = run_path / "part-0000" / name
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    run = look_at_everything(run_path)
    assert run.lost == (f"part-0000/{name}: is a link, which could lead out of the run; not followed",)
    missing = {"steps": run.steps, "heads": run.heads, "events": run.events}.get(name[:5].strip("-"))
    assert missing is None or len(missing) == 0


def test_a_part_behind_a_link_is_not_entered(run_path, tmp_path):
    (run_path / "part-0000").rename(tmp_path / "outside")
    (run_path / "part-0000").symlink_to(tmp_path / "outside")
    run = look_at_everything(run_path)
    assert len(run.steps) == 0
    assert run.lost == ("part-0000: is a link or no folder; not followed",)


def test_a_run_json_behind_a_link_is_refused(run_path, tmp_path):
    (run_path / "run.json").rename(tmp_path / "outside.json")
    (run_path / "run.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(RunError, match=r"run\.json: is a link"):
        open_run(run_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", ["steps-0000.arrow", "events-0000.jsonl", "end.json"])
def test_a_pipe_does_not_hang(run_path, name):
    (run_path / "part-0000" / name).unlink()
    os.mkfifo(run_path / "part-0000" / name)
    assert look_at_everything(run_path).lost == (f"part-0000/{name}: is not a file",)


def test_a_folder_in_place_of_a_file_is_said(run_path):
    (run_path / "part-0000" / "heads-0000.arrow").unlink()
    (run_path / "part-0000" / "heads-0000.arrow").mkdir()
    assert look_at_everything(run_path).lost == ("part-0000/heads-0000.arrow: is not a file",)


def test_a_huge_table_is_not_read(run_path):
    with (run_path / "part-0000" / "heads-0000.arrow").open("ab") as file:
        file.truncate((4 << 30) + 1)  # sparse: takes no room
    assert look_at_everything(run_path).lost == (
        "part-0000/heads-0000.arrow: has 4294967297 bytes, more than the 4294967296 that are read",
    )


def test_rows_and_parts_of_nobody_are_left_out(run_path):
    shutil.copytree(run_path / "part-0000", run_path / "part-0007")
    edit(run_path, lambda raw: raw["members"][1].update(index=-1 % 30_000))
    run = look_at_everything(run_path)
    assert set(run.steps["member"]) == {"unscaled"}
    assert run.lost == (
        "part-0000/heads-0000.arrow: 12 rows belong to no member of run.json",
        "part-0000/layers-0000.arrow: 6 rows belong to no member of run.json",
        "part-0000/params-0000.arrow: 9 rows belong to no member of run.json",
        "part-0000/steps-0000.arrow: 3 rows belong to no member of run.json",
        "part-0007: no member of run.json is in it; left out",
    )


@pytest.mark.parametrize("member", [-1, -32768, 32767])
def test_rows_with_an_impossible_member_are_left_out(tmp_path, member):
    part = made_up.new_run(tmp_path / "a").part(0)
    columns = made_up.columns("steps", range(3))
    columns["member"] = np.array([0, member, 1])
    part.append("steps", columns)
    part.close()
    run = look_at_everything(tmp_path / "a")
    assert list(run.steps["member"]) == ["unscaled", "scaled"]
    assert run.lost == ("part-0000/steps-0000.arrow: 1 rows belong to no member of run.json",)


def test_reading_changes_nothing(run_path, tmp_path):
    before = files_below(tmp_path)
    look_at_everything(run_path)
    list_runs(tmp_path)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("place", ["report", "report/figures", "report/figures/loss.png"])
@pytest.mark.parametrize("to", ["folder", "nowhere"])
def test_a_link_in_the_report_is_refused(run_path, tmp_path, place, to):
    (tmp_path / "folder").mkdir()
    link = run_path / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / to)
    with pytest.raises(RunError) as error:
        report_dir(open_run(run_path))
    assert str(error.value) == (
        f"{run_path}/report is a link or a file. Delete it and try again."
        if place == "report"
        else f"{link} could lead out of the run. Delete {run_path}/report and try again."
    )
    assert not (tmp_path / "nowhere").exists() and not any((tmp_path / "folder").iterdir())


def test_a_second_name_of_a_file_outside_is_refused_in_the_report(run_path, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (run_path / "report").mkdir()
    os.link(tmp_path / "precious", run_path / "report" / "report.md")
    with pytest.raises(RunError, match=r"report\.md could lead out of the run"):
        report_dir(open_run(run_path))


def test_the_writer_does_not_go_through_links_either(run_path, tmp_path):
    from attnscope.runs.writer import RunWriter

    (tmp_path / "outside").mkdir()
    shutil.rmtree(run_path / "part-0000")
    (run_path / "part-0000").symlink_to(tmp_path / "outside")
    with pytest.raises(RunError):
        RunWriter.resume(run_path).part(0)
    assert not any((tmp_path / "outside").iterdir())


FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def offences(source):
    """What in a module could execute what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            names = {f"{module}.{alias.name}" for alias in node.names}
            yield from names & {"torch.load"} or ({module} & FORBIDDEN)
        elif isinstance(node, ast.Name) and node.id in {"eval", "exec", "__import__"}:
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from {f"{node.value.id}.{node.attr}"} & {
                "torch.load",
                "np.load",
                "pd.read_pickle",
            }
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield node.arg


# `attnscope watch script.py` runs the script that the user names.
RUNS_A_SCRIPT = {"watch/script.py": ["exec"]}


def test_nothing_in_the_package_executes_what_it_reads():
    package = Path(attnscope.__file__).parent
    for path in package.rglob("*.py"):
        allowed = RUNS_A_SCRIPT.get(str(path.relative_to(package)), [])
        assert list(offences(path.read_text())) == allowed, path


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from torch import load", "torch.load(f)", "eval(x)", "import pickle as json",
     "from pickle import loads", "np.load(f, allow_pickle=True)", "exec('x')"],
)  # fmt: skip
def test_that_test_can_fail(source):
    assert list(offences(source))
