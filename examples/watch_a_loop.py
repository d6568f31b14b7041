"""Watch a training loop of your own until it breaks, and look at the break again.

Run: python examples/watch_a_loop.py runs/watched
"""

import sys

import torch
from torch import nn

import attnscope

torch.manual_seed(0)
path = sys.argv[1] if len(sys.argv) > 1 else "runs/watched"


def make_model() -> nn.Module:
    """Anybody's model."""
    layer = nn.TransformerEncoderLayer(32, nhead=4, dim_feedforward=64, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)


model = make_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
try:
    with attnscope.watch_model(model, optimizer, path, stop_on=["nonfinite"], snapshot=2):
        for step in range(100):
            x = torch.randn(8, 16, 32)
            if step == 25:
                x[3, 7] = float("nan")  # one broken sample of the data
            loss = model(x).pow(4).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
except SystemExit as stopped:
    print(*stopped.__notes__)

run = attnscope.open_run(path)
for event in run.events[run.events["kind"] == "nonfinite"].head(1).itertuples():
    print(f"step {event.step}: first in the {event.fields['tensor']} of {event.fields['where'][0]}")

snapshot = attnscope.load_snapshot(f"{path}/part-0000/snapshot-00000025.safetensors")
model = make_model()
model.load_state_dict(snapshot.weights)
torch.set_rng_state(snapshot.rng[0])  # dropout
(batch,) = snapshot.batches
broken = batch["src"].isnan().any(dim=-1).nonzero().tolist()
print(f"its batch has NaN at (sample, position) {broken}; its loss is {model(**batch).mean():.3f} again")  # fmt: skip
