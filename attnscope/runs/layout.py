"""The format of a run directory, whole: names of files, columns of tables, what run.json holds.

    <run>/run.json  config.toml  report/
    <run>/part-0000/  steps-0000.arrow  heads-0000.arrow  layers-0000.arrow  params-0000.arrow  events-0000.jsonl
                      checkpoint-00000100.safetensors  checkpoint-00000100.json  end.json

One part has one writer at a time; while somebody writes a run or a part, writer-0000.json in its folder says who (holder).
The four digits of a table are its segment: a resumed part opens new files and never changes
old ones. Tables are Arrow IPC streams, compressed with lz4, without dictionaries, so that every batch stands alone.
JSON is strict: a number that is not finite is one of the texts NaN, Infinity and -Infinity.

Damage is said, never read as truth: batches, lines of events and JSON objects carry checksums (streams, checksums); end.json
lists under `files` the length and checksum of every table and events file that its part wrote, and the event `start` of a
segment those of the segments before it.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1

RUN_FILE = "run.json"
CONFIG_FILE = "config.toml"
END_FILE = "end.json"
REPORT_FOLDER = "report"
PART = re.compile(r"part-(?P<part>\d{4})")
TABLE_FILE = re.compile(r"(?P<table>steps|heads|layers|params)-(?P<segment>\d{4})\.arrow")
EVENTS_FILE = re.compile(r"(?P<table>events)-(?P<segment>\d{4})\.jsonl")
CHECKPOINT_FILE = re.compile(r"checkpoint-(?P<step>\d{8})\.(?P<kind>json|safetensors)")

KINDS = ("train", "watch")
END_STATUSES = ("finished", "interrupted", "failed")

# What a reader accepts. Larger files are refused: a small damaged or hostile file must not exhaust the memory.
MAX_JSON_BYTES = 64 << 20  # run.json and the JSON of a checkpoint
MAX_EVENTS_BYTES = 256 << 20
MAX_TABLE_BYTES = 4 << 30  # of one file, and of what it unpacks to
MAX_CHECKPOINT_BYTES = 64 << 30
MAX_MEMBERS = 100_000
MAX_PART = 9_999
MAX_INDEX = 32_767  # of a member within its part: int16


def part_folder(part: int) -> str:
    """The folder of a part."""
    return f"part-{part:04d}"


def table_file(table: str, segment: int) -> str:
    """The file of a table's segment; `events` is one JSON object per line, the others are Arrow."""
    return f"{table}-{segment:04d}.{'jsonl' if table == 'events' else 'arrow'}"


def segment_of(name: str) -> int:
    """The segment that a file belongs to; -1 for what is neither a table nor events."""
    match = TABLE_FILE.fullmatch(name) or EVENTS_FILE.fullmatch(name)
    return int(match["segment"]) if match else -1


