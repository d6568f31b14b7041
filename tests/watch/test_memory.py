"""What watching takes in memory: real processes, as imports and allocators count, too."""

import subprocess
import sys
import textwrap

import pytest

# While rules are asked they hold the tables, here of 2,400 steps with 16 heads each: 38,400 rows of heads.
RULES_MB = 30

PROGRAM = """
    import sys

    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(4, 16, 32)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    def resident_mb():
        # Without pages of libraries' files: how many of those are mapped depends on the page cache.
        with open("/proc/self/status") as file:
            (line,) = [line for line in file if line.startswith("RssAnon")]
        return int(line.split()[1]) / 1e3

    train(50)
    if sys.argv[1] != "unwatched":
        import attnscope.watch.watcher

        attnscope.watch.watcher.FLUSH_SECONDS = 0.1  # many blocks
        attnscope.watch_model(model, optimizer, sys.argv[1], every=1)
    train(400)
    early = resident_mb()
    train(int(sys.argv[2]))
    print(early, resident_mb(), "pandas" in sys.modules)
"""


def run(path, steps):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(path), str(steps)],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    early, late, pandas = done.stdout.split()
    return float(early), float(late), pandas == "True"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_watching_takes_less_than_50_mb_and_what_rules_need_and_no_more_as_training_goes_on(tmp_path):
    _, bare, _ = run("unwatched", 2000)
    early, late, pandas = run(tmp_path / "run", 2000)
    assert pandas, "rules look at its tables, which is 35 MB"
    assert late - bare < 50 + 35 + RULES_MB, (early, late, bare)
    assert late - early < 8 + RULES_MB, (early, late)
