"""Generated tasks whose best possible loss is known: a Markov chain, associative recall, modular addition.

Shape key: B batch, T position, V vocab, P problems or pairs in a sequence.
"""

import math

import torch
from torch import Tensor

from attnscope.config.schema import DataConfig
from attnscope.data.batch import IGNORE, Batch, Reference
from attnscope.data.randomness import HELD_OUT, STRUCTURE, TRAIN, generator
from attnscope.errors import DataError

MARKOV_SYMBOLS = 64
MARKOV_SPREAD = 2.0  # standard deviation of the log-odds of a transition

RECALL_KEYS = 32
RECALL_VALUES = 32
RECALL_SIDES = 4  # one in four is held out; divides RECALL_VALUES

MODULUS = 97
PLUS, EQUALS = MODULUS, MODULUS + 1
PROBLEM = 5  # tokens of "a + b = c"
MODULAR_TRAIN_PART = 0.8


class Markov:
    """A chain of order 1 over 64 symbols: the next symbol depends on the last one alone.

    Its entropy rate is -Σ π(a) Σ P(a, b) ln P(a, b) with the stationary distribution π: the optimum, and what a bigram
    model reaches. Train and held-out sequences come from streams of their own: the chain is the same, the draws are
    independent, so only sequences of a few symbols can come up in both.
    """

    vocab_size = MARKOV_SYMBOLS

    def __init__(self, config: DataConfig, *, seq_len: int) -> None:
        self._config, self._seq_len = config, seq_len
        draw = generator(config.seed, STRUCTURE)
        log_odds_VV = MARKOV_SPREAD * torch.randn(MARKOV_SYMBOLS, MARKOV_SYMBOLS, generator=draw, dtype=torch.float64)
        self.transition_VV = log_odds_VV.softmax(dim=-1)
        self.stationary_V = stationary(self.transition_VV)
        rate = -(self.stationary_V[:, None] * self.transition_VV * self.transition_VV.log()).sum()
        self.reference = Reference(
            uniform=math.log(MARKOV_SYMBOLS),
            unigram=float(-(self.stationary_V * self.stationary_V.log()).sum()),
            bigram=float(rate),
            optimum=float(rate),
        )
        self.fingerprint = {"source": "markov", "symbols": MARKOV_SYMBOLS, "seed": config.seed}

    def train_batch(self, step: int) -> Batch:
        """Fresh sequences of the chain."""
        return self._batch(TRAIN, step, self._seq_len)

    def val_batches(self, *, seq_len: int, count: int) -> list[Batch]:
        """Sequences from a stream of their own."""
        return [self._batch(HELD_OUT, step, seq_len) for step in range(count)]

    def prompt(self, length: int) -> Tensor:
        """A held-out sequence."""
        return self._sequences(1, length, HELD_OUT, -1)[0]

    def decode(self, tokens: Tensor) -> str:
        """The ids, separated by spaces."""
        return " ".join(str(token) for token in tokens.tolist())

    def _batch(self, stream: str, step: int, seq_len: int) -> Batch:
        sequence_BT = self._sequences(self._config.batch_size, seq_len + 1, stream, step)
        return Batch(
            tokens_BT=sequence_BT[:, :-1].contiguous(),
            targets_BT=sequence_BT[:, 1:].contiguous(),
            scores_all=True,
            visible_BS=None,
        )

    def _sequences(self, n_batch: int, length: int, stream: str, step: int) -> Tensor:
        draw = generator(self._config.seed, stream, step)
        uniform_TB = torch.rand(length, n_batch, generator=draw, dtype=torch.float64)
        cumulative_VV = self.transition_VV.cumsum(dim=-1)
        state_B = torch.searchsorted(self.stationary_V.cumsum(dim=0), uniform_TB[0])
        states = [state_B.clamp(max=MARKOV_SYMBOLS - 1)]
        for uniform_B in uniform_TB[1:]:
            state_B = torch.searchsorted(cumulative_VV[states[-1]], uniform_B[:, None]).squeeze(-1)
            states.append(state_B.clamp(max=MARKOV_SYMBOLS - 1))
        return torch.stack(states, dim=1)


