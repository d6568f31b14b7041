"""A part is gone on with as it began: with the same number of threads, from a checkpoint that fits."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from attnscope.config import parse_table
from attnscope.errors import RunError
from attnscope.runs.checkpoint import load_checkpoint, save_checkpoint
from attnscope.runs.reader import open_run
from attnscope.train.run import resume_run, train_run
from tests.runs import made_up
from tests.train.small import small

# Large enough for PyTorch to divide its sums among threads.
WIDE = small(
    model={"d_model": 64, "n_layers": 1, "seq_len": 64},
    data={"source": "markov", "batch_size": 16},
    train={"steps": 8, "checkpoint_every": 0},
    optimizer={"lr": 0.05},
)


def stop_at(step, seen=None):
    """Asks the loop to stop after so many steps; notes the threads that it has."""
    asked = []

    def should_stop():
        asked.append(torch.get_num_threads())
        if seen is not None:
            seen.append(asked[-1])
        return len(asked) > step

    return should_stop


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_part_is_gone_on_with_with_as_many_threads_as_it_began(tmp_path, threads):
    config = parse_table(WIDE)
    threads(2)
    train_run(config, tmp_path / "whole")
    assert train_run(config, tmp_path / "cut", should_stop=stop_at(4)) == "interrupted"
    threads(1)
    seen = []
    assert resume_run(tmp_path / "cut", should_stop=stop_at(99, seen)) == "finished"
    assert set(seen) == {2} and torch.get_num_threads() == 1
    whole, cut = (open_run(tmp_path / name) for name in ("whole", "cut"))
    assert cut.steps["loss"].tolist() == whole.steps["loss"].tolist()
    starts = [fields["threads"] for fields in cut.events[cut.events["kind"] == "start"]["fields"]]
    assert starts == [2, 2]


def test_a_part_that_had_not_begun_takes_the_number_of_the_others(tmp_path, threads):
    arms = [{"name": "a"}, {"name": "b", "model": {"d_model": 32}}]
    config = parse_table(small(data={"source": "markov"}, arm=arms))
    threads(2)
    assert train_run(config, tmp_path / "r", should_stop=stop_at(4)) == "interrupted"
    threads(1)
    assert resume_run(tmp_path / "r") == "finished"
    assert [open_run(tmp_path / "r").threads_of(part) for part in (0, 1)] == [2, 2]


def test_a_run_from_before_parts_said_it_has_the_number_of_its_process():
    old = Path(__file__).parent.parent / "runs" / "old"
    assert open_run(old / "lab").threads_of(0) == 1
    assert open_run(old / "sweep").threads_of(0) is None


@pytest.mark.parametrize(
    "change",
    [
        {"alive": [7]}, {"alive": [0, 0]}, {"alive": None}, {"alive": ["0"]}, {"parameters": None},
        {"parameters": ["embedding", "nose"]}, {"alive": []},
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_an_error_in_one_line(tmp_path, change):
    old = Path(__file__).parent.parent / "runs" / "old" / "lab"
    path = shutil.copytree(old, tmp_path / "lab")
    (path / "part-0000" / "end.json").unlink()
    file = path / "part-0000" / "checkpoint-00000020.json"
    said = made_up.unsealed(file)
    file.write_text(json.dumps(said | {"state": said["state"] | change}))
    before = sorted(path.rglob("*"))
    with pytest.raises(RunError) as error:
        resume_run(path)
    assert str(error.value) == (
        f"{path}: its checkpoint at step 20 does not fit the members of this run. Restore it, or delete it: the part is "
        "then trained again from its first step."
    )
    assert sorted(path.rglob("*")) == before


def test_a_checkpoint_with_q_k_and_v_apart_is_refused_in_one_line(tmp_path):
    old = Path(__file__).parent.parent / "runs" / "old" / "lab"
    path = shutil.copytree(old, tmp_path / "lab")
    part = path / "part-0000"
    (part / "end.json").unlink()
    checkpoint = load_checkpoint(part)
    tensors = {}
    for name, value in checkpoint.tensors.items():
        three = zip("qkv", value.unbind(-2), strict=True) if name.endswith("qkv") else ()
        tensors |= {name.removesuffix("qkv") + each: x for each, x in three} or {name: value}
    names = "/".join(checkpoint.state["parameters"]).replace("qkv", "q/k/v").split("/")
    save_checkpoint(part, step=20, tensors=tensors, state=checkpoint.state | {"parameters": names})
    before = sorted(path.rglob("*"))
    with pytest.raises(RunError) as error:
        resume_run(path)
    assert str(error.value) == (
        f"{path}: its checkpoint at step 20 has q, k, v as parameters of their own, as old versions of attnscope saved them, "
        "and cannot be gone on with. Delete it: the part is then trained again from its first step."
    )
    assert sorted(path.rglob("*")) == before
    for file in part.glob("checkpoint-*"):
        file.unlink()
    assert resume_run(path) == "finished"
