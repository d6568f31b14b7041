"""Damage is never read as truth: whatever happens to the files of a run, its numbers are those recorded or it is said."""

import json
import random
import shutil

import pytest

from attnscope.config import parse_table
from attnscope.errors import RunError
from attnscope.runs.checksums import has_seal, is_as_sealed, sealed
from attnscope.runs.reader import open_run
from attnscope.runs.writer import RunWriter
from attnscope.train.run import resume_run, train_run
from tests.runs import made_up
from tests.train.small import PAIR, small

TABLES = ("steps", "heads", "layers", "params", "events")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A finished training of two members that was interrupted once: two segments, a checkpoint."""
    path = tmp_path_factory.mktemp("runs") / "r"
    asked = []
    config = parse_table(small(arm=PAIR, data={"source": "markov"}))
    stop = lambda: asked.append(1) or len(asked) > 8  # noqa: E731
    assert train_run(config, path, should_stop=stop) == "interrupted"
    assert resume_run(path) == "finished"
    return path


def seen_in(path):
    """Everything that a run says of itself, as something that can be compared."""
    run = open_run(path)
    tables = [getattr(run, name) for name in TABLES]
    return (
        [frame.astype(object).where(frame.notna(), None).to_dict("list") for frame in tables],
        [repr(member) for member in run.members],
        run.config,
        run.data,
    ), run


def flip(data, chance):
    at = chance.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]


def overwrite(data, chance):
    at = chance.randrange(len(data))
    return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]


def cut(data, chance):
    return data[: chance.randrange(len(data))]


def cut_out(data, chance):
    low, high = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    return data[:low] + data[high:]


def swap(data, chance):
    """Two neighbouring stretches change places."""
    low, middle, high = sorted(chance.randrange(len(data) + 1) for _ in range(3))
    return data[:low] + data[middle:high] + data[low:middle] + data[high:]


def zero(data, chance):
    """A sector that the disk lost."""
    at = chance.randrange(len(data))
    return data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :]


CHANGES = (flip, flip, flip, overwrite, cut, cut_out, swap, zero)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_read_from_damaged_files_is_what_was_written_or_the_damage_is_said(original, tmp_path, seed):
    whole, _ = seen_in(original)
    chance = random.Random(seed)
    files = sorted(path.relative_to(original) for path in original.rglob("*") if path.is_file())
    said = 0
    path = shutil.copytree(original, tmp_path / "r")
    for _ in range(120):
        victim = path / chance.choice(files)
        data = victim.read_bytes()
        change = chance.choice(CHANGES)
        victim.write_bytes(change(data, chance))
        try:
            found, run = seen_in(path)
        except RunError as error:
            said += 1
            assert victim.name == "run.json" and str(error).isprintable()
        else:
            said += bool(run.lost)
            assert run.lost or found == whole, f"{change.__name__} in {victim.name} was not said"
        victim.write_bytes(data)
    assert said > 60, "or hardly any of it was damage"
    assert seen_in(path)[1].lost == ()


@pytest.mark.parametrize("how", ["deleted", "emptied", "swapped with another run's"])
def test_a_table_that_is_gone_is_not_no_rows(original, tmp_path, how):
    other = made_up.new_run(tmp_path / "other")
    for first in (0, 8):
        part = other.part(0, first_step=first)
        made_up.fill(part, range(first, first + 8))
        part.finish("finished")
    names = [f"{table}-000{k}.arrow" for table in TABLES[:4] for k in (0, 1)]
    # The first events of the two runs are the same line.
    names += ["events-0001.jsonl"] + ["events-0000.jsonl"] * ("swapped" not in how)
    for name in names:
        path = shutil.copytree(original, tmp_path / "r")
        file = path / "part-0000" / name
        if how == "deleted":
            file.unlink()
        elif how == "emptied":
            file.write_bytes(b"")
        else:
            shutil.copy(other.path / "part-0000" / name, file)
        assert [note for note in open_run(path).lost if note.startswith(f"part-0000/{name}: ")]
        shutil.rmtree(path)


def test_a_table_cut_between_two_batches_is_said(tmp_path):
    part = made_up.new_run(tmp_path / "a").part(0)
    made_up.fill(part, range(4))
    file = part.path / "steps-0000.arrow"
    end = file.stat().st_size
    made_up.fill(part, range(4, 8))
    part.finish("finished")
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:end])
    run = open_run(tmp_path / "a")
    assert len(run.steps) == 8
    assert run.lost == (f"part-0000/steps-0000.arrow: has {end} bytes, but {whole} were written",)


def test_what_a_killed_part_had_before_it_was_gone_on_with_is_known_for_ever(tmp_path):
    writer = made_up.new_run(tmp_path / "a")
    first = writer.part(0)
    made_up.fill(first, range(4))
    first.close()  # killed
    second = writer.part(0, first_step=4)
    made_up.fill(second, range(4, 8))
    second.close()  # killed again
    assert open_run(writer.path).lost == ()
    (first.path / "heads-0000.arrow").unlink()
    (lost,) = open_run(writer.path).lost
    assert lost.startswith("part-0000/heads-0000.arrow: is gone or empty; ")
    third = writer.part(0, first_step=8)
    third.finish("finished")
    assert open_run(writer.path).lost == (lost,)


def test_steps_that_are_gone_from_a_killed_part_are_missed_by_the_other_tables(tmp_path):
    part = made_up.new_run(tmp_path / "a").part(0)
    file = part.path / "steps-0000.arrow"
    made_up.fill(part, range(4))
    end = file.stat().st_size
    made_up.fill(part, range(4, 8))
    part.close()
    assert open_run(tmp_path / "a").lost == ()
    file.write_bytes(file.read_bytes()[:end])
    assert open_run(tmp_path / "a").lost == tuple(
        f"part-0000/steps-0000.arrow: {table} go on to step 7, but steps end at 3"
        for table in ("heads", "layers", "params")
    )
    file.unlink()
    assert "heads go on to step 7, but steps end before the first" in open_run(tmp_path / "a").lost[0]


def test_training_that_went_on_after_records_were_lost_says_which(tmp_path):
    writer = made_up.new_run(tmp_path / "a")
    first = writer.part(0)
    made_up.fill(first, range(5))
    first.close()  # what else it had recorded, until its checkpoint at step 10, went with the disk
    second = writer.part(0, first_step=10)
    made_up.fill(second, range(10, 12))
    second.finish("finished")
    assert open_run(writer.path).lost == (
        "part-0000: the records of steps 5 to 9 are gone; training went on after them, at step 10",
    )


def test_a_run_json_that_was_changed_is_read_with_a_word_but_not_trained_on(original, tmp_path):
    path = shutil.copytree(original, tmp_path / "r")
    (path / "part-0000" / "end.json").unlink()
    text = (path / "run.json").read_text()
    assert '"lr": 0.001' in text
    (path / "run.json").write_text(text.replace('"lr": 0.001', '"lr": 0.003'))
    (lost,) = open_run(path).lost
    assert lost == (
        "run.json was changed after it was written: its checksum is another. Restore it, or, if that was meant, take its "
        "last entry, crc32, out"
    )
    before = sorted(p.name for p in (path / "part-0000").iterdir())
    for attempt in (RunWriter.resume, resume_run):
        with pytest.raises(RunError) as error:
            attempt(path)
        assert str(error.value) == f"{path}: {lost}."
    assert sorted(p.name for p in (path / "part-0000").iterdir()) == before
    (path / "run.json").write_text(json.dumps(made_up.unsealed(path / "run.json")))
    assert open_run(path).lost == () and open_run(path).config.optimizer.lr == 0.003


def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path):
    asked = []
    config = parse_table(small(data={"source": "markov"}))
    path = tmp_path / "r"
    train_run(config, path, should_stop=lambda: asked.append(1) or len(asked) > 8)
    for file in sorted((path / "part-0000").glob("checkpoint-*")):
        whole = file.read_bytes()
        middle = len(whole) // 2
        file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(RunError, match="then trained again from its first step"):
            resume_run(path)
        file.write_bytes(whole)
    assert resume_run(path) == "finished" and open_run(path).lost == ()


@pytest.mark.parametrize("text", ['{"a": 1}', '{\n "a": {"crc32": "01234567"}\n}', '{"ä": [1.5, null]}'])
def test_a_sealed_object_is_json_and_fits_its_checksum(text):
    for space in (" ", "\n "):
        whole = sealed(text, space=space)
        found = json.loads(whole)
        assert {k: v for k, v in found.items() if k != "crc32"} == json.loads(text)
        data = whole.encode()
        assert has_seal(data) and is_as_sealed(data) and is_as_sealed(data + b"\n")
        assert not has_seal(text.encode()) and is_as_sealed(text.encode())
        for at in range(len(text.encode()) - 2):
            assert not is_as_sealed(data[:at] + b"#" + data[at + 1 :])