class Recall:
    """Associative recall: pairs of key and value, then keys again, whose values are to be named.

    Keys of a sequence are distinct, so every answer stands in the sequence and the optimum is 0. The sum of its values
    and of the key of its first pair, modulo 4, says whether a sequence is held out (0) or trained on (1, 2, 3), so none
    is ever both; no model needs that sum to solve it. Every answer is equally likely on both sides.
    """

    vocab_size = RECALL_KEYS + RECALL_VALUES

    def __init__(self, config: DataConfig, *, seq_len: int) -> None:
        self._config, self._seq_len = config, seq_len
        self._pairs = min(RECALL_KEYS, (seq_len + 1) // 4)
        if self._pairs < 2:
            raise DataError(
                f"data.source = recall needs model.seq_len of at least 7 for two pairs and two questions, but it is "
                f"{seq_len}. Use a longer seq_len."
            )
        self.reference = Reference(
            uniform=math.log(RECALL_VALUES),
            unigram=math.log(RECALL_VALUES),
            bigram=None,
            optimum=0.0,
        )
        self.fingerprint = {
            "source": "recall",
            "pairs": self._pairs,
            "held_out_one_in": RECALL_SIDES,
            "seed": config.seed,
        }

    def train_batch(self, step: int) -> Batch:
        """Fresh sequences of the training kind."""
        return self._batch(TRAIN, step)

    def val_batches(self, *, seq_len: int, count: int) -> list[Batch]:
        """Fresh sequences of the held-out kind; always of the trained length."""
        return [self._batch(HELD_OUT, step) for step in range(count)]

    def prompt(self, length: int) -> Tensor:
        """A held-out sequence, cut to length."""
        return self._batch(HELD_OUT, -1).tokens_BT[0, :length]

    def decode(self, tokens: Tensor) -> str:
        """k3 v7 ...: keys and values by number."""
        return " ".join(f"k{token}" if token < RECALL_KEYS else f"v{token - RECALL_KEYS}" for token in tokens.tolist())

    def _batch(self, stream: str, step: int) -> Batch:
        draw = generator(self._config.seed, stream, step)
        n_batch, n_pairs = self._config.batch_size, self._pairs
        keys_BP = torch.rand(n_batch, RECALL_KEYS, generator=draw).argsort(dim=-1)[:, :n_pairs]
        values_BP = torch.randint(RECALL_VALUES, (n_batch, n_pairs), generator=draw)
        # Turning the last value moves a sequence to its side. Values go round in a whole number of turns of
        # RECALL_SIDES, so the turned value is still uniform.
        residue_B = (values_BP.sum(dim=-1) + keys_BP[:, 0]) % RECALL_SIDES
        wanted_B = (
            torch.zeros(n_batch, dtype=torch.int64)
            if stream == HELD_OUT
            else torch.randint(1, RECALL_SIDES, (n_batch,), generator=draw)
        )
        values_BP[:, -1] = (values_BP[:, -1] + wanted_B - residue_B) % RECALL_VALUES
        asked_BP = torch.rand(n_batch, n_pairs, generator=draw).argsort(dim=-1)
        pairs_BT = torch.stack([keys_BP, values_BP + RECALL_KEYS], dim=-1).flatten(1)
        questions_BT = torch.stack(
            [keys_BP.gather(1, asked_BP), values_BP.gather(1, asked_BP) + RECALL_KEYS], dim=-1
        ).flatten(1)
        sequence_BT = torch.cat([pairs_BT, questions_BT], dim=1)
        position_T = torch.arange(sequence_BT.shape[1] - 1)
        is_asked_T = (position_T >= 2 * n_pairs) & (position_T % 2 == 0)
        return _partly_scored(sequence_BT, is_asked_T, seq_len=self._seq_len)


class Modular:
    """Addition modulo 97, "a + b = c", several problems in a sequence; only c is scored (Power et al. 2022).

    A permutation of all 97 x 97 problems, fixed by the seed, splits them: 80 % are trained on, the others held out. A
    problem is an ordered pair: of a + b and b + a, one may be trained on and the other held out.
    """

    vocab_size = MODULUS + 2

    def __init__(self, config: DataConfig, *, seq_len: int) -> None:
        self._config, self._seq_len = config, seq_len
        self._problems = (seq_len + 1) // PROBLEM
        if not self._problems:
            raise DataError(
                f"data.source = modular needs model.seq_len of at least {PROBLEM - 1} for one problem, but it is "
                f"{seq_len}. Use a longer seq_len."
            )
        order = torch.randperm(MODULUS**2, generator=generator(config.seed, STRUCTURE))
        cut = int(MODULAR_TRAIN_PART * len(order))
        self.problems = {TRAIN: order[:cut], HELD_OUT: order[cut:]}
        self.reference = Reference(uniform=math.log(MODULUS), unigram=math.log(MODULUS), bigram=None, optimum=0.0)
        self.fingerprint = {"source": "modular", "modulus": MODULUS, "seed": config.seed}

    def train_batch(self, step: int) -> Batch:
        """Problems of the train part."""
        return self._batch(TRAIN, step)

    def val_batches(self, *, seq_len: int, count: int) -> list[Batch]:
        """Held-out problems; always of the trained length."""
        return [self._batch(HELD_OUT, step) for step in range(count)]

    def prompt(self, length: int) -> Tensor:
        """A held-out sequence, cut to length."""
        return self._batch(HELD_OUT, -1).tokens_BT[0, :length]

    def decode(self, tokens: Tensor) -> str:
        """3 + 96 = 2 ..."""
        words = {PLUS: "+", EQUALS: "="}
        return " ".join(words.get(token, str(token)) for token in tokens.tolist())

    def _batch(self, stream: str, step: int) -> Batch:
        draw = generator(self._config.seed, stream, step)
        pool = self.problems[stream]
        shape = (self._config.batch_size, self._problems)
        problem_BP = pool[torch.randint(len(pool), shape, generator=draw)]
        a_BP, b_BP = problem_BP // MODULUS, problem_BP % MODULUS
        written = [a_BP, torch.full_like(a_BP, PLUS), b_BP, torch.full_like(a_BP, EQUALS), (a_BP + b_BP) % MODULUS]
        sequence_BT = torch.stack(written, dim=-1).flatten(1)
        is_result_T = torch.arange(sequence_BT.shape[1] - 1) % PROBLEM == PROBLEM - 2
        return _partly_scored(sequence_BT, is_result_T, seq_len=self._seq_len)


def _partly_scored(sequence_BT: Tensor, scored_T: Tensor, *, seq_len: int) -> Batch:
    """Sequences whose next tokens are targets where `scored_T` says so, filled up to `seq_len` tokens."""
    tokens_BT, next_BT = sequence_BT[:, :-1], sequence_BT[:, 1:]
    missing = seq_len - tokens_BT.shape[1]
    return Batch(
        tokens_BT=torch.nn.functional.pad(tokens_BT, (0, missing)),
        targets_BT=torch.nn.functional.pad(next_BT.where(scored_T, IGNORE), (0, missing), value=IGNORE),
        scores_all=False,
        visible_BS=None,
    )


def stationary(transition_VV: Tensor) -> Tensor:
    """The distribution π with π P = π and Σ π = 1, (V,), by solving for it."""
    n = len(transition_VV)
    equations = torch.cat(
        [transition_VV.T - torch.eye(n, dtype=transition_VV.dtype), torch.ones(1, n).to(transition_VV)]
    )
    right = torch.zeros(n + 1, dtype=transition_VV.dtype)
    right[-1] = 1
    solution_V: Tensor = torch.linalg.lstsq(equations, right[:, None]).solution[:, 0]
    return solution_V
