"""Look inside one attention call of your own code: q and k are all it takes.

Run: python examples/your_own_attention.py
"""

import torch

import attnscope

torch.manual_seed(0)
batch, heads, positions, d_head = 4, 8, 256, 64
q = torch.randn(batch, heads, positions, d_head)
k = torch.randn(batch, heads, positions, d_head)
causal = torch.ones(positions, positions, dtype=torch.bool).tril()

for name, scale in (("1/sqrt(d_head)", None), ("no scale", 1.0)):
    stats = attnscope.attention_stats(q, k, scale=scale, mask=causal)
    print(
        f"{name:14}  entropy ratio {stats['entropy_ratio'].mean():.2f}"
        f"  max prob {stats['max_prob'].mean():.2f}"
        f"  logit std {stats['logit_std'].mean():.1f}"
        f"  saturated rows {stats['saturated'].mean():.0%}"
    )
