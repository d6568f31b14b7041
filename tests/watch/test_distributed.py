"""torchrun with two processes on this machine: one part per rank, joined by the reader, and the script undisturbed."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnscope.runs.reader import open_run
from attnscope.runs.watched import attention_layers

pytestmark = pytest.mark.slow

PROGRAM = """
import sys, time
import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.wte, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    def forward(self, tokens):
        return self.head(self.encoder(self.wte(tokens)))

model = Model()
if sys.argv[1] == "fsdp":
    from torch.distributed.fsdp import fully_shard
    for layer in model.encoder.layers:
        fully_shard(layer)
    fully_shard(model)
else:
    model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(rank)
began = time.monotonic()
for step in range(6 if sys.argv[-1] != "hang" else 1_000_000):
    if sys.argv[-1] == "hang" and rank == 1 and time.monotonic() - began > 3:
        print(f"hangs at {step} .\\n", end="", flush=True)
        time.sleep(3600)
    tokens = torch.randint(0, 50, (4, 13), generator=generator)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    if rank == 0:
        print(step, loss.item(), flush=True)
if rank == 0:
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    print(sum(p.double().sum().item() for p in local))
dist.destroy_process_group()
"""


def torchrun(*words, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_part_per_rank(tmp_path, kind):
    (tmp_path / "train.py").write_text(PROGRAM)
    plain = torchrun("train.py", kind, cwd=tmp_path)
    watched = torchrun("-m", "attnscope", "watch", "--every", "2", "--name", "r", "train.py", kind, cwd=tmp_path)  # fmt: skip
    assert plain.returncode == watched.returncode == 0, watched.stderr
    assert watched.stdout == plain.stdout
    assert watched.stderr.count("attnscope: 2 attention layers (encoder.layers.0.self_attn to encoder.layers.1.self_attn), 6 optimizer updates") == 1  # fmt: skip
    run = open_run(tmp_path / "runs" / "r")
    assert run.status == "finished" and run.lost == ()
    assert [member.name for member in run.members] == ["rank 0", "rank 1"]
    names = {(layer.member, layer.name) for layer in attention_layers(run)}
    assert len(names) == 4
    by_rank = run.steps.pivot(index="step", columns="member", values=["loss", "grad_norm", "clip_factor"])  # fmt: skip
    assert (by_rank["loss"]["rank 0"] != by_rank["loss"]["rank 1"]).all(), "each its own batches"
    assert by_rank["grad_norm"]["rank 0"].equals(by_rank["grad_norm"]["rank 1"]), "one gradient"
    assert (by_rank["clip_factor"] < 1).all(axis=None)
    assert len(run.heads) == 2 * 6 * 2 * 4, "ranks, steps, layers, heads"
    groups = set(run.params["group"].astype(str))
    assert {"wte", "self_attn.out_proj", "linear1", "head"} <= groups


def kill_all(word):
    """Torchrun and its workers, which are in sessions of their own: every process with this word on its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes():
                os.kill(int(path.parent.name), signal.SIGKILL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_rank_that_waits_for_ever_leaves_the_records_of_all_until_the_last_second(tmp_path):
    (tmp_path / "train.py").write_text(PROGRAM)
    words = ["-m", "attnscope", "watch", "--name", "r", "train.py", "ddp", str(tmp_path), "hang"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *words],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    # The other rank writes into the same line, piece by piece.
    said = (re.search(r"hangs at (\d+) \.", line) for line in process.stdout)
    hung = int(next(match[1] for match in said if match))
    time.sleep(1)
    kill_all(str(tmp_path))
    process.communicate(timeout=60)
    run = open_run(tmp_path / "runs" / "r")
    for member in run.members:
        steps = run.steps[run.steps["member"].astype(str) == member.name]
        assert steps["step"].tolist() == list(range(len(steps))) and len(steps) <= hung + 1
        assert (hung - len(steps)) * steps["step_ms"].iloc[-20:].median() < 1500, member.name
