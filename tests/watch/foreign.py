"""Helps to watch models that are not attnscope's: one training step, and entropies from the weights they return."""

import torch

from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model


def train_watched(path, model, loss_of, *, steps=1, every=1, rows="all"):
    """Train with SGD, watched; the run."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    with watch_model(model, optimizer, path, every=every, rows=rows):
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
    return open_run(path)


def layers_of(run):
    """What the run says of its attention layers, in their order."""
    return [fields for kind, fields in zip(run.events["kind"], run.events["fields"], strict=True) if kind == "attention"]  # fmt: skip


def entropy_by_head(run, layer, step=0):
    found = run.heads[(run.heads["layer"] == layer) & (run.heads["step"] == step)]
    return torch.tensor(found.sort_values("head")["entropy"].to_numpy())


def entropy_of_weights(p_BHTS):
    """Mean over query rows that see two keys or more, by the definition, in float64."""
    p = p_BHTS.double()
    entropy_BHT = -(torch.special.xlogy(p, p)).sum(dim=-1)
    seen_BHT = (p > 0).sum(dim=-1) >= 2
    return torch.stack([entropy_BHT[:, h][seen_BHT[:, h]].mean() for h in range(p.shape[1])]).float()
