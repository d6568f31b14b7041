"""One Arrow file: what goes in comes out, cut or damaged or hostile as it may be."""

import io
import itertools
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnscope.runs import streams
from attnscope.runs.layout import COLUMNS, schema_of
from attnscope.runs.streams import (
    END_OF_STREAM,
    SEAL,
    decode_table,
    encode_batch,
    encode_schema,
    sealed_message,
)
from tests.runs import made_up

TABLES = tuple(COLUMNS)


def stream_of(table, n_batches, *, steps_each=2, members=(0, 1)):
    """A stream, and where its batches end."""
    data = encode_schema(table)
    ends = [len(data)]
    for i in range(n_batches):
        steps = np.arange(steps_each) + i * steps_each
        data += encode_batch(table, made_up.columns(table, steps, members=members, seed=i), number=i)
        ends.append(len(data))
    return data, ends


def altered(table, change):
    """A stream whose batches went through `change`, with columns and types that need not be ours."""
    columns = made_up.columns(table, [0, 1])
    stream = encode_schema(table) + encode_batch(table, columns) + END_OF_STREAM
    batch = pa.ipc.open_stream(stream).read_next_batch()
    batch = change(batch)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue()


def with_column(batch, name, array):
    at = batch.schema.get_field_index(name)
    names, arrays = list(batch.schema.names), list(batch.columns)
    arrays[at] = array
    return pa.record_batch(arrays, names=names)


@pytest.mark.parametrize("table", TABLES)
def test_every_value_comes_back_in_its_type(table):
    columns = made_up.columns(table, range(5), members=(0, 1))
    read = decode_table(encode_schema(table) + encode_batch(table, columns), table)
    assert read.lost == ()
    for name, column in COLUMNS[table].items():
        if column.kind == "string":
            words = np.array(read.words[name], dtype=object)
            assert list(words[read.columns[name]]) == list(columns[name])
        else:
            assert read.columns[name].dtype == column.kind
            assert (read.columns[name] == np.asarray(columns[name]).astype(column.kind)).all()


def test_nan_and_inf_are_data():
    columns = made_up.columns("steps", range(4))
    columns["loss"] = np.array([np.nan, np.inf, -np.inf, 1e300])
    read = decode_table(encode_schema("steps") + encode_batch("steps", columns), "steps")
    np.testing.assert_array_equal(read.columns["loss"], [np.nan, np.inf, -np.inf, np.inf])


@pytest.mark.parametrize("table", TABLES)
def test_a_file_cut_at_every_byte_is_the_prefix_of_its_complete_batches(table, monkeypatch):
    data, ends = stream_of(table, 6, steps_each=1, members=(0,))
    whole = decode_table(data, table)
    rows_each = len(whole.columns["step"]) // 6
    unpacked = {}
    batch_in = streams._batch_in

    def once(message, *rest):  # the same message thousands of times: unpack it once
        key = bytes(message.metadata), bytes(message.body)
        if key not in unpacked:
            unpacked[key] = batch_in(message, *rest)
        return unpacked[key]

    monkeypatch.setattr(streams, "_batch_in", once)
    for cut in range(len(data) + 1):
        read = decode_table(data[:cut], table)
        n = rows_each * sum(end <= cut for end in ends[1:])
        for name, column in read.columns.items():
            assert np.array_equal(column, whole.columns[name][:n]), (cut, name)
        torn = cut - max([end for end in ends if end <= cut], default=0)
        assert read.lost == ((f"the last {torn} bytes are not a complete batch",) if torn else ())
    assert len(unpacked) == 6


def test_a_stream_that_was_closed_properly_has_lost_nothing():
    data, _ = stream_of("heads", 2)
    assert decode_table(data + END_OF_STREAM, "heads").lost == ()
    after = decode_table(data + END_OF_STREAM + b"more", "heads")
    assert after.lost == ("the last 4 bytes are not a complete batch",)


def test_other_tools_read_the_file():
    data, _ = stream_of("params", 3)
    table = pa.ipc.open_stream(data + END_OF_STREAM).read_all()
    assert table.schema == schema_of("params")
    assert table.num_rows == 3 * 2 * 2 * len(made_up.GROUPS)


