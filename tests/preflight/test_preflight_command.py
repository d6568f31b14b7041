"""`attnscope preflight`, as a person and as a machine read it."""

import json
import sys

import pytest
from typer.testing import CliRunner

from attnscope.cli import app
from attnscope.preflight import variance

TOML = """
[model]
d_model = 16
n_layers = 2
seq_len = 12
norm = "pre"

[optimizer]
name = "adamw"

[data]
source = "markov"
batch_size = 4

[train]
steps = 12
"""

PROGRAM = """
import torch
from tests.check.models import TOKENS, Attention, model_of
print("noise on stdout")

number = 3

def sound():
    return model_of(), TOKENS

def unscaled():
    return model_of(Attention(scale=1.0)), TOKENS

def model_alone():
    return model_of()
"""
FORM = "Write module:factory or file.py:factory, where factory() returns (model, batch)."


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "small.toml").write_text(TOML)
    (tmp_path / "wrong.toml").write_text("[model]\nd_modle = 3\n")
    (tmp_path / "grid.toml").write_text('[sweep]\nvary = { "init.gain" = [0.5, 1.0] }\n')
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "program", raising=False)
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """The variance law of few sizes, measured once."""
    law = variance.variance_law(d_heads=(8, 64), n_keys=(32, 512))
    monkeypatch.setattr(variance, "variance_law", lambda: law)


def preflight(*words):
    return CliRunner().invoke(app, ["preflight", *words], env={"COLUMNS": "80"})


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_config_at_80_columns_plain_in_a_pipe_ends_with_the_next_command(folder):
    done = preflight("small.toml")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "scaled: predicted / measured before the first step"
    assert lines[1].split() == ["layer", "logit_std", "entropy", "max_prob", "Σp²", "residual"]
    assert lines[2].split()[0] == "0" and lines[2].count(" / ") == 5
    assert lines[5].split() == ["gradient", "q", "k", "v", "o", "mlp_in", "mlp_out", "norm"]
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line != line.rstrip()], "trailing blanks"
    assert "\x1b" not in done.stdout
    assert "Ready: no rule and no check objects." in lines
    assert lines[-1] == "Next: attnscope train small.toml"
    assert [path.name for path in folder.iterdir() if path.is_dir() and path.name == "runs"] == []


def test_the_missing_scale_is_said_with_the_words_of_diagnose(folder):
    done = preflight("small.toml", "--no-scale", "--set", "init.qk_gain=4.0")
    assert done.exit_code == 0, done.stderr
    assert "cause (warning): Attention logits are not scaled by 1/sqrt(d_head)" in done.stdout
    verdict, last = done.stdout.splitlines()[-4], done.stdout.splitlines()[-1]
    assert verdict.startswith("Not ready: ") and "warning" in verdict
    again = "attnscope preflight small.toml --no-scale --set init.qk_gain=4.0"
    assert last == f"Next: change it, then again: {again}"


def test_json_is_strict_and_whole(folder):
    said = strict(preflight("small.toml", "--no-scale", "--json").stdout)
    assert said["target"] == "small.toml --no-scale" and set(said) == {
        "target", "ready", "members", "needs", "checks", "findings", "chains", "not_looked"
    }  # fmt: skip
    assert [member["member"] for member in said["members"]] == ["unscaled", "scaled"]
    first = said["members"][0]["layers"][0]["quantities"][0]
    assert first["name"] == "logit_std" and first["predicted"] == pytest.approx(first["measured"], rel=0.3)
    assert said["not_looked"] and said["needs"][0]["quantities"][0]["unit"] == "bytes"


def test_fail_on_gives_exit_code_3(folder):
    sharp = ("--set", "attention.scale=4.0")
    codes = {
        asked: preflight("small.toml", *sharp, "--fail-on", asked, "--json").exit_code
        for asked in ("error", "warning", "applied_scale")
    }
    assert codes == {"error": 0, "warning": 3, "applied_scale": 3}
    leak = ("--set", "attention.mask=none", "--json")
    assert preflight("small.toml", *leak, "--fail-on", "error").exit_code == 3
    assert preflight("program:unscaled", "--fail-on", "error").exit_code == 3, "a failed check is an error"
    assert preflight("small.toml", "--fail-on", "everything").exit_code == 2


