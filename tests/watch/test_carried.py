"""Whether a block adds to its stream, read from the graph of blocks of many kinds: right, or silent."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from attnscope.runs.probe_events import InputCarried
from attnscope.runs.probed import told
from attnscope.runs.reader import open_run
from tests.watch.test_residual import GPT, Block, ByHand, train


def block_of(forward, **modules):
    """A block class with this forward pass."""

    class Another(Block):
        def __init__(self, norm):
            super().__init__(norm)
            for name, module in modules.items():
                setattr(self, name, module())

    Another.forward = forward
    return Another


def attended(self, x):
    return self.attn(self.norm_1(x))


def grown(self, x):
    return self.mlp(self.norm_2(x))


def without_attentions(self, x):
    x = attended(self, x)
    return x + grown(self, x)


def without_mlps(self, x):
    x = x + attended(self, x)
    return grown(self, x)


def without_any(self, x):
    return grown(self, attended(self, x))


def post_norm(self, x):
    x = self.norm_1(x + self.attn(x))
    return self.norm_2(x + self.mlp(x))


def post_norm_without_attentions(self, x):
    x = self.norm_1(self.attn(x))
    return self.norm_2(x + self.mlp(x))


def parallel(self, x):
    return x + self.attn(self.norm_1(x)) + self.mlp(self.norm_1(x))


def in_place(self, x):
    y = attended(self, x)
    y += x
    x = grown(self, y)
    x += y
    return x


def highway(self, x):
    x = x + attended(self, x)
    gate = self.gate(x).sigmoid()
    return gate * grown(self, x) + (1 - gate) * x


def gated_recurrent(self, x):
    update = self.gate(x).sigmoid()
    x = (1 - update) * x + update * attended(self, x).tanh()
    return torch.lerp(x, grown(self, x), update)


def from_zero(self, x):
    x = x + self.alpha * attended(self, x)
    return x + self.alpha * grown(self, x)


def detached(self, x):
    x = x.detach() + attended(self, x)
    return x.detach() + grown(self, x)


def concatenated(self, x):
    x = torch.cat([x[..., :8], attended(self, x)[..., 8:]], dim=-1)
    return x + grown(self, x)


def attention_alone(self, x):
    return attended(self, x)


def looks_twice(self, x):
    x = self.attn(self.norm_1(x))
    x = x + self.attn(self.norm_2(x))
    return x + self.mlp(x)


KINDS = {
    "pre-norm": (Block, (True, True)),
    "post-norm": (block_of(post_norm), (True, True)),
    "parallel": (block_of(parallel), (True, True)),
    "highway": (block_of(highway, gate=lambda: nn.Linear(16, 16)), (True, True)),
    "gated": (block_of(gated_recurrent, gate=lambda: nn.Linear(16, 16)), (True, True)),
    "from zero": (block_of(from_zero, alpha=lambda: nn.Parameter(torch.zeros(1))), (True, True)),
    "concatenated": (block_of(concatenated), (True, True)),
    "attention in its place": (block_of(without_attentions), (False, True)),
    "attention in its place, post-norm": (block_of(post_norm_without_attentions), (False, True)),
    "MLP in its place": (block_of(without_mlps), (True, False)),
    "both in its place": (block_of(without_any), (False, False)),
    "attention alone": (block_of(attention_alone), (False, None)),
    "added in place to a view": (block_of(in_place), None),
    "stream detached": (block_of(detached), None),
    "attention twice": (block_of(looks_twice), None),
}


def seen_of(run):
    return {each.what.layer: (each.what.attention, each.what.mlp) for each in told(run, InputCarried)}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_of_a_block(tmp_path, kind):
    block, expected = KINDS[kind]
    model = GPT(ByHand if "norm" in kind else lambda: nn.LayerNorm(16), block=block)
    train(model, tmp_path / "run", steps=2)
    seen = seen_of(open_run(tmp_path / "run"))
    assert set(seen.values()) == (set() if expected is None else {expected})
    assert expected is None or {0, 1} <= set(seen)


def test_a_model_that_adds_outside_of_its_blocks(tmp_path):
    class Adds(GPT):
        def run(self, block, x):
            return x + block(x)

    train(Adds(block=block_of(attention_alone)), tmp_path / "run", steps=2)
    assert set(seen_of(open_run(tmp_path / "run")).values()) <= {(True, True)}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_are_silent_or_right(tmp_path, reentrant):
    class Checkpointed(GPT):
        def run(self, block, x):
            return checkpoint(block, x, use_reentrant=reentrant)

    train(Checkpointed(block=block_of(without_attentions)), tmp_path / "run", steps=2)
    assert set(seen_of(open_run(tmp_path / "run")).values()) <= {(False, True)}
    train(Checkpointed(), tmp_path / "healthy", steps=2)
    assert set(seen_of(open_run(tmp_path / "healthy")).values()) <= {(True, True)}


@pytest.mark.parametrize("norm_first", [True, False])
def test_layers_of_torch_carry_their_input(tmp_path, norm_first):
    class Encoder(GPT):
        def __init__(self):
            super().__init__()
            self.h = nn.ModuleList(
                [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first) for _ in range(3)]
            )

    train(Encoder(), tmp_path / "run", steps=2)
    assert set(seen_of(open_run(tmp_path / "run")).values()) == {(True, True)}


def test_autocast_changes_nothing(tmp_path):
    class Cast(GPT):
        def forward(self, tokens):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(tokens).float()

    for block, expected in ((Block, (True, True)), (block_of(without_attentions), (False, True))):
        path = tmp_path / str(expected[0])
        train(Cast(block=block), path, steps=2)
        assert set(seen_of(open_run(path)).values()) == {expected}
