"""Which keys the queries of an attention call look at: later ones, padding, or none.

Shape key: B batch, H head, T query position, S key position, R query row that is looked at, N sequence of those rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnscope.capture.seen import HIDDEN_BELOW, Computed, Modified, Scaled, Seen, visible_logits
from attnscope.metrics.rows import Call, Rows, rows_of, sample_rows, wide

# What `sight_of` counts. Shares of attention are summed over the rows that the next one counts.
FACTS = (
    "later",  # share of attention on keys after the query
    "later_seen",  # rows that see such a key
    "later_rows",  # rows of self-attention that see a key, and have keys after them
    "padded",  # share of attention on keys that are padding
    "padded_rows",  # rows of real queries in sequences that have padding
    "inverted_rows",  # rows of the first head that see one token, again and again, while the keys hidden from them are of several
    "masked_rows",  # rows of the first head that see two keys or more, and from which two or more are hidden
)
MOST_LOGITS = 1 << 16  # of the sampled positions of all sequences; of more, those of some sequences are looked at
MOST_LOOKED_AT = 1 << 22  # numbers of a mask; of a larger one, rows that see nothing are not looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What an embedding was looked up for.

    Attributes:
        ids: any axes.
        padding: the id of padding; None = the embedding knows none.
    """

    ids: Tensor
    padding: int | None

    def of_keys(self, n_batch: int, n_keys: int) -> Tensor | None:
        """Ids as (B, S); None where these are not the tokens that the keys stand for."""
        if self.ids.shape == (n_batch, n_keys):
            return self.ids
        return self.ids.T if self.ids.shape == (n_keys, n_batch) else None


@torch.no_grad()
def sight_of(seen: Seen, tokens: Sequence[Tokens], *, rows: int | str, seed: int) -> Tensor:
    """FACTS of the rows that are sampled, (F,) on the device of the call."""
    n_batch, _, n_queries, n_keys = seen.shape
    logits = seen.logits
    device = logits.z.device if isinstance(logits, Computed) else logits.q.device
    sample = None
    if not isinstance(rows, str):
        sample = sample_rows(n_batch=n_batch, n_queries=n_queries, rows=rows, seed=seed, device=device)
        # Padding may be in any of the sequences.
        if sample is not None and n_batch * seen.shape[1] * rows * n_keys <= MOST_LOGITS:
            sample = Rows(sequences=slice(None), positions=sample.positions)
    everything = Rows(sequences=slice(None), positions=slice(None))
    with torch.autocast(device.type, enabled=False):
        z_NHRS, visible = _logits(logits, sample or everything)
    visible_NHRS = visible.expand(z_NHRS.shape)
    p_NHRS = z_NHRS.masked_fill(~visible_NHRS, float("-inf")).softmax(dim=-1).nan_to_num(0.0)
    sequence_N = torch.arange(n_batch, device=device)[(sample or everything).sequences]
    position_R = torch.arange(n_queries, device=device)[(sample or everything).positions]
    nothing = torch.zeros((), device=device)
    facts = dict.fromkeys(FACTS, nothing)
    if n_queries == n_keys:
        facts |= _later(p_NHRS, visible_NHRS, position_R)
    fitting = [(each.padding, ids) for each in tokens if (ids := each.of_keys(n_batch, n_keys)) is not None]
    if fitting:
        facts |= _masked(visible_NHRS[:, 0], fitting[0][1][sequence_N])
    padded = [(padding, ids) for padding, ids in fitting if padding is not None]
    if len(padded) == 1:  # of two, nobody knows which the keys stand for
        ((padding, ids_BS),) = padded
        is_padding_NS = ids_BS[sequence_N] == padding
        facts |= _padded(p_NHRS, is_padding_NS, position_R if n_queries == n_keys else None)
    return torch.stack([facts[name].float() for name in FACTS])


@torch.no_grad()
def empty_rows(seen: Seen) -> Tensor | None:
    """How many query rows have every key hidden by a mask, and how many there are, (2,); None where that is not looked for."""
    match seen.logits:
        case Scaled(visible=Tensor() as visible) if visible.numel() <= MOST_LOOKED_AT:
            empty = ~visible.any(dim=-1)
        case Computed() as computed if computed.z.numel() <= MOST_LOOKED_AT:
            empty = _far_below(computed)
        case _:
            return None
    return torch.stack([empty.sum(), torch.full_like(empty.sum(), empty.numel())]).float()


def _far_below(logits: Computed) -> Tensor:
    """Query rows all of whose logits a mask has pushed far below zero, (B, H, T).

    Logits that q kᵀ explains are no mask's: they have overflowed to -inf in half precision, or training breaks.
    """
    z = logits.z.detach()
    far = z < HIDDEN_BELOW  # which NaN is not
    empty = far.all(dim=-1)
    if logits.q is None or (z.device.type == "cpu" and not empty.any()):  # nobody waits for the host's own memory
        return empty
    with torch.autocast(z.device.type, enabled=False):
        raw = logits.raw()
    assert raw is not None
    raw, over = raw.detach(), (-4, -2, -1)  # of each head
    near = ~far & z.isfinite() & raw.isfinite()
    raw_near = raw.where(near, 0.0)
    factor = (raw_near * z.float().where(near, 0.0)).sum(over, keepdim=True) / raw_near.square().sum(over, keepdim=True)
    factor = factor.nan_to_num(0.0, 0.0, 0.0)
    lowest = max(torch.finfo(x.dtype).min for x in (z, logits.q))
    overflowed = (raw * factor.abs().clamp(min=1.0) <= lowest) & (z == float("-inf"))
    explained = overflowed | (z.float() - factor * raw >= HIDDEN_BELOW)
    return (far & ~explained).all(dim=-1)