@pytest.mark.parametrize("table", TABLES)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_raise(table, data):
    stream, _ = stream_of(table, 3)
    damaged = bytearray(stream)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    read = decode_table(bytes(damaged), table)
    lengths = {len(column) for column in read.columns.values()}
    assert len(lengths) == 1 and read.columns.keys() == COLUMNS[table].keys()
    for name, words in read.words.items():
        assert ((read.columns[name] >= 0) & (read.columns[name] < max(len(words), 1))).all()


@settings(max_examples=60, deadline=None)
@given(noise=st.binary(max_size=400))
def test_noise_never_raises(noise):
    assert len(decode_table(noise, "steps").columns["step"]) == 0
    decode_table(encode_schema("steps") + noise, "steps")


def test_a_damaged_batch_is_skipped_and_the_others_are_kept():
    data, ends = stream_of("params", 3)
    damaged = bytearray(data)
    for at in range(ends[2] - 300, ends[2]):  # the compressed body of the second batch
        damaged[at] = 0xAA
    read = decode_table(bytes(damaged), "params")
    assert read.lost == ("1 of 3 batches are damaged",)
    assert sorted(set(read.columns["step"])) == [0, 1, 4, 5]


@pytest.mark.parametrize("table", TABLES)
def test_no_flipped_bit_is_read_as_truth(table):
    stream, _ = stream_of(table, 3)
    whole = decode_table(stream, table)
    rng = np.random.default_rng(0)
    for at in rng.permutation(8 * len(stream))[:1500]:
        damaged = bytearray(stream)
        damaged[at // 8] ^= 1 << at % 8
        read = decode_table(bytes(damaged), table)
        same = all(np.array_equal(read.columns[name], x) for name, x in whole.columns.items())
        assert read.lost or (same and read.words == whole.words), f"bit {at}"


@pytest.mark.parametrize(
    ("order", "steps", "lost"),
    [
        ([0, 2, 3], [0, 2, 3], ("1 batches are missing between others",)),
        ([1, 2], [1, 2], ("1 batches are missing between others",)),
        ([0, 1, 1, 2], [0, 1, 2], ("1 of 4 batches are damaged",)),
        ([0, 2, 1, 3], [0, 1, 2, 3], ()),
    ],
)
def test_batches_that_were_taken_out_repeated_or_swapped(order, steps, lost):
    stream, ends = stream_of("steps", 4, steps_each=1, members=(0,))
    batches = [stream[low:high] for low, high in itertools.pairwise(ends)]
    read = decode_table(encode_schema("steps") + b"".join(batches[at] for at in order), "steps")
    assert list(read.columns["step"]) == steps and read.lost == lost


def test_a_batch_whose_seal_was_cut_off_is_damaged_where_others_have_one():
    stream, ends = stream_of("steps", 3)
    broken = stream[ends[1] : ends[2]].replace(SEAL, b"attn-cope")
    read = decode_table(stream[: ends[1]] + broken + stream[ends[2] :], "steps")
    assert sorted(set(read.columns["step"])) == [0, 1, 4, 5]
    assert read.lost == ("1 of 3 batches are damaged",)


def test_a_batch_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(monkeypatch):
    monkeypatch.setattr(streams, "MAX_TABLE_BYTES", 1_000_000)
    columns = {name: np.zeros(200_000) for name in COLUMNS["heads"]}
    bomb = encode_batch("heads", columns)
    assert len(bomb) < 60_000  # of 11.6 MB
    monkeypatch.setattr(pa.ipc, "read_record_batch", lambda *_: pytest.fail("was unpacked"))
    read = decode_table(encode_schema("heads") + bomb, "heads")
    assert len(read.columns["step"]) == 0
    assert read.lost == ("unpacks to more than the 1000000 bytes that are read",)


def test_many_batches_that_are_large_together_are_read_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(streams, "MAX_TABLE_BYTES", 20_000)
    columns = {name: np.zeros(100) for name in COLUMNS["steps"]}
    batches = [encode_batch("steps", columns, number=number) for number in range(10)]
    read = decode_table(encode_schema("steps") + b"".join(batches), "steps")
    assert 100 <= len(read.columns["step"]) < 1000
    assert read.lost == ("unpacks to more than the 20000 bytes that are read",)


def test_a_batch_claiming_an_absurd_unpacked_length_is_refused():
    schema, batch = (
        encode_schema("steps"),
        bytearray(encode_batch("steps", made_up.columns("steps", range(50)))),
    )
    body_at = len(batch) - len(pa.ipc.read_message(bytes(batch)).body)
    batch[body_at : body_at + 8] = struct.pack("<q", 2**61)
    read = decode_table(schema + sealed_message(batch), "steps")
    assert read.lost == ("unpacks to more than the 4294967296 bytes that are read",)


def test_a_batch_that_claims_less_than_nothing_does_not_make_room_for_others(monkeypatch):
    monkeypatch.setattr(streams, "MAX_TABLE_BYTES", 20_000)
    columns = {name: np.zeros(100) for name in COLUMNS["steps"]}
    good = encode_batch("steps", columns)
    bad = bytearray(good)
    body_at = len(good) - len(pa.ipc.read_message(good).body)
    for at in range(8, body_at - 15, 8):  # the header's pairs of offset and length
        offset, length = struct.unpack_from("<qq", good, at)
        inside = 0 < offset < offset + length <= len(good) - body_at
        if inside and good[body_at + offset :][:8] == struct.pack("<q", 400):  # 100 x float32
            bad[at + 8 : at + 16] = struct.pack("<q", -(2**40))
            bad[body_at + offset : body_at + offset + 8] = struct.pack("<q", -(2**40))
    assert bad != good
    batches = [encode_batch("steps", columns, number=number) for number in range(1, 11)]
    stream = encode_schema("steps") + sealed_message(bad) + b"".join(batches)
    read = decode_table(stream, "steps")
    assert len(read.columns["step"]) < 1000
    assert "unpacks to more than the 20000 bytes that are read" in read.lost


def test_batches_of_an_older_metadata_version_are_refused():
    batch = pa.ipc.open_stream(
        encode_schema("steps") + encode_batch("steps", made_up.columns("steps", [0])) + END_OF_STREAM
    ).read_next_batch()
    sink = io.BytesIO()
    old = pa.ipc.IpcWriteOptions(metadata_version=pa.ipc.MetadataVersion.V4)
    with pa.ipc.new_stream(sink, batch.schema, options=old) as stream:
        stream.write_batch(batch)
    read = decode_table(sink.getvalue(), "steps")
    assert read.lost == ("1 of 1 batches are damaged",)


def test_a_missing_column_is_nan_and_said():
    read = decode_table(altered("steps", lambda b: b.drop_columns(["log_z", "tokens"])), "steps")
    assert np.isnan(read.columns["log_z"]).all() and len(read.columns["log_z"]) == 2
    assert np.isnan(read.columns["tokens"]).all()
    assert read.lost == ("has 0 columns tokens", "has 0 columns log_z")


def test_a_column_that_older_versions_did_not_write_is_nan_and_no_damage():
    read = decode_table(altered("heads", lambda b: b.drop_columns(["attn_form_update_ratio"])), "heads")
    assert np.isnan(read.columns["attn_form_update_ratio"]).all() and len(read.columns["sink"])
    assert np.isfinite(read.columns["sink"]).any()
    assert read.lost == ()


def test_an_unknown_column_is_ignored():
    read = decode_table(altered("steps", lambda b: b.append_column("mood", pa.array(["good", "bad"]))), "steps")
    assert read.lost == () and read.columns.keys() == COLUMNS["steps"].keys()


def test_a_column_of_another_type_is_nan_and_said():
    read = decode_table(altered("steps", lambda b: with_column(b, "loss", pa.array([1, 2], pa.int64()))), "steps")
    assert np.isnan(read.columns["loss"]).all()
    assert read.lost == ("column loss is int64, not float",)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda b: b.drop_columns(["member"]), "has 0 columns member"),
        (
            lambda b: with_column(b, "step", pa.array(["0", "1"])),
            "column step is string, not int32",
        ),
        (lambda b: b.append_column("step", b.column("step")), "has 2 columns step"),
        (lambda b: b.append_column("x", pa.nulls(2)), "column x is of type null"),
        (
            lambda b: b.append_column("\x1b[31m", pa.array(["a", "b"]).dictionary_encode()),
            "column �[31m is of type dictionary<values=string, indices=int32, ordered=0>",
        ),
    ],
)
def test_a_table_without_usable_keys_or_with_strange_types_is_refused(change, lost):
    read = decode_table(altered("steps", change), "steps")
    assert len(read.columns["step"]) == 0 and read.lost == (lost,)


