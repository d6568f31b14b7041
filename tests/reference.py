"""The slow, obvious twin of every metric: Python loops and the definition, in float64."""

import math

import torch


def attention_rows(q, k, *, scale, visible=None, bias=None, softcap=0.0):
    """Softmax inputs of every row, as lists of the visible logits: {(b, h, t): (first visible key, [z, ...])}."""
    n_batch, n_heads, n_queries, _ = q.shape
    n_keys = k.shape[2]
    rows = {}
    for b in range(n_batch):
        for h in range(n_heads):
            for t in range(n_queries):
                z = []
                for s in range(n_keys):
                    if visible is not None and not visible[b, h, t, s]:
                        continue
                    logit = scale * float((q[b, h, t].double() * k[b, h, s].double()).sum())
                    if softcap:
                        logit = softcap * math.tanh(logit / softcap)
                    if bias is not None:
                        logit += float(bias[b, h, t, s])
                    z.append(logit)
                rows[b, h, t] = z
    return rows


def attention_stats(q, k, *, scale, visible=None, bias=None, softcap=0.0):
    """Every column of the heads table, per head, by definition."""
    rows = attention_rows(q, k, scale=scale, visible=visible, bias=bias, softcap=softcap)
    stats = []
    for h in range(q.shape[1]):
        counted = [z for (_, head, _), z in rows.items() if head == h and len(z) >= 2]
        left_out = sum(1 for (_, head, _), z in rows.items() if head == h and len(z) < 2)
        soft = [softmax(z) for z in counted]
        entropy = [-sum(x * math.log(x) for x in p if x > 0) for p in soft]
        q_max = max(float(x.double().norm()) for x in q[:, h].flatten(0, 1))
        k_max = max(float(x.double().norm()) for x in k[:, h].flatten(0, 1))
        bound = scale * q_max * k_max
        stats.append(
            {
                "entropy": mean(entropy),
                "entropy_ratio": mean(
                    [e / math.log(len(z)) for e, z in zip(entropy, counted, strict=True)]
                ),
                "max_prob": mean([max(p) for p in soft]),
                "saturated": mean([float(max(p) > 0.99) for p in soft]),
                "logit_std": math.sqrt(mean([variance(z) for z in counted])),
                "max_logit": max(max(z) for z in counted) if counted else math.nan,
                "max_logit_bound": (min(bound, softcap) if softcap else bound)
                + (float(bias[:, h].max()) if bias is not None else 0),
                "logits_over_5": (
                    sum(abs(x - mean(z)) > 5 for z in counted for x in z)
                    / sum(len(z) for z in counted)
                    if counted
                    else math.nan
                ),
                "softmax_gain": mean([1 - sum(x * x for x in p) for p in soft]),
                "sink": mean([p[0] for p in soft]),
                "rows": len(counted),
                "rows_left_out": left_out,
            }
        )
    return {name: torch.tensor([each[name] for each in stats], dtype=torch.float64) for name in stats[0]}


def attention(q, k, v, *, scale, visible=None, bias=None, softcap=0.0):
    """softmax(scale q kᵀ + bias) v, one query at a time."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    n_batch, n_heads, n_queries, _ = q.shape
    for b in range(n_batch):
        for h in range(n_heads):
            for t in range(n_queries):
                seen = [
                    s for s in range(k.shape[2]) if visible is None or bool(visible[b, h, t, s])
                ]
                rows = attention_rows(
                    q[b : b + 1, h : h + 1, t : t + 1],
                    k[b : b + 1, h : h + 1, seen],
                    scale=scale,
                    bias=None if bias is None else bias[b : b + 1, h : h + 1, t : t + 1, seen],
                    softcap=softcap,
                )
                p = softmax(rows[0, 0, 0])
                out[b, h, t] = sum(x * v[b, h, s].double() for x, s in zip(p, seen, strict=True))
    return out


def softmax(z):
    largest = max(z)
    powers = [math.exp(x - largest) for x in z]
    return [x / sum(powers) for x in powers]


def mean(values):
    return sum(values) / len(values) if values else math.nan


def variance(values):
    centre = mean(values)
    return mean([(x - centre) ** 2 for x in values])


def cross_entropy(logits_NV, targets_N):
    """Mean over the scored tokens, in nats."""
    losses = []
    for logits, target in zip(logits_NV.double(), targets_N, strict=True):
        if int(target) >= 0:
            losses.append(-math.log(softmax(logits.tolist())[int(target)]))
    return mean(losses)


def token_cosine(x_BTD):
    """Mean cosine similarity over all pairs of different positions of a sequence."""
    values = []
    for states in x_BTD.double():
        for i, first in enumerate(states):
            for j, second in enumerate(states):
                if i != j:
                    values.append(float(first @ second / (first.norm() * second.norm())))
    return mean(values)
