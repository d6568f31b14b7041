"""What watching costs a training loop that is not ours: nanoGPT's shape, on the CPU, two threads.

Shape key: B batch, T position, D d_model.
"""

import itertools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnscope.bench.overhead import THREADS
from attnscope.bench.timing import Ratio, ratio
from attnscope.watch.attach import watch_model
from attnscope.watch.settings import EVERY
from attnscope.watch.step import FIRST

D_MODEL, N_LAYERS, N_HEADS, SEQ_LEN, BATCH_SIZE, VOCAB_SIZE = 256, 4, 8, 256, 8, 256
STEPS = 10  # of each competitor in one round; a multiple of every cadence
UNWATCHED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchOverhead:
    """Step times over those of the same loop without attnscope.

    Attributes:
        every_step: attention and parameters measured at every step.
        default: at the default cadence.
        unwatched: the loop against itself.
        every: the default cadence.
        step_ms: of the unwatched loop, median.
    """

    every_step: Ratio
    default: Ratio
    unwatched: Ratio
    every: int
    step_ms: float


def measure_watching(*, rounds: int = 16) -> WatchOverhead:
    """Measure; takes about four minutes for 16 rounds. Sets the number of threads of this process to two."""
    torch.set_num_threads(THREADS)
    loop = _NanoGPTLoop()
    for _ in range(3):
        loop.step()
    cadences = {"off": UNWATCHED, "again": UNWATCHED, "every": 1, "default": EVERY}
    seconds: dict[str, list[float]] = {name: [] for name in cadences}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            names = list(cadences)
            for name in names if number % 2 else reversed(names):
                path = Path(folder) / f"{name}-{number}"
                seconds[name].append(loop.run(cadences[name], path))
    return WatchOverhead(
        every_step=ratio(seconds["every"], seconds["off"], together=1),
        default=ratio(seconds["default"], seconds["off"], together=1),
        unwatched=ratio(seconds["again"], seconds["off"], together=1),
        every=EVERY,
        step_ms=1000 * sorted(seconds["off"])[rounds // 2] / STEPS,
    )


class _NanoGPTLoop:
    """Forward, cross-entropy, backward, clipping, AdamW, as train.py of nanoGPT has them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._model = _GPT()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        self._batches = itertools.cycle(torch.randint(0, VOCAB_SIZE, (4, BATCH_SIZE, SEQ_LEN + 1)).unbind())

    def run(self, every: int, path: Path) -> float:
        """Seconds of STEPS steps, watched at this cadence; beginning and ending are not counted, nor the first steps."""
        if every == UNWATCHED:
            return self._timed()
        with watch_model(self._model, self._optimizer, path, every=every):
            if every > 1:  # the first ones are measured at every step
                for _ in range(FIRST):
                    self.step()
            return self._timed()

    def step(self) -> None:
        """One update."""
        tokens_BT = next(self._batches)
        logits_BTV = self._model(tokens_BT[:, :-1])
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()

    def _timed(self) -> float:
        began = time.perf_counter()
        for _ in range(STEPS):
            self.step()
        return time.perf_counter() - began


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
        self.c_attn = nn.Linear(D_MODEL, 3 * D_MODEL)
        self.c_proj = nn.Linear(D_MODEL, D_MODEL)
        self.mlp = nn.Sequential(nn.Linear(D_MODEL, 4 * D_MODEL), nn.GELU(), nn.Linear(4 * D_MODEL, D_MODEL))

    def forward(self, x_BTD: Tensor) -> Tensor:
        qkv = self.c_attn(self.ln_1(x_BTD)).split(D_MODEL, dim=2)
        q, k, v = (y.unflatten(-1, (N_HEADS, -1)).transpose(1, 2) for y in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.c_proj(y.transpose(1, 2).flatten(2))
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class _GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB_SIZE, D_MODEL)
        self.wpe = nn.Embedding(SEQ_LEN, D_MODEL)
        self.h = nn.ModuleList(_Block() for _ in range(N_LAYERS))
        self.ln_f = nn.LayerNorm(D_MODEL)
        self.lm_head = nn.Linear(D_MODEL, VOCAB_SIZE, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.wte(tokens_BT) + self.wpe(torch.arange(tokens_BT.shape[1]))
        for block in self.h:
            x_BTD = block(x_BTD)
        return self.lm_head(self.ln_f(x_BTD))
