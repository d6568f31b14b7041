"""`attnscope watch script.py`: the script is undisturbed, and whatever ends it, its record is there."""

import os
import signal
import subprocess
import sys
import time

import pytest

from attnscope.runs.reader import open_run
from tests.watch.foreign import layers_of

# nanoGPT's shape: flash or manual attention, accumulation, clipping, two weight-decay groups, dropout, a DataLoader with workers.
PROGRAM = """
import hashlib, math, os, sys
import torch, torch.nn as nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

FLASH = "--manual" not in sys.argv
STEPS = int(os.environ.get("STEPS", "12"))

class CausalSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_head = 2
        self.c_attn = nn.Linear(32, 96)
        self.c_proj = nn.Linear(32, 32)
    def forward(self, x):
        B, T, C = x.size()
        q, k, v = (y.view(B, T, 2, 16).transpose(1, 2) for y in self.c_attn(x).split(32, dim=2))
        if FLASH:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf"))
            y = F.dropout(F.softmax(att, dim=-1), 0.1, self.training) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attn = CausalSelfAttention()
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(40, 32)
        self.h = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(32, 40, bias=False)
    def forward(self, i):
        x = self.wte(i)
        for block in self.h:
            x = block(x)
        return self.head(x)

if __name__ == "__main__":
    torch.manual_seed(0)
    model = GPT()
    decay = [p for p in model.parameters() if p.dim() >= 2]
    other = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}], lr=1e-3)
    data = TensorDataset(torch.randint(0, 40, (400, 17)))
    loader = iter(DataLoader(data, batch_size=4, shuffle=True, num_workers=int(os.environ.get("WORKERS", "0"))))
    print(sys.argv[1:], __name__, os.path.basename(__file__), os.getcwd(), os.path.realpath(sys.path[0]))
    for step in range(STEPS):
        for _ in range(2):
            (batch,) = next(loader)
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()) / 2
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(step, loss.item(), flush=True)
        if "--raise" in sys.argv and step == 7:
            raise ValueError("the run that dies is the one that matters")
        if "--exit" in sys.argv and step == 7:
            sys.exit(7)
        if step == 9:
            model.eval()
            with torch.no_grad():
                print("eval", model(data.tensors[0][:8, :-1]).sum().item())
            model.train()
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    print(hashlib.sha256(weights).hexdigest(), torch.rand(3).tolist())
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(PROGRAM)
    return path


def run(*words, cwd, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def watch(*words, cwd, **environment):
    return run("-m", "attnscope", "watch", "--every", "2", "--name", "r", *words, cwd=cwd, **environment)  # fmt: skip


@pytest.mark.parametrize("way", [["--flash"], ["--manual"]], ids=lambda way: way[0])
def test_output_weights_and_random_numbers_are_those_of_plain_python(script, way):
    plain = run("train.py", *way, "--x=1", cwd=script.parent, WORKERS="2")
    watched = watch("train.py", *way, "--x=1", cwd=script.parent, WORKERS="2")
    assert plain.returncode == watched.returncode == 0, watched.stderr
    assert watched.stdout == plain.stdout
    assert watched.stderr.splitlines() == [
        "attnscope: watching train.py into runs/r",
        "attnscope: 2 attention layers (h.0.attn to h.1.attn), 12 optimizer updates",
        "attnscope: next: attnscope report runs/r",
    ]
    found = open_run(script.parent / "runs" / "r")
    assert found.status == "finished" and found.kind == "watch" and found.lost == ()
    assert found.steps["step"].tolist() == list(range(12))
    printed = float(plain.stdout.splitlines()[1].split()[1])
    assert found.steps["loss"][0] == pytest.approx(2 * printed, rel=0.05), "mean of both halves"
    assert sorted(set(found.heads["step"])) == list(range(12))
    assert found.heads["rows"].min() > 32, "two micro-batches of up to 32 rows each"
    assert [layer["scale"] for layer in layers_of(found)] == pytest.approx([0.25] * 2)
    groups = found.params[found.params["step"] == 4]
    assert set(groups[groups["layer"] == 1]["group"]) == {"attn.c_attn", "attn.c_proj", "ln_1", "ln_2", "mlp.0", "mlp.2"}  # fmt: skip
    total = (groups["grad_norm"].astype(float) ** 2).sum() ** 0.5
    at_4 = found.steps[found.steps["step"] == 4].iloc[0]
    assert total == pytest.approx(at_4["grad_norm"], rel=1e-5)
    assert at_4["clip_factor"] == pytest.approx(min(1, 1 / (at_4["grad_norm"] + 1e-6)), rel=1e-5)


def test_an_exception_has_the_traceback_and_exit_code_of_plain_python(script):
    plain = run("train.py", "--raise", cwd=script.parent)
    watched = watch("train.py", "--raise", cwd=script.parent)
    assert (watched.returncode, watched.stdout) == (plain.returncode, plain.stdout)
    ours = [line for line in watched.stderr.splitlines() if not line.startswith("attnscope: ")]
    theirs = plain.stderr.replace(str(script), "train.py").splitlines()
    assert [line.replace(str(script), "train.py") for line in ours] == theirs
    found = open_run(script.parent / "runs" / "r")
    assert found.status == "failed" and found.steps["step"].tolist() == list(range(8))
    assert found.ends[0]["error"] == "ValueError: the run that dies is the one that matters"


@pytest.mark.parametrize("words", [["me.py"], ["./me.py"], ["pkg"], ["-m", "pkg"]], ids=" ".join)
def test_a_script_finds_of_itself_what_plain_python_gives(tmp_path, words):
    """Names of the module, its file, path and arguments; its source also from another folder; what it does at exit."""
    (tmp_path / "pkg").mkdir()
    for path in (tmp_path / "me.py", tmp_path / "pkg" / "__main__.py"):
        path.write_text(
            "import atexit, inspect, os, sys, threading, warnings\n"
            "for name in ('__file__', '__name__', '__package__', '__doc__', '__builtins__', '__annotations__'):\n"
            "    print(name, globals().get(name, 'missing'))\n"
            "print(__loader__ is not None, __spec__ and __spec__.name, sys.argv, sys.path[0])\n"
            "print(sys.modules['__main__'].__dict__ is globals(), inspect.currentframe().f_code.co_filename)\n"
            "def source(): pass\n"
            "os.chdir('/')\n"
            "print(inspect.getsource(source))\n"
            "atexit.register(print, 'at exit')\n"
            "warnings.warn('of the script')\n"
        )
    plain, watched = run(*words, "a", "-b", cwd=tmp_path), watch(*words, "a", "-b", cwd=tmp_path)
    assert watched.stdout == plain.stdout and watched.returncode == plain.returncode == 0
    said = [line for line in watched.stderr.splitlines() if not line.startswith("attnscope: ")]
    assert said == plain.stderr.splitlines()


def test_sys_exit_passes_its_code_on(script):
    watched = watch("train.py", "--exit", cwd=script.parent)
    assert watched.returncode == 7
    assert open_run(script.parent / "runs" / "r").status == "finished"


def test_a_script_that_changes_its_folder_is_recorded_where_it_began(script):
    elsewhere = script.parent / "elsewhere"
    elsewhere.mkdir()
    script.write_text(f"import os\nos.chdir({str(elsewhere)!r})\n{PROGRAM}")
    watched = watch("train.py", cwd=script.parent)
    assert watched.returncode == 0 and "no longer watches" not in watched.stderr
    found = open_run(script.parent / "runs" / "r")
    assert found.status == "finished" and len(found.steps) == 12
    assert not any(elsewhere.iterdir())


@pytest.mark.slow
def test_a_module_of_a_package(script):
    package = script.parent / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(PROGRAM)
    plain = run("-m", "pkg.train", "a", cwd=script.parent)
    watched = watch("-m", "pkg.train", "a", cwd=script.parent)
    assert watched.stdout == plain.stdout and watched.returncode == 0, watched.stderr


def test_killed_it_keeps_the_records_until_the_last_second(script):
    words = [sys.executable, "-m", "attnscope", "watch", "--name", "r", "train.py"]
    process = subprocess.Popen(
        words, cwd=script.parent, env={**os.environ, "STEPS": "100000"}, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    last, began = 0, None
    for line in process.stdout:
        if line[0].isdigit():
            last, began = int(line.split()[0]), began or time.monotonic()
            if last > 20 and time.monotonic() - began > 2:
                break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = open_run(script.parent / "runs" / "r")
    steps = found.steps["step"].tolist()
    assert steps == list(range(len(steps)))
    ms = found.steps["step_ms"].iloc[-20:].median()
    assert (last - steps[-1]) * ms < 1500


def test_ctrl_c_is_the_scripts_and_the_record_is_kept(script):
    words = [sys.executable, "-m", "attnscope", "watch", "--name", "r", "train.py"]
    process = subprocess.Popen(
        words, cwd=script.parent, env={**os.environ, "STEPS": "100000"}, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("30 "):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in err and "attnscope: next: attnscope report runs/r" in err
    found = open_run(script.parent / "runs" / "r")
    assert found.status == "interrupted" and found.steps["step"].max() >= 30


def test_attention_that_was_seen_and_could_not_be_measured_is_said_with_its_reason(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        """
import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT).softmax(dim=2) @ v).sum()


model = Attention()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.randn(2, 5, 16)).backward()
optimizer.step()
"""
    )
    done = watch("train.py", cwd=tmp_path)
    assert done.returncode == 0
    assert "NO ATTENTION WAS MEASURED, though some was seen" in done.stderr
    assert "calls not measured, of Attention: softmax over the queries' axis" in done.stderr