def test_a_text_that_is_none_is_damage():
    offsets, letters = np.arange(4, dtype=np.int32), b"q\xffk"
    groups = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(offsets), pa.py_buffer(letters)])
    stream = altered("params", lambda b: with_column(b.slice(0, 3), "group", groups))
    assert decode_table(stream, "params").lost == ("1 of 1 batches are damaged",)


def test_a_stream_that_begins_with_a_batch_is_refused():
    batch = encode_batch("steps", made_up.columns("steps", [0]))
    assert decode_table(batch, "steps").lost == ("does not begin with a schema",)


def test_an_empty_value_is_damage():
    nulls = pa.array([1.0, None], pa.float32())
    read = decode_table(altered("steps", lambda b: with_column(b, "loss", nulls)), "steps")
    assert read.lost == ("1 of 1 batches are damaged",)


def test_groups_are_made_fit_to_show_and_stay_apart_from_each_other():
    columns = made_up.columns("params", [0])
    columns["group"] = np.array(["q\x1b[2J", "q\x1b[2J", "k"], dtype=object)
    read = decode_table(encode_schema("params") + encode_batch("params", columns), "params")
    assert read.words["group"] == ("q�[2J", "k")
    assert list(read.columns["group"]) == [0, 0, 1]


def test_an_extension_type_is_not_looked_up():
    field = pa.field(
        "loss",
        pa.float32(),
        metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": b"cos\nsystem\n",
        },
    )

    def change(batch):
        fields = [field if each.name == "loss" else each for each in batch.schema]
        return pa.record_batch(batch.columns, schema=pa.schema(fields))

    read = decode_table(altered("steps", change), "steps")
    assert len(read.columns["loss"]) == 2 and read.lost == ()


