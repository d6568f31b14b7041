"""Train with and without 1/√d_head and watch the softmax, all from Python.

Run: python examples/explode.py
"""

import sys

import attnscope

folder = sys.argv[1] if len(sys.argv) > 1 else None
run = attnscope.train_model(
    {
        "train": {"steps": 30},
        "arm": [
            {"name": "unscaled", "attention": {"scale": "none"}},
            {"name": "scaled", "attention": {"scale": "inverse_sqrt"}},
        ],
    },
    path=folder,
)

for member in run.members:
    print(f"{member.name:9} {member.status:9} first loss {member.first_loss:.1f}")

# One row per step, member, layer and head; here the mean over layers and heads.
heads = run.heads.groupby(["member", "step"], observed=True)[["max_prob", "entropy"]].mean()
print(heads.loc["unscaled"].head(3))
print(heads.loc["scaled"].head(3))