def checkpoint_file(step: int, kind: str) -> str:
    """The `safetensors` or `json` half of a checkpoint."""
    return f"checkpoint-{step:08d}.{kind}"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    Attributes:
        kind: a name that numpy and Arrow share, or string.
        unit: of its numbers; empty where they have none.
        meaning: how it is defined.
        source: who measured it first.
        is_later: whether runs of older versions have no such column, so that its absence is no damage.
    """

    kind: str
    unit: str
    meaning: str
    source: str = ""
    is_later: bool = False


_STEP = Column("int32", "optimizer updates", "updates already done: step 0 is the untouched model")
_MEMBER = Column("int16", "", "index within the part; the reader turns it into the member's name")
_LAYER = Column("int16", "", "layer, counted from 0")

STEPS = {
    "step": _STEP,
    "member": _MEMBER,
    "loss": Column("float32", "nats per token", "mean cross-entropy of the training batch"),
    "val_loss": Column("float32", "nats per token", "mean cross-entropy on held-out data; NaN where not evaluated"),
    "grad_norm": Column("float32", "", "L2 norm of the whole gradient, before clipping"),
    "clip_factor": Column("float32", "", "what clipping multiplied the gradient by; 1 = nothing"),
    "lr": Column("float32", "", "learning rate of this update"),
    "loss_scale": Column(
        "float32",
        "",
        "what the loss was multiplied by against underflow",
        "Micikevicius et al. 2018",
    ),
    "tokens": Column("int64", "tokens", "tokens seen so far, this step's included"),
    "step_ms": Column("float32", "ms", "wall time of the step on the host"),
    "output_logit_max": Column("float32", "nats", "largest LM-head logit", "Chowdhery et al. 2022 (PaLM)"),
    "log_z": Column(
        "float32",
        "nats",
        "mean log-partition of the output softmax",
        "Chowdhery et al. 2022 (PaLM); Wortsman et al. 2023",
    ),
    "activation_rms_max": Column("float32", "", "largest RMS of the residual stream over layers"),
    "token_cosine": Column(
        "float32",
        "-1 to 1",
        "the last layer's token_cosine of the layers table",
        "Dong et al. 2021",
    ),
}

HEADS = {
    "step": _STEP,
    "member": _MEMBER,
    "layer": _LAYER,
    "head": Column("int16", "", "head, counted from 0"),
    "rows": Column("int32", "query rows", "rows measured"),
    "rows_left_out": Column("int32", "query rows", "rows with fewer than two visible keys"),
    "entropy": Column("float32", "nats", "mean of -sum p ln p", "Zhai et al. 2023"),
    "entropy_ratio": Column(
        "float32", "0 to 1", "mean of entropy / ln n over n visible keys; 0 = one-hot, 1 = uniform"
    ),
    "max_prob": Column("float32", "0 to 1", "mean of the largest attention weight"),
    "saturated": Column("float32", "share of rows", "rows whose largest weight is above 0.99"),
    "logit_std": Column(
        "float32",
        "nats",
        "standard deviation of attn_logits over visible keys, RMS over rows",
        "Vaswani et al. 2017",
    ),
    "max_logit": Column(
        "float32",
        "nats",
        "largest attn_logit",
        "Dehghani et al. 2023; Wortsman et al. 2023; Kimi K2 2025",
    ),
    "max_logit_bound": Column("float32", "nats", "scale * max |q| * max |k| over all rows, no attn_logit is above it"),
    "logits_over_5": Column("float32", "share of visible logits", "attn_logits further than 5 from their row's mean"),
    "softmax_gain": Column("float32", "0 to 1", "mean of 1 - sum p^2: at 0 no gradient reaches q and k"),
    "sink": Column("float32", "0 to 1", "mean attention weight on the first visible key", "Gu et al. 2024"),
    "attn_form_update_ratio": Column(
        "float32",
        "",
        "how far the update moves W_q W_k^T, to first order, by its norm; NaN where W_q and W_k are not known",
        "arXiv 2606.28116",
        is_later=True,
    ),
}

LAYERS = {
    "step": _STEP,
    "member": _MEMBER,
    "layer": _LAYER,
    "activation_rms": Column("float32", "", "RMS of the residual stream after the layer"),
    "token_cosine": Column(
        "float32",
        "-1 to 1",
        "mean cosine similarity of token states after the layer, over up to four sequences; 1 = rank collapse",
        "Dong et al. 2021",
    ),
}

PARAMS = {
    "step": _STEP,
    "member": _MEMBER,
    "layer": Column("int16", "", "layer, counted from 0; -1 for what belongs to no layer"),
    "group": Column("string", "", "q, k, v, o, mlp_in, mlp_out, norm, embedding, head, ..."),
    "grad_norm": Column("float32", "", "L2 norm of the group's gradient, before clipping"),
    "weight_norm": Column("float32", "", "L2 norm of the weights before the update"),
    "update_norm": Column("float32", "", "L2 norm of the update"),
    "update_ratio": Column("float32", "", "update_norm / weight_norm"),
    "grad_max": Column("float32", "", "largest absolute entry of the gradient"),
    "nonfinite": Column("int64", "entries", "NaN and Inf in the gradient"),
}

COLUMNS: Mapping[str, Mapping[str, Column]] = {"steps": STEPS, "heads": HEADS, "layers": LAYERS, "params": PARAMS}
KEYS: Mapping[str, tuple[str, ...]] = {
    "steps": ("step", "member"),
    "heads": ("step", "member", "layer", "head"),
    "layers": ("step", "member", "layer"),
    "params": ("step", "member", "layer", "group"),
}


@cache
def schema_of(table: str) -> "pa.Schema":
    """The Arrow schema of a table."""
    import pyarrow as pa

    return pa.schema(
        [pa.field(name, pa.type_for_alias(column.kind), nullable=False) for name, column in COLUMNS[table].items()]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberEntry:
    """A member as run.json names it: `index` is its position in the tables of its part."""

    name: str
    part: int
    index: int
    settings: dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What run.json holds.

    Attributes:
        schema_version: of the whole directory.
        kind: train, or watch: recorded in code that is not attnscope's.
        created: time in UTC, ISO 8601.
        command: the command line, word by word.
        config: the resolved config as `attnscope.config.parse_table` reads it; empty where training was watched.
        members: in the order in which they are shown.
        environment: versions of python, torch and attnscope, the device.
        data: fingerprint and, under `reference`, the losses to compare with (`unigram` tells stalled from trained);
            under `parts`, by number, the same for parts whose data is different.
    """

    schema_version: int
    kind: str
    created: str
    command: tuple[str, ...]
    config: dict[str, object]
    members: tuple[MemberEntry, ...]
    environment: dict[str, object]
    data: dict[str, object]


def to_json(value: object, *, indent: int | None = None) -> str:
    """Strict JSON of mappings, sequences, texts, numbers (numpy's too), booleans and None."""
    return json.dumps(_without_special(value), allow_nan=False, indent=indent)


def with_special(value: object) -> object:
    """What `to_json` was given: the texts NaN, Infinity and -Infinity become numbers again."""
    if isinstance(value, str):
        return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
    if isinstance(value, dict):
        return {key: with_special(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_special(item) for item in value]
    return value


def _without_special(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _without_special(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_special(item) for item in value]
    return value
