"""Checkpoints: exact, atomic, and never half believed."""

import hashlib
import json
import math
import os
import re

import pytest
import torch

from attnscope.errors import RunError, RunWriteError
from attnscope.runs.checkpoint import load_checkpoint, save_checkpoint
from tests.runs import made_up


def tensors(value=0.0):
    shared = torch.full((2, 3), value)
    return {
        "parameters/q": torch.arange(6.0).reshape(2, 3).T + value,  # not contiguous
        "parameters/embedding": shared,
        "parameters/head": shared,
        "state/finite": torch.tensor([True, False]),
        "state/step": torch.tensor(7),
        "state/bf16": torch.tensor([1.5, math.nan], dtype=torch.bfloat16),
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path):
    state = {"alive": (0, 2), "best": math.inf, "name": "é"}
    path = save_checkpoint(tmp_path, step=100, tensors=tensors(), state=state)
    assert path == tmp_path / "checkpoint-00000100.json"
    found = load_checkpoint(tmp_path)
    assert found.step == 100 and found.notes == ()
    assert found.state == {"alive": [0, 2], "best": math.inf, "name": "é"}
    assert found.tensors.keys() == tensors().keys()
    for name, value in tensors().items():
        assert found.tensors[name].dtype == value.dtype
        torch.testing.assert_close(found.tensors[name], value, rtol=0, atol=0, equal_nan=True)


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "nowhere") is None


def test_older_checkpoints_go_once_the_new_one_is_there(tmp_path):
    for step in (100, 200):
        save_checkpoint(tmp_path, step=step, tensors=tensors(step), state={})
        assert names(tmp_path) == [
            f"checkpoint-{step:08d}.json",
            f"checkpoint-{step:08d}.safetensors",
        ]
    assert load_checkpoint(tmp_path).step == 200


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("works_before", [0, 1])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch, broken, works_before, error):
    part = tmp_path / "a" / "part-0000"
    part.mkdir(parents=True)
    save_checkpoint(part, step=100, tensors=tensors(), state={})
    real, calls = getattr(os, broken), []

    def fail(*args, **how):
        calls.append(args)
        if len(calls) <= works_before * (2 if broken == "fsync" else 1):
            return real(*args, **how)
        raise error

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(RunWriteError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        save_checkpoint(part, step=200, tensors=tensors(), state={})
    monkeypatch.undo()
    if isinstance(error, OSError):
        assert str(raised.value) == (
            f"{part}/checkpoint-00000200.json: no space left on device. The checkpoint before it "
            f"and all records are kept. Free space, then: attnscope train --resume {tmp_path}/a"
        )
    assert load_checkpoint(part).step == 100
    assert not [name for name in names(part) if name.endswith(".tmp")]
    save_checkpoint(part, step=200, tensors=tensors(), state={})
    assert len(names(part)) == 2


@pytest.mark.parametrize(
    ("spoil", "note"),
    [
        (lambda j, s: j.write_text("{"), r"checkpoint-00000200\.json is damaged: Expecting"),
        (lambda j, s: s.unlink(), r"checkpoint-00000200\.safetensors: cannot be read: no such file"),
        (lambda j, s: s.write_bytes(s.read_bytes()[:-1]), "is not the file that its JSON was written for"),
        (lambda j, s: j.write_text(json.dumps({"step": 5})), "its JSON does not describe step 200"),
        (lambda j, s: (s.rename(s.parent / "x"), s.symlink_to(s.parent / "x")), "is a link"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_skipped_with_a_note(tmp_path, spoil, note):
    old, new = tmp_path / "part-0000", tmp_path / "new"
    for folder, step in ((old, 100), (new, 200)):
        folder.mkdir()
        save_checkpoint(folder, step=step, tensors=tensors(), state={})
    for path in new.iterdir():
        path.rename(old / path.name)
    spoil(old / "checkpoint-00000200.json", old / "checkpoint-00000200.safetensors")
    found = load_checkpoint(old)
    assert found.step == 100
    assert len(found.notes) == 1
    assert re.search(note, found.notes[0])


def test_tensors_without_their_json_are_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, step=100, tensors=tensors(), state={})
    (tmp_path / "checkpoint-00000100.json").unlink()
    assert load_checkpoint(tmp_path) is None


@pytest.mark.parametrize("payload", [b"", b"\x00" * 7, b"\xff" * 40, b"\x80\x04cos\nsystem\n", b"\x02\0\0\0\0\0\0\0{}"])
def test_tensors_that_are_none_are_refused_even_with_the_right_hash(tmp_path, payload):
    save_checkpoint(tmp_path, step=100, tensors=tensors(), state={})
    path = tmp_path / "checkpoint-00000100.json"
    (tmp_path / "checkpoint-00000100.safetensors").write_bytes(payload)
    digest = hashlib.sha256(payload).hexdigest()
    path.write_text(json.dumps(made_up.unsealed(path) | {"sha256": digest}))
    try:
        assert load_checkpoint(tmp_path).tensors == {}
    except RunError as error:
        assert re.search(r"safetensors: is damaged: .*\. Restore the file, or delete", str(error))


@pytest.mark.parametrize("kind", ["json", "safetensors"])
def test_a_checkpoint_that_was_damaged_is_an_error_in_one_line(tmp_path, kind):
    save_checkpoint(tmp_path, step=100, tensors=tensors(), state={"alive": [0, 1], "x": 0.5})
    path = tmp_path / f"checkpoint-00000100.{kind}"
    whole = path.read_bytes()
    for at in range(0, len(whole), 1 if kind == "json" else 7):
        for change in (1, 16):
            damaged = bytearray(whole)
            damaged[at] ^= change
            path.write_bytes(damaged)
            try:
                found = load_checkpoint(tmp_path)
            except RunError as error:
                message = str(error)
                assert message.startswith(f"{tmp_path.parent}: {tmp_path.name}/checkpoint-00000100")
                assert message.endswith("the part is then trained again from its first step.")
                assert message.isprintable()
            else:  # of the seal itself, only its end may go unseen
                assert kind == "json" and found.state == {"alive": [0, 1], "x": 0.5}
                assert found.tensors.keys() == tensors().keys()


def test_on_a_full_disk_the_older_checkpoint_stays(tiny_disk):
    part = tiny_disk / "a" / "part-0000"
    part.mkdir(parents=True)
    save_checkpoint(part, step=100, tensors=tensors(), state={})
    with pytest.raises(RunWriteError, match="no space left on device"):
        save_checkpoint(part, step=200, tensors={"w": torch.zeros(50_000)}, state={})
    assert load_checkpoint(part).step == 100
    assert len(names(part)) == 2