@pytest.mark.parametrize("spoil", ["missing", "unknown", "unequal"])
def test_our_own_mistakes_are_asserted(spoil):
    columns = made_up.columns("steps", range(3))
    if spoil == "missing":
        del columns["loss"]
    elif spoil == "unknown":
        columns["lose"] = columns["loss"]
    else:
        columns["loss"] = columns["loss"][:2]
    with pytest.raises(AssertionError):
        encode_batch("steps", columns)


def test_a_thousand_steps_take_at_most_three_megabytes():
    """1 member, 4 layers x 4 heads, 4 x 7 + 2 groups, batches of 10 steps, numbers as noisy as float32 can be."""
    rng = np.random.default_rng(0)
    groups = [*("embedding", "head"), *(["q", "k", "v", "o", "mlp_in", "mlp_out", "norm"] * 4)]
    size = 0
    for table, each in {"steps": 1, "heads": 16, "layers": 4, "params": 30}.items():
        size += len(encode_schema(table) + END_OF_STREAM)
        for start in range(0, 1000, 10):
            n = 10 * each
            columns = {
                name: rng.standard_normal(n) if column.kind == "float32" else np.zeros(n)
                for name, column in COLUMNS[table].items()
            }
            columns["step"] = np.repeat(np.arange(start, start + 10), each)
            if table == "heads":
                columns["layer"], columns["head"] = np.arange(n) // 4 % 4, np.arange(n) % 4
            if table == "layers":
                columns["layer"] = np.arange(n) % 4
            if table == "params":
                columns["layer"] = np.tile([-1, -1, *np.repeat(np.arange(4), 7)], 10)
                columns["group"] = np.array(groups * 10, dtype=object)
            size += len(encode_batch(table, columns))
    assert size <= 3_000_000
