"""How far an update moves the bilinear form of an attention head, W_q W_kᵀ, which all its logits are made of.

To first order (arXiv 2606.28116): Δ₂ = ‖ΔW_q W_kᵀ + W_q ΔW_kᵀ‖ / ‖W_q W_kᵀ‖, Frobenius norms. Weights may grow, and a form turn, while
norms of weights and updates look as ever.

The form is d_model × d_model and never built: ‖A Bᵀ‖² = tr(AᵀA BᵀB), of which the factors are d_head × d_head.

Shape key: ... any leading axes (member, layer), H head, G key head, D d_model, K d_head.
"""

from torch import Tensor


def form_update_ratio(*, q: Tensor, k: Tensor, q_update: Tensor, k_update: Tensor) -> Tensor:
    """Δ₂ of every head, (..., H).

    Args:
        q: W_q, (..., H, D, K).
        k: W_k, (..., G, D, K): of H heads each G-th part shares a key head; its D may be another.
        q_update: what is added to W_q.
        k_update: what is added to W_k.

    Returns:
        NaN where the form is 0, or anything is not finite.
    """
    of_q, moved_q, both_q = _products(q, q_update)
    shared = q.shape[-3] // k.shape[-3]
    of_k, moved_k, both_k = (x.repeat_interleave(shared, dim=-3) if shared > 1 else x for x in _products(k, k_update))
    square = (of_q * of_k).sum(dim=(-2, -1))
    moved = (moved_q * of_k + of_q * moved_k + 2 * both_q * both_k.mT).sum(dim=(-2, -1))
    return (moved / square).clamp_min(0).sqrt()  # below 0 by rounding only


def _products(w: Tensor, update: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """WᵀW, ΔWᵀΔW and WᵀΔW, (..., K, K), over ‖W‖², so that no product of four weights leaves what float32 can hold."""
    w, update = w.float(), update.float()
    if w.mT.is_contiguous() != update.mT.is_contiguous() or not (w.is_contiguous() or w.mT.is_contiguous()):
        w, update = w.contiguous(), update.contiguous()  # once, and not in each product
    of_w = w.mT @ w
    size = of_w.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]
    return of_w / size, (update.mT @ update) / size, (w.mT @ update) / size
