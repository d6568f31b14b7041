"""Bytes of real files: the running Python's own standard library, or any text file or folder.

The first 90 % of the bytes are trained on, the last 10 % are held out; no window crosses the border.

Shape key: B batch, T position, N bytes, V vocab.
"""

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from attnscope.config import nearest
from attnscope.config.schema import DataConfig
from attnscope.data.batch import Batch, Reference
from attnscope.data.randomness import HELD_OUT, TRAIN, generator
from attnscope.errors import DataError

VOCAB_SIZE = 256
TRAIN_PART = 0.9
MAX_BYTES = 1 << 30


class Text:
    """Windows of bytes, drawn uniformly from the train part or the held-out part."""

    vocab_size = VOCAB_SIZE

    def __init__(
        self, data: bytes, config: DataConfig, *, seq_len: int, fingerprint: dict[str, object]
    ) -> None:
        """Use `read_text`."""
        tokens_N = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        cut = int(TRAIN_PART * len(tokens_N))
        self._train_N, self._held_out_N = tokens_N[:cut], tokens_N[cut:]
        self._config = config
        self._seq_len = seq_len
        self.reference = reference_losses(self._train_N, self._held_out_N)
        self.fingerprint = {
            **fingerprint,
            "sha256": hashlib.sha256(data).hexdigest(),
            "train_tokens": len(self._train_N),
            "held_out_tokens": len(self._held_out_N),
            "seed": config.seed,
        }

    def train_batch(self, step: int) -> Batch:
        """Windows of the train part."""
        return self._batch(self._train_N, TRAIN, step, self._seq_len)

    def val_batches(self, *, seq_len: int, count: int) -> list[Batch]:
        """Windows of the held-out part; shorter than asked for where it is shorter."""
        seq_len = min(seq_len, len(self._held_out_N) - 1)
        return [self._batch(self._held_out_N, HELD_OUT, step, seq_len) for step in range(count)]

    def prompt(self, length: int) -> Tensor:
        """The first bytes of the held-out part."""
        return self._held_out_N[:length].long()

    def decode(self, tokens: Tensor) -> str:
        """UTF-8; whatever is not becomes a replacement character."""
        return bytes(token % VOCAB_SIZE for token in tokens.tolist()).decode(errors="replace")

    def _batch(self, part_N: Tensor, stream: str, step: int, seq_len: int) -> Batch:
        starts_B1 = torch.randint(
            len(part_N) - seq_len,
            (self._config.batch_size, 1),
            generator=generator(self._config.seed, stream, step),
        )
        window_BT = part_N[starts_B1 + torch.arange(seq_len + 1)].long()
        return Batch(
            tokens_BT=window_BT[:, :-1].contiguous(),
            targets_BT=window_BT[:, 1:].contiguous(),
            visible_BS=None,
        )


def read_text(config: DataConfig, *, seq_len: int) -> Text:
    """Read the files that `data.source` names.

    Raises:
        DataError: nothing is there, it is no text, or it is too short for seq_len.
    """
    source = config.source
    if source == "stdlib":
        folder = Path(sysconfig.get_paths()["stdlib"])
        paths = sorted(folder.glob("*.py"), key=lambda path: path.name)
    else:
        paths = _files_of(Path(source))
    pieces = [piece for path in paths if (piece := _read(path, source)) is not None]
    data = b"".join(pieces)
    if not data:
        raise DataError(
            f"data.source = {source} has no text in it. Give a file or folder with text."
        )
    needed = 10 * (seq_len + 2)  # the held-out tenth must hold a window too
    if len(data) < needed:
        raise DataError(
            f"data.source = {source} has {len(data)} bytes, but model.seq_len = {seq_len} needs at least "
            f"{needed}: a tenth is held out and must hold a sequence. Use more text or a shorter seq_len."
        )
    return Text(data, config, seq_len=seq_len, fingerprint={"source": source, "files": len(pieces)})


def reference_losses(train_N: Tensor, held_out_N: Tensor) -> Reference:
    """Cross-entropy of the held-out bytes under counts of the train part with add-one smoothing.

    unigram: -mean ln (c(b) + 1) / (N + 256); bigram: -mean ln (c(a, b) + 1) / (c(a) + 256).
    """
    counts_V = torch.bincount(train_N, minlength=VOCAB_SIZE).double()
    log_p_V = ((counts_V + 1) / (counts_V.sum() + VOCAB_SIZE)).log()
    pairs_VV = _pair_counts(train_N)
    log_p_VV = ((pairs_VV + 1) / (pairs_VV.sum(dim=1, keepdim=True) + VOCAB_SIZE)).log()
    held_V = torch.bincount(held_out_N, minlength=VOCAB_SIZE).double()
    held_VV = _pair_counts(held_out_N)
    return Reference(
        uniform=float(torch.tensor(VOCAB_SIZE).double().log()),
        unigram=float(-(held_V * log_p_V).sum() / held_V.sum()),
        bigram=float(-(held_VV * log_p_VV).sum() / held_VV.sum()),
        optimum=None,
    )


def _pair_counts(tokens_N: Tensor) -> Tensor:
    # int32 is enough for 256 x 256 pairs and half as slow as int64.
    pairs_N = tokens_N[:-1].int() * VOCAB_SIZE + tokens_N[1:]
    counts = torch.bincount(pairs_N, minlength=VOCAB_SIZE**2)
    return counts.view(VOCAB_SIZE, VOCAB_SIZE).double()


def _files_of(path: Path) -> list[Path]:
    try:
        if path.is_dir():
            found = [
                each
                for each in path.rglob("*")
                if each.is_file()
                and not each.is_symlink()
                and not any(part.startswith(".") for part in each.relative_to(path).parts)
            ]
            return sorted(found, key=lambda each: each.relative_to(path).as_posix())
        if path.is_file():
            return [path]
        exists = path.exists()
    except OSError as error:
        raise DataError(f"data.source = {path} cannot be read: {error.strerror}.") from None
    if exists:
        raise DataError(f"data.source = {path} is neither a file nor a folder. Give a text file.")
    beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, [*beside, "stdlib", "markov", "recall", "modular"])
    raise DataError(
        f"data.source = {path}: no such file or folder.{hint} Sources: stdlib, markov, recall, modular, "
        "or a path."
    )


def _read(path: Path, source: str) -> bytes | None:
    """The bytes of a file; None for a binary one."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(
                f"data.source = {source}: {path} has more than {MAX_BYTES} bytes. Cut it."
            )
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"data.source = {source}: {path} cannot be read: {error.strerror}."
        ) from None
    return None if b"\0" in data else data
