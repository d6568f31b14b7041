"""`attnscope check`, as a person and as a machine read it."""

import json

import pytest
from typer.testing import CliRunner

from attnscope.cli import app

PROGRAM = """
import sys
import torch
from tests.check.models import TOKENS, Attention, model_of
from helper import SCALE
print("noise on stdout")

number = 3

class Factories:
    @staticmethod
    def inner():
        return sound()

def sound():
    return model_of(), TOKENS

def broken():
    return model_of(Attention(scale=SCALE)), TOKENS

def needs_more(size):
    return model_of(), TOKENS

def model_alone():
    return model_of()

def three():
    return model_of(), TOKENS, TOKENS

def swapped():
    return TOKENS, model_of()

def fails():
    raise ValueError("no weights here\\nsecond line")

def exits():
    sys.exit("goodbye")

def out_of_range():
    return model_of(), TOKENS + 1000

class Nothing(torch.nn.Module):
    def forward(self, x):
        pass

def no_output():
    return Nothing(), torch.rand(2, 3, 4)

def padded():
    mask = torch.ones_like(TOKENS)
    mask[0, 8:] = 0
    return model_of(), (TOKENS, mask)

def pooled():
    return torch.nn.Flatten(), torch.rand(2, 3, 4)
"""
FORM = "Write module:factory or file.py:factory, where factory() returns (model, batch)."


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "helper.py").write_text("SCALE = 1.0\n")
    (tmp_path / "unimportable.py").write_text("import not_there_at_all\n")
    (tmp_path / "wrong.py").write_text("x = = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("program", "helper", "checked_program"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    return tmp_path


def check(*words):
    return CliRunner().invoke(app, ["check", *words], env={"COLUMNS": "80"})


@pytest.mark.parametrize("target", ["program:sound", "program.py:sound", "program:Factories.inner"])
def test_a_table_of_checks_at_80_columns_plain_in_a_pipe(folder, target):
    done = check(target)
    assert done.exit_code == 0, done.stderr
    *said, last = done.stdout.splitlines()
    assert said[0] == "passed      future leak              Looks causal: none of 51 pairs of an output"
    assert max(map(len, said)) <= 80
    assert not [line for line in said if line != line.rstrip()], "trailing blanks"
    assert "\x1b" not in done.stdout
    assert [line.split()[0] for line in said if line and line[0] != " "].count("passed") == 11
    assert last == "Next: attnscope watch train.py"
    assert "noise on stdout" in done.stderr and "noise" not in done.stdout


def test_what_failed_is_shown_with_its_numbers_and_a_remedy(folder):
    done = check("program:broken")
    assert done.exit_code == 0
    assert "failed      attention scale" in done.stdout
    after = done.stdout.partition("failed: attention scale\n")[2].splitlines()
    assert after[:2] == [
        "  layer     d_head  scale  1/sqrt(d_head)  q and k of length 1",
        "  layers.0       8      1          0.3536                   no",
    ]
    assert after[2].startswith("  Try: Multiply q.k by 1/sqrt(d_head) once.")
    assert after[-1] == "Next: repair it, then again: attnscope check program:broken"


def test_json_is_strict_and_whole(folder):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    said = json.loads(check("program:broken", "--json").stdout, parse_constant=refuse)
    assert (said["target"], said["model"]) == ("program:broken", "Model")
    by_name = {each["name"]: each for each in said["checks"]}
    assert len(by_name) == 12
    assert by_name["attention scale"]["status"] == "failed"
    assert by_name["attention scale"]["evidence"][0]["scale"] == pytest.approx(1.0)
    assert set(by_name["future leak"]) == {"name", "status", "finding", "evidence", "remedy"}


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_fail_on_gives_exit_code_3(folder, as_json):
    assert check("program:broken", "--fail-on", "failed", *as_json).exit_code == 3
    assert check("program:sound", "--fail-on", "failed", *as_json).exit_code == 0
    words = ("program:sound", "--no-causal", "--fail-on", "failed")
    assert check(*words, *as_json).exit_code == 3
    assert check("program:sound", "--causal", "--fail-on", "failed", *as_json).exit_code == 0
    assert check("program:sound", "--fail-on", "everything").exit_code == 2
    assert check().exit_code == 2


def test_what_could_not_be_looked_at_is_said_carried_in_json_and_can_fail(folder):
    done = check("program:pooled", "--fail-on", "failed")
    assert done.exit_code == 0, done.stderr
    assert "not looked  future leak              The output has no position axis" in done.stdout
    assert "not looked  attention scale          As masked rows." in done.stdout
    assert check("program:pooled", "--fail-on", "not-looked").exit_code == 3
    assert check("program:broken", "--fail-on", "not-looked").exit_code == 3
    assert check("program:padded", "--fail-on", "not-looked").exit_code == 0
    said = json.loads(check("program:pooled", "--json").stdout)
    by_name = {each["name"]: each for each in said["checks"]}
    assert by_name["future leak"]["status"] == "not looked" and by_name["future leak"]["remedy"]
    assert by_name["attention scale"]["finding"].startswith("No attention was seen")
    assert said["counts"]["not looked"] == 7 and sum(said["counts"].values()) == 12


ERRORS = {
    "program": f"program: names no factory. {FORM}",
    ":sound": f":sound: names no factory. {FORM}",
    "program:": f"program:: names no factory. {FORM}",
    "nowhere:sound": (
        "nowhere: no such module in {folder} or among installed packages. Give a file by its path: file.py:factory."
    ),
    "nowhere.deeper:sound": (
        "nowhere.deeper: no such module in {folder} or among installed packages. Give a file by its path: file.py:factory."
    ),
    "nowhere.py:sound": f"nowhere.py: no such file. {FORM}",
    "program:sond": f"program:sond: program has no sond. Did you mean sound? {FORM}",
    "program.py:zzz": f"program.py:zzz: program.py has no zzz. {FORM}",
    "program:number": f"program:number: is a int, not a function. {FORM}",
    "program:model_alone": "program:model_alone: returned a Model, but must return (model, batch).",
    "program:three": "program:three: returned a tuple of 3, but must return (model, batch).",
    "program:swapped": (
        "program:swapped: returned (Tensor, Model), but must return (model, batch), the model a torch.nn.Module."
    ),
    "program:fails": (
        "program:fails: the factory raised ValueError: no weights here (program.py, line 34). Make fails() work by itself first."
    ),
    "program:exits": (
        "program:exits: the factory raised SystemExit: goodbye (program.py, line 37). Make exits() work by itself first."
    ),
    "program:needs_more": (
        "program:needs_more: the factory raised TypeError: needs_more() missing 1 required positional argument: 'size'. Make "
        "needs_more() work by itself first."
    ),
    "program:no_output": "the model returned None, but no floating tensor.",
    "unimportable:x": (
        "unimportable: importing it raised ModuleNotFoundError: No module named 'not_there_at_all' (unimportable.py, line 1). "
        "Make it importable by itself first."
    ),
    "wrong.py:x": (
        "wrong.py: importing it raised SyntaxError: invalid syntax (wrong.py, line 1). Make it importable by itself first."
    ),
}  # fmt: skip


@pytest.mark.parametrize("target", ERRORS)
def test_errors_are_one_line(folder, target):
    done = check(target)
    said = [line for line in done.stderr.splitlines() if line != "noise on stdout"]
    assert said == [f"error: {ERRORS[target].replace('{folder}', str(folder))}"]
    assert done.exit_code == 1 and done.stdout == ""


def test_an_exception_in_the_forward_pass_is_named_and_debug_shows_its_traceback(folder):
    done = check("program:out_of_range")
    assert done.exit_code == 1
    assert "the forward pass of Model raised IndexError: index out of range" in done.stderr
    assert "Traceback" not in done.stderr
    done = check("program:out_of_range", "--debug")
    assert "Traceback" in done.stderr and "IndexError" in done.stderr
