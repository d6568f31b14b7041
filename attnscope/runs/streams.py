"""One table's file: an Arrow IPC stream, batch by batch to bytes and back.

Reading trusts nothing. A file cut at any byte gives its complete batches; damaged ones are skipped; sizes that a batch
claims are checked before it is unpacked, its content before it is used.

A batch says in its metadata, under SEAL, which one of the file it is (from 0) and its CRC-32, eight hexadecimal digits
each: of header and body, taken with zeros in the checksum's own place. Any reader of Arrow passes over that.

Shape key: N rows.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnscope.errors import RunError
from attnscope.runs.checksums import hexadecimal
from attnscope.runs.foreign import printable
from attnscope.runs.layout import COLUMNS, KEYS, MAX_TABLE_BYTES, schema_of

if TYPE_CHECKING:
    import pyarrow as pa

END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"
SEAL = b"attnscope"
PREFIX = 8  # bytes of a message before its header
MANY_ROWS = 1 << 20
DIGITS = 8  # of the batch's number, then a blank, then those of the checksum

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableData:
    """What one file holds.

    Attributes:
        columns: every column of the layout, (N,); a text column holds positions in its `words`.
        words: the texts of each text column.
        lost: one line per thing that could not be read, without the file's name.
    """

    columns: Mapping[str, Array]
    words: Mapping[str, tuple[str, ...]]
    lost: tuple[str, ...] = ()


def encode_schema(table: str) -> bytes:
    """The bytes a stream begins with."""
    return bytes(schema_of(table).serialize())


def encode_batch(table: str, columns: Mapping[str, ArrayLike], *, number: int = 0) -> bytes:
    """The bytes of one batch, which follow the schema or another batch; `number` counts those before it."""
    import pyarrow as pa

    names = COLUMNS[table].keys()
    assert columns.keys() == names, f"{table}: {sorted(columns.keys() ^ names)} missing or unknown"
    schema = schema_of(table)
    with np.errstate(over="ignore"):  # a number too large for float32 is Inf
        arrays = [_array(columns[field.name], field.type) for field in schema]
    assert len({len(array) for array in arrays}) == 1, f"{table}: columns of unequal length"
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    with pa.ipc.new_stream(sink, schema, options=options) as stream:
        batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
        unsealed = f"{number:0{DIGITS}x} {hexadecimal(0)}"
        stream.write_batch(batch, custom_metadata={SEAL: unsealed.encode()})
    return sealed_message(sink.getvalue()[len(encode_schema(table)) : -len(END_OF_STREAM)])


def sealed_message(message: "pa.Buffer | bytes") -> bytes:
    """The bytes of a batch that has a seal, with the checksum that it should have."""
    made = bytearray(message)
    seal_at = _seal_in(bytes(made[PREFIX:]))
    assert seal_at is not None
    at = PREFIX + seal_at + DIGITS + 1
    made[at : at + DIGITS] = hexadecimal(0).encode()
    made[at : at + DIGITS] = hexadecimal(crc32(made[PREFIX:])).encode()
    return bytes(made)


def _array(values: ArrayLike, kind: "pa.DataType") -> "pa.Array":
    """One column. Not by `pa.array`, which imports pandas: 35 MB in the process that trains."""
    import pyarrow as pa

    if pa.types.is_string(kind):
        texts = [str(text).encode() for text in np.asarray(values)]
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
        return pa.StringArray.from_buffers(len(texts), pa.py_buffer(ends), pa.py_buffer(b"".join(texts)))
    values_N = np.ascontiguousarray(np.asarray(values).astype(kind.to_pandas_dtype()))
    return pa.Array.from_buffers(kind, len(values_N), [None, pa.py_buffer(values_N)])


def decode_table(data: bytes, table: str) -> TableData:
    """Read as much of a stream as there is. Never raises for what `data` holds."""
    import pyarrow as pa

    unreadable = (pa.ArrowException, ValueError, OSError, EOFError, MemoryError, struct.error)
    current = pa.ipc.MetadataVersion.V5  # older ones compress in a way that `_unpacked_bytes` does not see
    source = pa.BufferReader(data)
    messages = pa.ipc.MessageReader.open_stream(source)
    schema: pa.Schema | None = None
    usable: list[int] = []
    batches: dict[int, pa.RecordBatch] = {}
    unnumbered: list[pa.RecordBatch] = []
    lost: list[str] = []
    unpacked_bytes = damaged = end = 0
    try:
        while True:
            message = messages.read_next_message()
            end = source.tell()
            if schema is None:
                schema, usable = _schema_in(message, table, lost)
                continue
            try:
                if message.type != "record batch" or message.metadata_version != current:
                    raise ValueError(message.type)
                number = _checked_number(message)
                if number in batches:
                    raise ValueError("is there twice")
                unpacked_bytes += _unpacked_bytes(message)
                if unpacked_bytes > MAX_TABLE_BYTES:
                    raise RunError(f"unpacks to more than the {MAX_TABLE_BYTES} bytes that are read")
                batch = _batch_in(message, schema, usable)
                if number is None:
                    unnumbered.append(batch)
                else:
                    batches[number] = batch
            except unreadable:
                damaged += 1
    except StopIteration:
        end += len(END_OF_STREAM) if data[end:].startswith(END_OF_STREAM) else 0
    except RunError as refused:
        lost.append(str(refused))
        end = len(data)
    except unreadable:
        pass  # framing is gone: what follows `end` cannot be told apart
    if batches:  # then all were numbered
        damaged += len(unnumbered)
    good = [batches[number] for number in sorted(batches)] or unnumbered
    if damaged:
        lost.append(f"{damaged} of {damaged + len(good)} batches are damaged")
    if (missing := max(batches, default=-1) + 1 - len(batches) - damaged) > 0:
        lost.append(f"{missing} batches are missing between others")
    if end < len(data):
        lost.append(f"the last {len(data) - end} bytes are not a complete batch")
    batches.clear()
    return _joined(good, table, lost)


def _schema_in(message: "pa.Message", table: str, lost: list[str]) -> tuple["pa.Schema", list[int]]:
    """The stream's own columns, and where those stand that the layout knows.

    The schema is built anew from plain types: its claims about byte order, extension types and metadata are forgotten.
    """
    import pyarrow as pa

    if message.type != "schema":  # pyarrow takes our word for it, and crashes
        raise RunError("does not begin with a schema")
    columns = [(field.name, field.type) for field in pa.ipc.read_schema(message)]
    for name, kind in columns:
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or kind == pa.string()):
            raise RunError(f"column {printable(name)} is of type {printable(kind)}")
    usable: list[int] = []
    for field in schema_of(table):
        indices = [at for at, (name, _) in enumerate(columns) if name == field.name]
        if len(indices) == 1 and columns[indices[0]][1] == field.type:
            usable += indices
            continue
        if not indices and COLUMNS[table][field.name].is_later and all(name in COLUMNS[table] for name, _ in columns):
            continue  # beside a column that nobody knows it may be the one whose name was damaged
        problem = f"has {len(indices)} columns {field.name}"
        if len(indices) == 1:
            problem = f"column {field.name} is {columns[indices[0]][1]}, not {field.type}"
        if field.name in KEYS[table]:
            raise RunError(problem)
        lost.append(problem)
    return pa.schema([pa.field(name, kind) for name, kind in columns]), usable


def _batch_in(message: "pa.Message", schema: "pa.Schema", usable: Sequence[int]) -> "pa.RecordBatch":
    """The columns of one batch that the layout knows, checked."""
    import pyarrow as pa

    batch = pa.ipc.read_record_batch(message, schema).select(usable)
    batch.validate(full=True)
    if any(column.null_count for column in batch.columns):
        raise ValueError("a value is missing")
    return batch


def _checked_number(message: "pa.Message") -> int | None:
    """Which batch of its file this is; None for one of an attnscope that did not say.

    Raises:
        ValueError: it is not as it was written.
    """
    header = bytes(message.metadata)
    at = _seal_in(header)
    if at is None:
        return None
    number, said = header[at : at + DIGITS], header[at + DIGITS + 1 : at + 2 * DIGITS + 1]
    blank = header[: at + DIGITS + 1] + hexadecimal(0).encode() + header[at + 2 * DIGITS + 1 :]
    if int(said, 16) != crc32(message.body or b"", crc32(blank)):
        raise ValueError("the checksum is another")
    return int(number, 16)


def _seal_in(header: bytes) -> int | None:
    """Where the text stands that a message's metadata has under SEAL."""
    pairs_at = _field_at(header, _number("<I", header, 0), 4)
    if not pairs_at:
        return None
    pairs = pairs_at + _number("<I", header, pairs_at)
    for index in range(_number("<I", header, pairs)):
        slot = pairs + 4 + 4 * index
        pair = slot + _number("<I", header, slot)
        key, value = (at + _number("<I", header, at) for at in (_field_at(header, pair, field) for field in (0, 1)))
        if header[key + 4 : key + 4 + _number("<I", header, key)] == SEAL:
            if _number("<I", header, value) != 2 * DIGITS + 1:
                raise ValueError("no number and checksum")
            return value + 4
    return None