def _logits(logits: Scaled | Modified | Computed, sample: Rows) -> tuple[Tensor, Tensor]:
    """Softmax inputs of these rows, (N, H, R, S), and which of them are visible, broadcastable to the same."""
    if isinstance(logits, Computed):
        z = logits.z.detach()
        nothing = z.new_zeros(*z.shape[:-1], 1)
        q = nothing if logits.q is None else logits.q.detach()
        k = nothing if logits.k is None else logits.k.detach()
        cut = rows_of(_call(q, k, bias=z), sample).call
        assert cut.bias is not None
        z_NHRS = cut.bias.float()
        raw = None if logits.q is None else cut.q.float() @ cut.k.float().mT
        return z_NHRS, visible_logits(z_NHRS, raw)
    q, k = logits.q.detach(), logits.k.detach()
    everything = torch.ones(1, dtype=torch.bool, device=q.device)
    if isinstance(logits, Scaled):
        bias = None if logits.bias is None else logits.bias.detach()
        cut = rows_of(_call(q, k, visible=logits.visible, bias=bias), sample).call
        z_NHRS = _product(cut) * logits.scale
        z_NHRS = z_NHRS if cut.bias is None else z_NHRS + cut.bias
        return z_NHRS, everything if cut.visible is None else cut.visible
    cut = rows_of(_call(q, k), sample).call
    b_N, i_R = (
        torch.arange(n, device=q.device)[at]
        for n, at in ((q.shape[0], sample.sequences), (q.shape[2], sample.positions))
    )
    z_NHRS, visible = logits.modify(_product(cut) * logits.scale, b_N, torch.arange(q.shape[1], device=q.device), i_R)
    return z_NHRS, everything if visible is None else visible


def _call(q: Tensor, k: Tensor, *, visible: Tensor | None = None, bias: Tensor | None = None) -> Call:
    return Call(q=q, k=k, attn_scale=torch.ones((), device=q.device), visible=visible, bias=bias, softcap=0.0)


def _product(call: Call) -> Tensor:
    dtype = wide(call.q.dtype)
    return call.q.to(dtype) @ call.k.to(dtype).mT


def _later(p_NHRS: Tensor, visible_NHRS: Tensor, position_R: Tensor) -> dict[str, Tensor]:
    n_keys = p_NHRS.shape[-1]
    later_RS = torch.arange(n_keys, device=p_NHRS.device) > position_R[:, None]
    counts_NHR = visible_NHRS.any(dim=-1) & (position_R < n_keys - 1)
    share_NHR = (p_NHRS * later_RS).sum(dim=-1)
    return {
        "later": share_NHR.where(counts_NHR, 0.0).sum(),
        "later_seen": ((visible_NHRS & later_RS).any(dim=-1) & counts_NHR).sum(),
        "later_rows": counts_NHR.sum(),
    }


def _padded(p_NHRS: Tensor, is_padding_NS: Tensor, position_R: Tensor | None) -> dict[str, Tensor]:
    """Padding is what stands at the ends of a sequence: the same id between real tokens is one of them."""
    leading_NS = is_padding_NS.long().cumprod(dim=-1)
    trailing_NS = is_padding_NS.long().flip(-1).cumprod(dim=-1).flip(-1)
    ends_NS = (leading_NS + trailing_NS) > 0
    counts_NR = (ends_NS.any(dim=-1) & ~ends_NS.all(dim=-1))[:, None].expand(-1, p_NHRS.shape[2])
    if position_R is not None:  # of self-attention, the queries that are padding themselves do not count
        counts_NR = counts_NR & ~ends_NS[:, position_R]
    share_NHR = (p_NHRS * ends_NS[:, None, None]).sum(dim=-1)
    counts_NHR = counts_NR[:, None].expand(share_NHR.shape)
    return {"padded": share_NHR.where(counts_NHR, 0.0).sum(), "padded_rows": counts_NHR.sum()}


def _masked(visible_NRS: Tensor, ids_NS: Tensor) -> dict[str, Tensor]:
    """Of the first head: padding is that of all."""
    ids_NRS = ids_NS[:, None].expand(visible_NRS.shape)
    n_NR = visible_NRS.sum(dim=-1)
    counts_NR = (n_NR >= 2) & (n_NR <= visible_NRS.shape[-1] - 2)
    inverted_NR = counts_NR & ~_differ(ids_NRS, visible_NRS) & _differ(ids_NRS, ~visible_NRS)
    return {"inverted_rows": inverted_NR.sum(), "masked_rows": counts_NR.sum()}


def _differ(ids_NRS: Tensor, among_NRS: Tensor) -> Tensor:
    """Whether there are two different ids among these keys, (N, R)."""
    limits = torch.iinfo(ids_NRS.dtype)
    most = ids_NRS.masked_fill(~among_NRS, limits.min).amax(dim=-1)
    return most > ids_NRS.masked_fill(~among_NRS, limits.max).amin(dim=-1)
