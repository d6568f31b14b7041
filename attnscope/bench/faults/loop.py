"""The training loop of a program, as people write it by hand, and the watcher around it.

Shape key: B batch, T position, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnscope.bench.faults.borrowed import BorrowedGPT
from attnscope.bench.faults.model import GPT
from attnscope.bench.faults.recipe import Recipe
from attnscope.config import DataConfig
from attnscope.data import IGNORE, Corpus, open_data
from attnscope.watch.attach import watch_model

EVERY = 5  # steps between those whose attention and parameters are measured, after the first 20
HELD_OUT = 64  # batches: of a decoder, one token of each sequence counts
LAST = 20  # steps whose mean loss is the final one


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a program.

    Attributes:
        final_loss: mean of the last losses, as it was meant to be: per token; NaN or Inf as they come.
        held_out_loss: per token, of next-token or masked targets as they should be, with the model as it is.
        error: what it died of.
    """

    final_loss: float
    held_out_loss: float
    error: str | None = None


def train(recipe: Recipe, path: Path) -> Result:
    """Train it under `watch_model` into a new run directory."""
    torch.manual_seed(recipe.seed)
    corpus = open_data(
        DataConfig(source=recipe.source, batch_size=recipe.batch_size, seed=recipe.seed, objective=recipe.objective),
        seq_len=recipe.seq_len,
    )
    build = BorrowedGPT if recipe.attention == "gpt2" else GPT
    model = build(recipe, corpus.vocab_size).to(getattr(torch, recipe.dtype))
    model.train(not recipe.evaluates)
    optimizers = optimizers_of(model, recipe)
    batches = batches_of(corpus, recipe)
    losses: list[float] = []
    with watch_model(model, optimizers[0], path, every=EVERY):
        try:
            for step in range(recipe.steps):
                losses.append(one_step(model, optimizers, batches, recipe, step))
                if not math.isfinite(losses[-1]):
                    break
        except RuntimeError as error:
            return Result(final_loss=math.nan, held_out_loss=math.nan, error=str(error).splitlines()[0])
    last = losses[-LAST:]
    return Result(final_loss=sum(last) / len(last), held_out_loss=held_out(model, corpus, recipe))


def one_step(
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    batches: Iterator[tuple[Tensor, Tensor]],
    recipe: Recipe,
    step: int,
) -> float:
    """One update; the loss per token."""
    total = 0.0
    for _ in range(recipe.accumulate):
        tokens_BT, targets_BT = next(batches)
        logits_BTV = model(tokens_BT).float()
        loss = F.cross_entropy(
            logits_BTV.flatten(0, 1),
            targets_BT.flatten(),
            ignore_index=IGNORE,
            reduction="sum" if recipe.loss_sum else "mean",
        )
        n_terms = int((targets_BT != IGNORE).sum()) if recipe.loss_sum else 1
        total += float(loss.detach()) / n_terms / recipe.accumulate
        loss = loss * recipe.loss_sign
        (loss / recipe.accumulate if recipe.divides else loss).backward()
    if recipe.clip:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    factor = min(1.0, (step + 1) / max(1, recipe.warmup))
    factor *= recipe.lr_growth**step
    if 0 <= recipe.lr_jump_at <= step:
        factor *= recipe.lr_times
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial"] * factor
        optimizer.step()
        if recipe.zeroes_grad:
            optimizer.zero_grad(set_to_none=True)
    return total


def batches_of(corpus: Corpus, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, (B, T) each, of one micro-batch after the other."""
    draw = torch.Generator().manual_seed(recipe.seed)
    number = 0
    while True:
        batch = corpus.train_batch(0 if recipe.repeats_batch else number)
        tokens, targets = batch.tokens_BT, batch.targets_BT
        if recipe.targets == "same":
            targets = tokens.clone()
        elif recipe.targets == "late":
            targets = torch.cat([targets[:, 1:], torch.full_like(targets[:, :1], IGNORE)], dim=1)
        elif recipe.targets == "shuffled":
            targets = targets.flatten()[torch.randperm(targets.numel(), generator=draw)].view_as(targets)
        if number == recipe.poison_at:
            tokens = torch.zeros_like(tokens)
            targets = torch.randint(0, corpus.vocab_size, targets.shape, generator=draw)
        yield tokens, targets
        number += 1


def optimizers_of(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """One, or two for muon, without what was left out."""
    chosen: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if _named(name, recipe.frozen):
            parameter.requires_grad_(False)
        elif not _named(name, recipe.left_out):
            is_matrix = recipe.optimizer == "muon" and parameter.dim() == 2 and ".h." in f".{name}"
            chosen.setdefault((is_matrix, _named(name, recipe.still)), []).append(parameter)

    def groups(is_matrix: bool, lr: float) -> list[dict[str, object]]:
        return [
            {"params": parameters, "lr": 0.0 if is_still else lr, "initial": 0.0 if is_still else lr}
            for (of_matrix, is_still), parameters in chosen.items()
            if of_matrix == is_matrix
        ]

    make: dict[str, Callable[[], list[torch.optim.Optimizer]]] = {
        "sgd": lambda: [torch.optim.SGD(groups(False, recipe.lr), momentum=0.9)],
        "adamw": lambda: [_adamw(groups(False, recipe.lr), recipe)],
        "muon": lambda: [
            *(
                [torch.optim.Muon(groups(True, recipe.lr), weight_decay=recipe.weight_decay)]
                if groups(True, recipe.lr)  # not all were left out
                else []
            ),
            _adamw(groups(False, recipe.lr / 10), recipe),
        ],
    }
    return make[recipe.optimizer]()


def _adamw(groups: list[dict[str, object]], recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay)


def _named(name: str, words: tuple[str, ...]) -> bool:
    return any(word in name for word in words)


@torch.no_grad()
def held_out(model: nn.Module, corpus: Corpus, recipe: Recipe) -> float:
    """What the model is worth: its loss on batches that it has not seen, with the right targets, nats per token.

    A model that looks ahead is worth nothing where nobody knows what comes: a decoder is asked for the last token that is scored,
    with everything after it cut off.
    """
    model.eval()
    total, count = 0.0, 0
    for batch in corpus.val_batches(seq_len=recipe.seq_len, count=HELD_OUT):
        tokens_BT, targets_BT = batch.tokens_BT, batch.targets_BT
        if recipe.objective == "next_token":
            last = int((targets_BT != IGNORE).any(dim=0).nonzero().max())
            logits_BTV = model(tokens_BT[:, : last + 1]).float()[:, -1:]
            targets_BT = targets_BT[:, last : last + 1]
        else:
            logits_BTV = model(tokens_BT).float()
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE, reduction="sum")
        total, count = total + float(loss), count + int((targets_BT != IGNORE).sum())
    return total / count if count else math.nan