def _unpacked_bytes(message: "pa.Message") -> int:
    """What a batch claims to need in memory, read from its header before anything is unpacked.

    A small file can unpack to gigabytes, and pyarrow sets no limit. Each compressed buffer begins with its
    unpacked length. The header is a FlatBuffer (format/Message.fbs of Apache Arrow), which pyarrow has verified.
    """
    header, body = bytes(message.metadata), message.body or b""
    root = _number("<I", header, 0)
    batch_at = _field_at(header, root, 2)
    batch = batch_at + _number("<I", header, batch_at)
    if not _field_at(header, batch, 3):  # not compressed
        return len(body)
    buffers_at = _field_at(header, batch, 2)
    buffers = buffers_at + _number("<I", header, buffers_at)
    total = 0
    for index in range(_number("<I", header, buffers)):
        offset, length = struct.unpack_from("<qq", header, buffers + 4 + 16 * index)
        if length:
            total += max(_number("<q", body, offset), length, 0)
    return total


def _field_at(data: bytes, table: int, field: int) -> int:
    """Where a field of a FlatBuffer table is; 0 if it is not there."""
    layout = table - _number("<i", data, table)
    slot = 4 + 2 * field
    if slot >= _number("<H", data, layout):
        return 0
    offset = _number("<H", data, layout + slot)
    return table + offset if offset else 0


