"""Keys that are the same at all positions, in real programs."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnscope.runs.probe_events import KeysRepeated
from attnscope.runs.probed import told
from attnscope.watch.same_keys import SAME, _spread_of_keys
from tests.diagnose.test_axes import watched

B, T, D, H = 3, 6, 8, 2
X = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Attention whose keys are made by a function of them, (B, H, T, K)."""

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.change = change

    def forward(self, x, memory):
        q, k, v = (
            f(y).view(B, -1, H, D // H).transpose(1, 2) for f, y in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        k = self.change(k)
        v = v.repeat_interleave(k.shape[2] // v.shape[2], dim=2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, -1, D)


def repeated(path, change, *, x=X, memory=None, prepare=lambda _: None, steps=7):
    model = Attention(change)
    prepare(model)
    run = watched(path, model, lambda model: model(x, x if memory is None else memory).square().mean(), steps)
    return [SimpleNamespace(heads=each.what.heads, times=each.what.times) for each in told(run, KeysRepeated)]


def test_keys_of_one_position_for_all(tmp_path):
    (found,) = repeated(tmp_path / "a", lambda k: k[:, :, :1].expand(-1, -1, T, -1))
    assert (found.heads, found.times) == (H, 0)
    (found,) = repeated(tmp_path / "b", lambda k: torch.cat([k[:, :1, :1].expand(-1, -1, T, -1), k[:, 1:]], dim=1))
    assert (found.heads, found.times) == (1, 0)


@pytest.mark.parametrize("change", [lambda k: k.repeat_interleave(2, dim=2), lambda k: k.repeat(1, 1, 2, 1)])
def test_keys_that_stand_there_twice(tmp_path, change):
    (found,) = repeated(tmp_path / "r", change)
    assert (found.heads, found.times) == (H, 2)


def zero_projection(model):
    nn.init.zeros_(model.k.weight)  # its bias is not


QUIET = {
    "healthy": {},
    "the same token everywhere": {"x": X[:, :1].expand(B, T, D)},
    "a memory of zeros": {"memory": torch.zeros(B, T, D)},
    "a projection that begins at zero": {"prepare": zero_projection},
    "a projection of zeros": {"prepare": lambda model: [nn.init.zeros_(p) for p in model.k.parameters()]},
    "one look": {"change": lambda k: k[:, :, :1].expand(-1, -1, T, -1), "steps": 4},
}


@pytest.mark.parametrize("case", QUIET)
def test_silent(tmp_path, case):
    assert repeated(tmp_path / "r", **({"change": lambda k: k} | QUIET[case])) == []


@pytest.mark.parametrize(("apart", "same"), [(SAME / 2, True), (2 * SAME, False)])
def test_keys_are_the_same_below_the_threshold(apart, same):
    k = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    k[..., 0] = 1.0
    k[0, 0, 2, 1] = apart
    assert bool(_spread_of_keys(k, 0)[0] < SAME) is same
    assert _spread_of_keys(torch.zeros(1, 1, 3, 4), 0).isnan().all()
