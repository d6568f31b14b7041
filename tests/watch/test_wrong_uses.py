"""`attnscope watch` used wrongly: one clear line, nothing made, and "nothing seen" is said loudly."""

import pytest
from typer.testing import CliRunner

from attnscope.cli import app
from tests.watch.test_script import script, watch  # noqa: F401  (a fixture)


def said(folder, monkeypatch, *words):
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, ["watch", *words])
    return done.exit_code, done.stderr.strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.py"], "error: gone.py: there is no such script. Give the path of a Python file, or a module with -m."),
        (["bad.py"], "error: bad.py:2: this is not Python: '(' was never closed. Give the script that trains."),
        (["zero.bin"], "error: zero.bin: this is not Python: source code string cannot contain null bytes. Give the script that trains."),
        (["-m", "no_such_module"], "error: -m no_such_module: no such module, or it has no main program in Python. Is it installed, or below this folder?"),
        (["folder"], "error: folder: there is no such script. Give the path of a Python file, or a module with -m."),
        (["-", "ok.py"], "error: -: there is no such script. Give the path of a Python file, or a module with -m."),
        (["latin.py"], "error: latin.py:1: this is not Python: (unicode error) 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte. Give the script that trains."),
        (["-m", "folder/ok.py"], "error: -m folder/ok.py: no such module: No module named 'folder/ok'. Is it installed, or below this folder?"),
        (["-m", "folder"], "error: -m folder: no such module, or it has no main program in Python. Is it installed, or below this folder?"),
        (["--out", "ok.py", "ok.py"], "error: ok.py/ok-001: the run directory cannot be made: ok.py is a file. Put that right, or choose another place with --out."),
        (["--stop-on", "max_logits>4", "ok.py"], "error: --stop-on max_logits>4: there is no column max_logits. Columns: "),
        (["--rows", "0", "ok.py"], "error: --rows is '0', but must be a whole number, at least 1, or \"all\"."),
        (["--rows", "some", "ok.py"], "error: --rows is 'some', but must be a whole number, at least 1, or \"all\"."),
        (["--name", "a/b", "ok.py"], "error: --name is 'a/b', but must be the name of a folder. Use --out for where it stands."),
        (["--stop-on", "nan", "ok.py"], "error: --stop-on is 'nan', but must be nonfinite, explosion, the name of a rule, or a column and a threshold, as in max_logit>1e4."),
    ],
)  # fmt: skip
def test_one_line_and_no_run_directory(tmp_path, monkeypatch, words, message):
    (tmp_path / "bad.py").write_text("x = 1\nprint((x)\n")
    (tmp_path / "zero.bin").write_bytes(b"x = 1\0")
    (tmp_path / "latin.py").write_bytes(b'x = "\xff"\n')
    (tmp_path / "folder").mkdir()
    (tmp_path / "ok.py").write_text("raise RuntimeError('must not run')\n")
    code, text = said(tmp_path, monkeypatch, *words)
    assert code == 1
    assert text == message or (message.endswith(": ") and text.startswith(message))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Error: Missing argument 'SCRIPT [ARGS]...'."),
        (["-m"], "Error: Missing argument 'SCRIPT [ARGS]...'."),
        (["--evry", "3", "ok.py"], "Error: No such option: --evry"),
        (["--every", "0", "ok.py"], "Error: Invalid value for '--every': "),
        (["--every", "often", "ok.py"], "Error: Invalid value for '--every': "),
        (["--snapshot", "-1", "ok.py"], "Error: Invalid value for '--snapshot': "),
        (["--log-to", "csv", "ok.py"], "Error: Invalid value for '--log-to': "),
    ],
)
def test_a_command_line_that_is_wrong_is_not_run(tmp_path, monkeypatch, words, message):
    (tmp_path / "ok.py").write_text("raise RuntimeError('must not run')\n")
    code, text = said(tmp_path, monkeypatch, *words)
    assert code == 2
    assert text.splitlines()[-1].startswith(message)
    assert not (tmp_path / "runs").exists()


def test_nothing_seen_is_said_loudly_with_what_was_looked_for(tmp_path):
    (tmp_path / "train.py").write_text("print('no torch here')\n")
    done = watch("train.py", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "no torch here\n"
    assert "attnscope: NO ATTENTION WAS SEEN. Looked for: F.scaled_dot_product_attention" in done.stderr
    assert "attnscope: NO OPTIMIZER STEP WAS SEEN. Looked for: step() of any" in done.stderr


def test_a_script_that_ends_before_anything_was_seen_is_not_asked_why(tmp_path):
    (tmp_path / "train.py").write_text("import no_such_library\n")
    done = watch("train.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'no_such_library'" in done.stderr
    assert done.stderr.endswith("attnscope: the script ended before anything was seen\n")


def test_layers_that_do_not_exist_are_said_with_those_that_do(script):  # noqa: F811
    done = watch("--layers", "decoder.*", "train.py", cwd=script.parent)
    assert done.returncode == 0
    assert "attnscope: NO ATTENTION LAYER MATCHES --layers. Seen: h.0.attn, h.1.attn" in done.stderr


def test_an_existing_run_is_left_alone_and_the_script_does_not_run(tmp_path):
    (tmp_path / "train.py").write_text("print('ran')\n")
    (tmp_path / "runs" / "r").mkdir(parents=True)
    done = watch("train.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: runs/r already exists. Choose another --name.\n"