def _number(form: str, data: "bytes | pa.Buffer", at: int) -> int:
    number: int = struct.unpack_from(form, data, at)[0]
    return number


def _joined(batches: list["pa.RecordBatch"], table: str, lost: Sequence[str]) -> TableData:
    """One array per column. Takes the batches: each column is let go when it has been copied."""
    import pyarrow as pa

    n_rows = sum(batch.num_rows for batch in batches)
    there = batches[0].schema.names if batches else []
    pieces = {name: [batch.column(name) for batch in batches] for name in there}
    batches.clear()
    columns: dict[str, Array] = {}
    words: dict[str, tuple[str, ...]] = {}
    for name, column in COLUMNS[table].items():
        if column.kind == "string":
            columns[name], words[name] = _encoded(pieces.pop(name, []))
        elif name in there:
            columns[name] = np.concatenate([piece.to_numpy() for piece in pieces.pop(name)])
        else:
            empty = np.dtype(column.kind) if not n_rows else np.float32
            columns[name] = np.full(n_rows, np.nan).astype(empty)
        if n_rows > MANY_ROWS:  # Arrow keeps what it has freed, as much as the whole table
            pa.default_memory_pool().release_unused()
    return TableData(columns=columns, words=words, lost=tuple(lost))


def _encoded(arrays: Sequence["pa.Array"]) -> tuple[Array, tuple[str, ...]]:
    """Texts as positions in the list of those that occur, made fit to show."""
    import pyarrow as pa

    if not arrays:
        return np.empty(0, dtype=np.int32), ()
    encoded = pa.chunked_array(arrays).dictionary_encode().unify_dictionaries()
    codes_N = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
    shown = [printable(word) for word in encoded.chunk(0).dictionary.to_pylist()]
    position = {word: index for index, word in enumerate(dict.fromkeys(shown))}
    return np.array([position[word] for word in shown], dtype=np.int32)[codes_N], tuple(position)
