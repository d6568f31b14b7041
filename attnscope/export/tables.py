"""A run as one file per table: CSV or Parquet.

Columns are those of `attnscope.runs.layout`, `member` is the name. NaN and Inf are numbers in both: in CSV `nan`, `inf`
and `-inf`, and what is missing is empty. `fields` of an event is strict JSON.
"""

import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnscope.export.exported import Exported
from attnscope.export.folder import new_folder
from attnscope.export.parts import by_part
from attnscope.runs.layout import COLUMNS, schema_of, to_json
from attnscope.runs.reader import Run

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

TABLES = (*COLUMNS, "events")
ROWS = 1 << 17  # turned into Arrow at once; a row group of Parquet

# Opens a file for a schema; what it returns is a context with `write_batch`.
Opener = Callable[[Path, "pa.Schema"], Any]


def to_csv(run: Run, out: Path | None) -> Exported:
    """Write steps.csv, heads.csv, layers.csv, params.csv and events.csv.

    Raises:
        AttnscopeError: as `new_folder`.
    """
    import pyarrow.csv

    return _write(run, out, "csv", pyarrow.csv.CSVWriter)


def to_parquet(run: Run, out: Path | None) -> Exported:
    """Write steps.parquet, heads.parquet, layers.parquet, params.parquet and events.parquet.

    Raises:
        AttnscopeError: as `new_folder`.
    """
    import pyarrow.parquet

    return _write(run, out, "parquet", pyarrow.parquet.ParquetWriter)


def _write(run: Run, out: Path | None, target: str, opener: Opener) -> Exported:
    files = {table: f"{table}.{target}" for table in TABLES}
    schemas = {table: _schema(table) for table in TABLES}
    rows = dict.fromkeys(TABLES, 0)
    lost: list[str] = []
    with new_folder(run, target, out) as folder, ExitStack() as open_files:
        writers = {
            table: open_files.enter_context(opener(folder.scratch / files[table], schemas[table])) for table in TABLES
        }
        for part in by_part(run, lost):
            for table in TABLES:
                for batch in _batches(getattr(part, table), schemas[table]):
                    writers[table].write_batch(batch)
                    rows[table] += batch.num_rows
    is_plain = not set('"`$\\!') & set(str(folder.final))  # reads better between double quotes
    look = f"import pandas; print(pandas.read_{target}({str(folder.final / files['steps'])!r}))"
    return Exported(
        place=str(folder.final),
        counts={files[table]: count for table, count in rows.items()},
        unit="rows",
        lost=tuple(lost),
        next_command=f'python -c "{look}"' if is_plain else f"python -c {shlex.quote(look)}",
    )


def _schema(table: str) -> "pa.Schema":
    import pyarrow as pa

    if table == "events":
        kinds = {"part": "int32", "segment": "int32", "step": "int32", "member": "string"}
        kinds |= {"kind": "string", "fields": "string"}
    else:
        kinds = {field.name: str(field.type) for field in schema_of(table)} | {"member": "string"}
    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in kinds.items()])


def _batches(frame: "pd.DataFrame", schema: "pa.Schema") -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa

    for start in range(0, len(frame), ROWS):
        rows = frame.iloc[start : start + ROWS]
        arrays = [_array(rows[field.name], field.type) for field in schema]
        yield pa.record_batch(arrays, schema=schema)


def _array(column: "pd.Series[Any]", kind: "pa.DataType") -> "pa.Array":
    import pandas as pd
    import pyarrow as pa

    if column.name == "fields":
        return pa.array([to_json(fields) for fields in column], kind)
    if isinstance(column.dtype, pd.CategoricalDtype):
        names = pa.array(list(column.cat.categories), kind)
        codes_N = column.cat.codes.to_numpy()
        return pa.DictionaryArray.from_arrays(pa.array(codes_N, mask=codes_N < 0), names).cast(kind)
    values_N = column.to_numpy()
    if pa.types.is_integer(kind) and values_N.dtype.kind == "f":  # some files have no such column
        return pa.array(values_N, mask=np.isnan(values_N)).cast(kind)
    return pa.array(values_N, kind, from_pandas=False)  # NaN is not missing