def test_a_model_in_hand(folder):
    done = preflight("program:sound")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "model: predicted / measured before the first step"
    assert lines[1].split() == ["layer", "logit_std", "entropy", "max_prob", "Σp²"]
    assert max(map(len, lines)) <= 80 and "noise" not in done.stdout
    assert any(line.startswith("passed      softmax axis") for line in lines)
    assert lines[-1] == "Next: attnscope watch train.py"
    assert preflight("program:unscaled").stdout.splitlines()[-1] == (
        "Next: change it, then again: attnscope preflight program:unscaled"
    )


def test_variance_prints_its_numbers_and_where_the_figure_is(folder, quick):
    done = preflight("--variance")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["d_head", "√d_head", "logit_std", "beyond", "±5", "1−Σp²", "max_prob"]
    assert lines[3].split()[:2] == ["64", "8.00"] and max(map(len, lines)) <= 80
    assert lines[-2:] == ["Figure: variance.png", "Next:   attnscope preflight --no-scale"]
    assert (folder / "variance.png").read_bytes().startswith(b"\x89PNG")
    said = strict(preflight("--variance", "--out", "other.png", "--json").stdout)
    assert said["figure"] == "other.png" and len(said["cells"]) == 8 and (folder / "other.png").exists()


ERRORS = {
    ("zzzzzzzzzzzz.toml",): "zzzzzzzzzzzz.toml: no such config file.",
    ("wrong.toml",): (
        'wrong.toml: [model] has no setting "d_modle". Did you mean d_model? Settings: kind, d_model, n_layers, n_heads, d_head, '
        "d_ff, seq_len, norm, norm_kind, position, activation, tie_embeddings."
    ),
    ("grid.toml",): "grid.toml describes a sweep. Run it: attnscope sweep grid.toml",
    ("--no-control",): "--no-control has no effect without --no-scale. Add it, or drop the flag.",
    ("small.toml", "--set", "model.d_modle=3"): (
        '--set model.d_modle=3: [model] has no setting "d_modle". Did you mean d_model? Settings: kind, d_model, n_layers, n_heads, '
        "d_head, d_ff, seq_len, norm, norm_kind, position, activation, tie_embeddings."
    ),
    ("small.toml", "--causal"): "--causal is for a model in hand; of a config, model.kind says it. Drop it.",
    ("small.toml", "--out", "a.png"): "--out is where --variance draws. Add --variance, or drop it.",
    ("nowhere:make",): (
        "nowhere: no such module in {folder} or among installed packages. Give a file by its path: file.py:factory."
    ),
    ("nowhere.py:make",): f"nowhere.py: no such file. {FORM}",
    ("program:sond",): f"program:sond: program has no sond. Did you mean sound? {FORM}",
    ("program:number",): f"program:number: is a int, not a function. {FORM}",
    ("program:model_alone",): "program:model_alone: returned a Model, but must return (model, batch).",
    ("program:sound", "--set", "model.d_model=64"): (
        "--set changes a config, but program:sound makes a model. Drop one of them."
    ),
    ("program:sound", "--no-scale"): "--no-scale changes a config, but program:sound makes a model. Drop one of them.",
    ("--variance", "small.toml"): (
        "--variance is measured on random q and k, but small.toml was given too. Drop one of them."
    ),
    ("--variance", "--no-scale"): (
        "--variance is measured on random q and k, but --no-scale was given too. Drop one of them."
    ),
    ("--variance", "--out", "figure.pdf"): "--out is 'figure.pdf', but must be a file that ends in .png.",
    ("--variance", "--out", "nowhere/a.png"): (
        "nowhere/a.png: the figure cannot be written: there is no folder {folder}/nowhere. Choose another place with --out."
    ),
    ("--variance", "--out", "file/a.png"): (
        "file/a.png: the figure cannot be written: there is no folder {folder}/file. Choose another place with --out."
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", ERRORS, ids=" ".join)
def test_errors_are_one_line(folder, words):
    done = preflight(*words)
    said = [line for line in done.stderr.splitlines() if line != "noise on stdout"]
    assert said == [f"error: {ERRORS[words].replace('{folder}', str(folder))}"]
    assert done.exit_code == 1 and done.stdout == ""
