"""Every wrong command line gives one line that says what, where and the way out."""

import pytest
from typer.testing import CliRunner

from attnscope.cli import app

CASES = {
    ("train", "no.toml"): "error: no.toml: no such config file.",
    (
        "train",
        "--lr",
        "-1",
    ): "error: --lr: optimizer.lr is -1, but must be a finite number at least 0.",
    (
        "train",
        "--lr",
        "nan",
    ): "error: --lr: optimizer.lr is nan, but must be a finite number at least 0.",
    (
        "train",
        "--lr",
        "fast",
    ): 'error: --lr: optimizer.lr is "fast", but must be a finite number at least 0.',
    ("train", "--clip", "0"): ("error: --clip: clip.threshold is 0, but must be a finite number above 0 or none."),
    ("train", "--init", "xavier"): (
        'error: --init: init.scheme is "xavier", but must be one of xavier_uniform, xavier_normal, kaiming, '
        "normal, orthogonal, gpt2. Did you mean xavier_normal?"
    ),
    ("train", "--gain", "0"): "error: --gain: init.gain is 0, but must be a finite number above 0.",
    ("train", "--steps", "0"): ("error: --steps: train.steps is 0, but must be a whole number, at least 1."),
    ("train", "--steps", "1.5"): ("error: --steps: train.steps is 1.5, but must be a whole number, at least 1."),
    ("train", "--seed", "-3"): ("error: --seed: train.seed is -3, but must be a whole number, at least 0."),
    ("train", "--precision", "fp16"): (
        'error: --precision: precision.dtype is "fp16", but must be one of float32, bfloat16, float16.'
    ),
    ("train", "--no-control"): ("error: --no-control has no effect without --no-scale. Add it, or drop the flag."),
    ("train", "--set", "model.d_model"): (
        "error: --set model.d_model: write section.setting=value, for example model.d_model=64."
    ),
    ("train", "--name", "../x"): (
        "error: --name is '../x', but must be the name of a folder. Use --out for where it stands."
    ),
    ("train", "--resume", "nowhere"): "error: nowhere: no such run. List them: attnscope runs",
    ("train", "--resume", "nowhere", "--lr", "1"): (
        "error: --resume goes on with a run as it was configured, but --lr was given too. Drop one of them."
    ),
    ("train", "--set", "data.source=missing.txt"): (
        "error: data.source = missing.txt: no such file or folder. Sources: stdlib, markov, recall, modular, or a path."
    ),
    ("sweep",): (
        "error: sweep: nothing varies. Add settings, for example --vary attention.scale=inverse_sqrt,none, or "
        "--seeds 5."
    ),
    ("sweep", "--vary", "init.gain"): (
        "error: --vary init.gain: write section.setting=value,value,... for example init.gain=0.5,1,2."
    ),
    ("sweep", "--vary", "init.gian=1,2"): (
        'error: --vary init.gian=1,2: [init] has no setting "gian". Did you mean gain? Settings: scheme, gain, '
        "qk_gain, std, embedding_std."
    ),
    ("sweep", "--vary", "init.gain=1,2", "--vary", "init.gain=3"): (
        "error: --vary init.gain was given twice. Put all its values into one list."
    ),
    ("sweep", "--vary", "init.gain=1,2", "--set", "init.gain=3"): (
        "error: --set init.gain: init.gain varies in this sweep. Drop it, or give --vary init.gain with that one value."
    ),
    ("sweep", "--vary", "optimizer.lr=log:0:1:3"): (
        'error: --vary optimizer.lr=log:0:1:3: optimizer.lr is "log:0:1:3", but equal ratios need LOW above 0. '
        "Write log:LOW:HIGH:COUNT or lin:LOW:HIGH:COUNT."
    ),
    ("sweep", "--vary", "train.seed=1,2"): (
        "error: --vary train.seed=1,2: train.seed is what seeds are for. Use --seeds, or seeds in [sweep]."
    ),
    ("sweep", "--vary", "init.gain=1,2", "--seeds", "0"): (
        "error: sweep: seeds is 0, but must be a whole number, at least 1, or a list of different ones."
    ),
    ("sweep", "--vary", "init.gain=1,2", "--baseline", "init.gain=3"): (
        "error: sweep: the baseline has init.gain = 3, which is none of its values: 1, 2."
    ),
    ("sweep", "--vary", "init.gain=1,2", "--baseline", "optimizer.lr=3"): (
        'error: sweep: the baseline sets "optimizer.lr", which does not vary. Varied: init.gain.'
    ),
    ("sweep", "--vary", "model.d_model=64,65"): (
        "error: command line: arm d_model=65: model.n_heads is 2, which does not divide model.d_model = 65. Use 1, 5, "
        "13 or 65, or set model.d_head."
    ),
    ("sweep", "--vary", "init.gain=1,2", "--memory", "much"): (
        "error: --memory is 'much', but must be a size like 6GiB or 512MiB."
    ),
    ("sweep", "--resume", "nowhere"): "error: nowhere: no such run. List them: attnscope runs",
    ("sweep", "--resume", "nowhere", "--vary", "init.gain=1,2"): (
        "error: --resume goes on with a run as it was configured, but --vary was given too. Drop one of them."
    ),
    ("sweep", "--vary", "init.gain=lin:1:2:100", "--seeds", "101"): (
        "error: sweep: 100 cells x 101 seeds are 10100 members, but at most 10000 fit a run. Vary less."
    ),
    ("report", "nowhere"): "error: nowhere: no such run. List them: attnscope runs",
    ("diagnose", "nowhere"): "error: nowhere: no such run. List them: attnscope runs",
    ("runs", "nowhere"): ("error: nowhere: no such folder. Make a run first: attnscope train --no-scale"),
}


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_message(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 1
    assert done.output.strip() == CASES[words]
    assert list(tmp_path.iterdir()) == [], "something was left behind"


@pytest.mark.parametrize("words", [("fly",), ("train", "--fast"), ("report",), ("train", "a", "b")])
def test_usage_errors_exit_with_2(words):
    assert CliRunner().invoke(app, list(words)).exit_code == 2


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"short"])
def test_data_files_that_cannot_be_used(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(content)
    done = CliRunner().invoke(app, ["train", "--set", "data.source=text.txt"])
    assert done.exit_code == 1
    expected = {
        b"": "error: data.source = text.txt has no text in it. Give a file or folder with text.",
        b"short": (
            "error: data.source = text.txt has 5 bytes, but model.seq_len = 32 needs at least 340: a tenth is "
            "held out and must hold a sequence. Use more text or a shorter seq_len."
        ),
    }
    assert done.output.strip() == expected.get(content, expected[b""])
    assert not (tmp_path / "runs").exists()
