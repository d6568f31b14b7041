"""Every example runs as its header says and shows what it promises."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHOWN = {
    "explode.py": ["unscaled  diverged", "scaled", "max_prob"],
    "your_own_attention.py": ["no scale", "saturated rows"],
    "watch_a_loop.py": [
        "stopped on nonfinite",
        "step 25: first in the activation of layers.0.self_attn",
        "NaN at (sample, position) [[3, 7]]; its loss is nan again",
    ],
    "read_a_run.py": ["largest gradient", "diverged"],
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    run = tmp_path_factory.mktemp("examples") / "run"
    made = {}
    for name in ("explode.py", "your_own_attention.py", "watch_a_loop.py", "read_a_run.py"):
        words = {"your_own_attention.py": [], "watch_a_loop.py": [f"{run}-watched"]}.get(name, [str(run)])
        done = subprocess.run([sys.executable, str(EXAMPLES / name), *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made[name] = done.stdout
    return made


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_example(name, outputs):
    for text in SHOWN[name]:
        assert text in outputs[name]
