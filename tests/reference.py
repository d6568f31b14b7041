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
                "entropy_ratio": mean([e / math.log(len(z)) for e, z in zip(entropy, counted, strict=True)]),
                "max_prob": mean([max(p) for p in soft]),
                "saturated": mean([float(max(p) > 0.99) for p in soft]),
                "logit_std": math.sqrt(mean([variance(z) for z in counted])),
                "max_logit": max(max(z) for z in counted) if counted else math.nan,
                "max_logit_bound": (min(bound, softcap) if softcap else bound)
                + (float(bias[:, h].max()) if bias is not None else 0),
                "logits_over_5": (
                    sum(abs(x - mean(z)) > 5 for z in counted for x in z) / sum(len(z) for z in counted)
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
                seen = [s for s in range(k.shape[2]) if visible is None or bool(visible[b, h, t, s])]
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


def transformer(parameters, config, tokens_BT, *, scale_L, real_BS=None):
    """One member's output logits (B x T, V) in float64: one sequence, one layer, one head at a time."""
    model, k = config.model, config.d_head
    table = parameters["token_embedding"]
    n_tokens = tokens_BT.shape[1]

    def normed(x, gain):
        if model.norm_kind == "rmsnorm":
            return rms_normed(x, gain)
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * gain

    def rms_normed(x, gain):
        square = x.pow(2).mean(dim=-1, keepdim=True)
        return x / (square + torch.finfo(torch.float64).eps).sqrt() * gain

    def activated(x):
        return {
            "gelu": lambda: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
            "relu": lambda: x.clamp(min=0),
            "silu": lambda: x / (1 + (-x).exp()),
        }[model.activation]()

    def turned(x):
        """Rotate the pair (i, i + K / 2) as a complex number."""
        turns = torch.polar(torch.ones(n_tokens, k // 2).double(), positions_angles(n_tokens, k))
        pairs = torch.complex(x[:, : k // 2], x[:, k // 2 :]) * turns
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    out = []
    for b, tokens in enumerate(tokens_BT):
        x = torch.stack([table[token] for token in tokens])
        if model.position == "learned":
            x = x + parameters["position_embedding"][:n_tokens]
        if model.position == "sinusoidal":
            angles = positions_angles(n_tokens, model.d_model)
            x[:, 0::2] += angles.sin()
            x[:, 1::2] += angles.cos()
        for layer in range(model.n_layers):
            weights = {name: parameters[name][layer] for name in ("qkv", "o", "mlp_in", "mlp_out")}
            w_q, w_k, w_v = weights["qkv"].unbind(1)
            y = normed(x, parameters["norm_attention"][layer]) if model.norm == "pre" else x
            heads = []
            for h in range(model.n_heads):
                here = slice(h * k, (h + 1) * k)
                q_h, k_h = y @ w_q[:, here], y @ w_k[:, here]
                if config.attention.qk_norm:
                    q_h = rms_normed(q_h, parameters["norm_q"][layer])
                    k_h = rms_normed(k_h, parameters["norm_k"][layer])
                if model.position == "rope":
                    q_h, k_h = turned(q_h), turned(k_h)
                scale = scale_L[layer]
                if config.attention.scale == "learned":
                    scale = parameters["scale"][layer, h]
                z = q_h @ k_h.T * scale
                if config.attention.logit_softcap:
                    z = config.attention.logit_softcap * (z / config.attention.logit_softcap).tanh()
                window = config.windows[layer] or n_tokens
                for t in range(n_tokens):
                    for s in range(n_tokens):
                        if model.position == "alibi":
                            z[t, s] -= 2 ** (-8 * (h + 1) / model.n_heads) * abs(t - s)
                        hidden = abs(t - s) >= window
                        hidden |= config.attention.mask == "causal" and s > t
                        if config.attention.mask == "padding" and real_BS is not None:
                            hidden |= not real_BS[b, s] and not (s == t and window < n_tokens)
                        if hidden:
                            z[t, s] = -math.inf
                p = z.exp() / z.exp().sum(dim=-1, keepdim=True)
                heads.append(p @ (y @ w_v[:, here]))
            x = x + torch.cat(heads, dim=-1) @ weights["o"]
            if model.norm == "post":
                x = normed(x, parameters["norm_attention"][layer])
            y = normed(x, parameters["norm_mlp"][layer]) if model.norm == "pre" else x
            x = x + activated(y @ weights["mlp_in"]) @ weights["mlp_out"]
            if model.norm == "post":
                x = normed(x, parameters["norm_mlp"][layer])
        if model.norm == "pre":
            x = normed(x, parameters["norm_final"])
        out.append(x @ (table.T if model.tie_embeddings else parameters["head"]))
    return torch.cat(out)


def positions_angles(n_tokens, width):
    """Position times frequency 10000^(-2i / width), float64 (T, width / 2)."""
    return torch.tensor(
        [[t * 10_000.0 ** (-2 * i / width) for i in range(width // 2)] for t in range(n_tokens)],
        dtype=torch.float64,
    )


def zclip(norms, threshold, *, alpha=0.97, warmup=25):
    """What ZClip (Kumar et al. 2025) multiplies a series of gradient norms by."""
    seen, factors, centre, spread = [], [], 0.0, 0.0
    for norm in norms:
        if len(seen) < warmup:
            seen.append(norm)
            centre, spread = mean(seen), variance(seen)
            factors.append(1.0)
            continue
        z = (norm - centre) / math.sqrt(spread)
        kept = centre + threshold**2 / z * math.sqrt(spread) if z > threshold else norm
        centre = alpha * centre + (1 - alpha) * kept
        spread = alpha * spread + (1 - alpha) * (kept - centre) ** 2
        factors.append(kept / norm)
    return factors


def form_update_ratio(q, k, q_update, k_update):
    """‖ΔW_q W_kᵀ + W_q ΔW_kᵀ‖ / ‖W_q W_kᵀ‖ of each head, (H, D, K) and (G, D, K): entry by entry, in float64."""
    found = []
    for h in range(len(q)):
        of_q, moved_q, of_k, moved_k = (
            x[at].double().tolist()
            for x, at in ((q, h), (q_update, h), (k, h * len(k) // len(q)), (k_update, h * len(k) // len(q)))
        )
        form, moved = 0.0, 0.0
        for row, moved_row in zip(of_q, moved_q, strict=True):
            for column, moved_column in zip(of_k, moved_k, strict=True):
                form += sum(a * b for a, b in zip(row, column, strict=True)) ** 2
                moved += (
                    sum(da * b for da, b in zip(moved_row, column, strict=True))
                    + sum(a * db for a, db in zip(row, moved_column, strict=True))
                ) ** 2
        found.append(math.sqrt(moved / form))
    return found
