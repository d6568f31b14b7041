"""Names are data, whatever they are made of; and runs in which members recorded nothing are reported as that."""

import html
import re
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import attnscope
from attnscope.cli import app
from attnscope.report import write_report
from attnscope.report.figures.canvas import without_math
from attnscope.runs.layout import COLUMNS
from attnscope.runs.reader import open_run
from attnscope.runs.writer import RunWriter
from tests.runs.made_up import columns, unsealed
from tests.sweep.small import members, tiny

TINY = {
    "model": {"d_model": 16, "n_layers": 1, "seq_len": 8},
    "data": {"source": "markov", "batch_size": 2},
    "train": {"steps": 3},
}
NAMES = [
    r"lr $\lr$", "from $HOME/a to $HOME/b", "$", "$$", "$x_1^2$", r"\frac{1}{2}", r"$\mathdefault{10^{-3}}$", "_hidden", "_",
    "a_b^c", "%d {0} {x}", "&amp; <b>", "<script>alert(1)</script>", "=cmd|' /C calc'!A0", "日本語 🙂", "x" * 60,
]  # fmt: skip


def figure_texts(run):
    """Every text in the figures of a report, as a reader meets them."""
    found = []
    for path in (run / "report" / "figures").glob("*.svg"):
        found += [
            html.unescape(re.sub(r"<[^>]*>", "", text)).strip()
            for text in re.findall(r"<text[^>]*>(.*?)</text>", path.read_text(), re.DOTALL)
        ]
    return found


def run_all(folder, *runs):
    """What all commands that read runs say; none may fail or drive the terminal."""
    said = {}
    names = [str(run) for run in runs]
    for command in (
        ["runs", str(folder)],
        *(["report", name] for name in names),
        *(["diagnose", name] for name in names),
        ["compare", *names, "--out", str(folder / "compared")],
        ["export", names[0], "--to", "csv"],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (command, done.output, done.exception)
        for letter in done.output:
            assert letter.isprintable() or letter == "\n", (command, done.output)
        said[command[0]] = done.output
    return said


@pytest.mark.parametrize("names", [NAMES[:4], NAMES[4:12], NAMES[12:]])
def test_names_train_and_are_shown_as_they_are(tmp_path, names):
    arms = [{"name": name, "optimizer": {"lr": 0.01 * (k + 1)}} for k, name in enumerate(names)]
    run = attnscope.train_model(TINY | {"arm": arms}, path=tmp_path / "r")
    run_all(tmp_path, run.path)
    shown = figure_texts(run.path)
    for name in names:
        assert name in shown or f"{name[:39]}…" in shown


@pytest.mark.parametrize("name", ["\x1b[31ma\nb\r\tc", "\x07\x9b31m\u202egnp", "x" * 5000, ""])
def test_names_from_a_foreign_run_do_nothing_but_show_themselves(tmp_path, name):
    import json

    arms = [{"name": "a"}, {"name": "b", "optimizer": {"lr": 0.01}}]
    run = attnscope.train_model(TINY | {"arm": arms}, path=tmp_path / "r").path
    raw = unsealed(run / "run.json")
    raw["members"][0]["name"] = name
    raw["members"][1]["settings"] = {name: name, "model.kind": name}
    (run / "run.json").write_text(json.dumps(raw))
    run_all(tmp_path, run)
    for path in [run / "report" / "report.md", run / "report" / "report.html"]:
        assert not set(path.read_text()) & set("\x1b\x07\x9b\u202e")


def test_modules_of_a_watched_model_may_be_called_anything(tmp_path):
    names = [
        r"$\foo$",
        "<script>alert(1)</script>",
        "=cmd|' /C calc'!A0",
        "\x1b[31m\n/x",
        "_",
        "x" * 300,
    ]
    torch.manual_seed(0)
    embed, head = nn.Embedding(20, 16), nn.Linear(16, 20)
    blocks = nn.ModuleDict({name: nn.MultiheadAttention(16, 2, batch_first=True) for name in names})
    model = nn.ModuleDict({"embed": embed, "blocks": blocks, "head": head})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with attnscope.watch_model(model, optimizer, tmp_path / "r"):
        for _ in range(3):
            ids = torch.randint(0, 20, (2, 6))
            x = embed(ids[:, :-1])
            for block in blocks.values():
                x = x + block(x, x, x)[0]
            loss = nn.functional.cross_entropy(head(x).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    said = run_all(tmp_path, tmp_path / "r", shutil.copytree(tmp_path / "r", tmp_path / "again"))
    assert "watched" in said["report"]
    page = (tmp_path / "r" / "report" / "report.html").read_text()
    assert "<script>alert(1)" not in page and "\x1b" not in page


LABELS = [
    (r"$\mathdefault{10^{-3}}$", "10⁻³"), (r"$\mathdefault{10^{0}}$", "10⁰"),
    (r"$\mathdefault{2\times10^{12}}$", "2×10¹²"), ("0.5", "0.5"), ("", ""),
]  # fmt: skip


@pytest.mark.parametrize(("label", "plain"), LABELS)
def test_powers_of_ten_are_plain_text(label, plain):
    assert without_math(label) == plain


def test_logarithmic_axes_have_powers_of_ten(tmp_path):
    part = RunWriter.create(
        tmp_path / "r",
        command=["attnscope"],
        config=tiny(),
        members=members(),
        environment={},
        data={},
    ).part(0)
    table = columns("steps", range(50))
    table["loss"] = np.geomspace(1e5, 1e-2, 50)
    part.append("steps", table)
    part.finish("finished")
    write_report(open_run(tmp_path / "r"))
    assert {"10⁻²", "10³"} <= set(figure_texts(tmp_path / "r"))


LR_SWEEP = {"vary": {"optimizer": {"lr": [0.01, 0.1, 1.0]}, "attention": {"scale": ["inverse_sqrt", "none"]}}, "seeds": 2}  # fmt: skip


def sweep(path, *, recorded=(), value=1.0, tables=("steps", "heads", "layers", "params")):
    """A sweep over learning rates whose parts recorded a step, or nothing."""
    grid = members(sweep=LR_SWEEP)
    writer = RunWriter.create(
        path,
        command=["attnscope", "sweep"],
        config=tiny(sweep=LR_SWEEP),
        members=grid,
        environment={},
        data={},
    )
    for index in recorded:
        part = writer.part(0)
        for table in tables:
            rows = columns(table, [0, 1], members=(index,))
            for name in rows:
                if COLUMNS[table][name].kind == "float32" and np.isnan(value):
                    rows[name] = np.full(len(rows[name]), value)
            part.append(table, rows)
        part.close()
    return path


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"recorded": (0, 1, 5)},
        {"recorded": (0, 3), "value": np.nan},
        {"recorded": (2,), "tables": ("heads", "params")},
    ],
)
def test_a_sweep_in_which_members_recorded_nothing_is_reported_as_that(tmp_path, how):
    path = sweep(tmp_path / "s", **how)
    run = open_run(path)
    assert run.status == "killed"
    assert (run.lost == ()) is ("steps" in how.get("tables", ("steps",))), "others went on"
    said = run_all(tmp_path, path, sweep(tmp_path / "empty"))
    assert "Of 12 members, " in said["report"] and " killed" in said["report"]
    assert "killed" in said["runs"]
    text = (path / "report" / "report.md").read_text()
    assert ("nan" in text.split("## Definitions")[0]) is ("value" in how)
    if not how:
        assert "12 killed" in said["report"]
        assert "Nothing was recorded of their attention." in said["report"] or "Baseline" in said["report"]
