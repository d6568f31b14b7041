"""Training that torch.compile compiles, in whole or in part: weights bit-equal, and what the eager model shows, by the same names."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.attention.flex_attention import flex_attention

from attnscope.capture.seen import NotMeasuredError, measure
from attnscope.capture.sites import site_at
from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model
from tests.watch.foreign import entropy_by_head, entropy_of_weights, layers_of

B, T, H, K = 2, 6, 2, 8
D = H * K
STEPS = 3

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # Inductor
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning"),
]


@pytest.fixture(autouse=True)
def compiler():
    """One thread: with two, code of Inductor's does not give the same numbers twice."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)
    torch._dynamo.reset()


def trained(model, loss_of, step=None):
    """Weights after some steps, and how often Dynamo gave up on a graph; `step` is what makes a step of the optimizer."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    data = torch.Generator().manual_seed(0)
    if step is None:  # Adam would make much of the last bits, by which compiled code differs from eager code
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        step = optimizer.step
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        step = step(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(torch.randn(B, T, D, generator=data)).backward()
        step()
    n_breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return copy.deepcopy(model.state_dict()), n_breaks


def compare(path, model, prepare, step=None):
    """Train compiled without watching and with it, and eagerly; the runs of the two that are watched.

    `prepare` compiles what it is given, and returns what takes a batch to the loss.
    """
    eager, plain = copy.deepcopy(model), copy.deepcopy(model)
    weights, n_breaks = trained(plain, prepare(plain), step)
    with watch_model(model, path=path / "compiled", rows="all"):
        seen_weights, n_seen_breaks = trained(model, prepare(model), step)
    for (name, plain), seen in zip(weights.items(), seen_weights.values(), strict=True):
        assert torch.equal(plain, seen), name
    assert n_breaks == n_seen_breaks
    with watch_model(eager, path=path / "eager", rows="all"):
        trained(eager, lambda x: loss_of(eager, x))
    return open_run(path / "compiled"), open_run(path / "eager")


def loss_of(model, x):
    return model(x).square().mean()


def whole(model):
    compiled = torch.compile(model)
    return lambda x: loss_of(compiled, x)


def assert_same_layers(run, eager):
    """Of names, heads and scale, and of the entropies of every step."""
    layers = layers_of(run)
    for key in ("name", "n_heads", "d_head"):
        assert [layer[key] for layer in layers] == [layer[key] for layer in layers_of(eager)]
    scales = [layer["scale"] for layer in layers_of(eager)]
    assert [layer["scale"] for layer in layers] == pytest.approx(scales)
    assert run.heads["rows"].tolist() == eager.heads["rows"].tolist()
    for step in range(STEPS):
        for layer in range(len(layers)):
            found, expected = (entropy_by_head(each, layer, step) for each in (run, eager))
            assert torch.allclose(found, expected, atol=1e-5), (step, layers[layer]["name"])


def not_measured(run):
    found = run.events["fields"][run.events["kind"] == "not_measured"]
    return [fields["reason"] for fields in found]


class Attention(nn.Module):
    """Causal, fused or by hand; with a larger `gain`, sharper."""

    def __init__(self, gain, *, by_hand=False):
        super().__init__()
        self.by_hand = by_hand
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        with torch.no_grad():
            self.qkv.weight.mul_(gain)

    def forward(self, x):
        q, k, v = self.qkv(x).view(B, T, 3, H, K).permute(2, 0, 3, 1, 4)
        if self.by_hand:
            mixed = torch.softmax(q @ k.transpose(-1, -2) / K**0.5, dim=-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    def __init__(self, gain, **options):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(D), Attention(gain, **options)

    def forward(self, x):
        return x + self.attn(self.norm(x))


class Blocks(nn.Module):
    def __init__(self, n=3, **options):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(1.0 + 3 * number, **options) for number in range(n))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


# -- each layer by its own name, whatever is compiled --


def each_block(model):
    for block in model.blocks:
        block.compile()
    return lambda x: loss_of(model, x)


def replaced_blocks(model):
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block)
    return lambda x: loss_of(model, x)


def in_place(model):
    model.compile()
    return lambda x: loss_of(model, x)


def function(model):
    return torch.compile(lambda x: loss_of(model, x))


def function_of_the_module(model):
    compiled = torch.compile(lambda x, layer: layer(x))

    def loss(x):
        for block in model.blocks:
            x = compiled(x, block)
        return x.square().mean()

    return loss


def method_of_a_trainer(model):
    class Trainer:
        def __init__(self):
            self.parts = {"model": [model]}

        def loss(self, x):
            return loss_of(self.parts["model"][0], x)

    return torch.compile(Trainer().loss)


def forward_of_each(model):
    for block in model.blocks:
        block.attn.forward = torch.compile(block.attn.forward)
    return lambda x: loss_of(model, x)


@pytest.mark.parametrize(
    "prepare",
    [
        each_block,
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (
                whole, replaced_blocks, in_place, function, function_of_the_module, method_of_a_trainer, forward_of_each
            )
        ),
    ],
)  # fmt: skip
def test_layers_keep_their_names(tmp_path, prepare):
    run, eager = compare(tmp_path, Blocks(), prepare)
    assert_same_layers(run, eager)
    assert [layer["name"] for layer in layers_of(run)] == [f"blocks.{n}.attn" for n in range(3)]
    assert {layer["backend"] for layer in layers_of(run)} == {"compiled sdpa"}


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [each_block, whole])
def test_layers_that_attend_by_hand_keep_their_names(tmp_path, prepare):
    run, eager = compare(tmp_path, Blocks(by_hand=True), prepare)
    assert_same_layers(run, eager)
    assert {layer["backend"] for layer in layers_of(run)} == {"compiled eager"}


@pytest.mark.slow
def test_a_global_model_that_another_one_takes_the_place_of(tmp_path, monkeypatch):
    """Dynamo takes the graph of the first for the second."""
    compiled = torch.compile(call_global_model)
    first, second = Blocks(1), Blocks(1)
    with watch_model(first, path=tmp_path / "run", rows="all") as watcher:
        watcher.add_model(nn.ModuleDict({"second": second}))
        for model in (first, second):
            monkeypatch.setitem(globals(), "GLOBAL", SimpleNamespace(model=model))
            compiled(torch.randn(B, T, D))
    names = [layer["name"] for layer in layers_of(open_run(tmp_path / "run"))]
    assert names == ["blocks.0.attn", "second.blocks.0.attn"]


GLOBAL = SimpleNamespace(model=None)


def call_global_model(x):
    return GLOBAL.model(x)


# -- modules of PyTorch --


def encoder(n=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, H, 2 * D, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, n, enable_nested_tensor=False)


def test_an_encoder_with_a_mask_that_dynamo_leaves_to_eager_code(tmp_path):
    mask = nn.Transformer.generate_square_subsequent_mask(T)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder()

        def forward(self, x):
            return self.encoder(x, mask)

    run, eager = compare(tmp_path, Masked(), whole)
    assert_same_layers(run, eager)
    names = [layer["name"] for layer in layers_of(run)]
    assert names == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]


@pytest.mark.slow
def test_encoder_and_decoder_with_masks_and_padding(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.both = nn.Transformer(D, H, 1, 1, 2 * D, dropout=0.0, batch_first=True)

        def forward(self, x):
            mask = nn.Transformer.generate_square_subsequent_mask(T)
            padding = torch.zeros(B, T).masked_fill(torch.arange(T) > 3, -torch.inf)
            return self.both(x, x.flip(0), None, mask, None, padding, None, padding)

    run, eager = compare(tmp_path, Both(), whole)
    assert_same_layers(run, eager)
    assert len(layers_of(run)) == 3


@pytest.mark.slow
def test_an_encoder_without_a_mask(tmp_path):
    run, eager = compare(tmp_path, encoder(), whole)
    assert_same_layers(run, eager)
    assert {layer["backend"] for layer in layers_of(run)} == {"compiled mha"}


class Attending(nn.Module):
    """nn.MultiheadAttention with masks."""

    def __init__(self, *, need_weights, masks=dict, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attend = nn.MultiheadAttention(D, H, batch_first=True, **options)
        self.need_weights, self.masks = need_weights, masks

    def forward(self, x):
        return self.attend(x, x, x, need_weights=self.need_weights, **self.masks())[0]


def masks():
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, -2:] = True
    return {"attn_mask": hidden_mask(), "key_padding_mask": padding}


def hidden_mask():
    return torch.ones(T, T, dtype=torch.bool).triu(1)


@pytest.mark.slow
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("given", [dict, masks], ids=["plain", "masked"])
def test_attention_of_pytorch(tmp_path, need_weights, given):
    run, eager = compare(tmp_path, Attending(need_weights=need_weights, masks=given), whole)
    assert_same_layers(run, eager)
    assert layers_of(run)[0]["name"] == "attend"


@pytest.mark.slow
def test_attention_of_pytorch_that_cannot_be_measured_is_said(tmp_path):
    run, _ = compare(tmp_path, Attending(need_weights=False, add_zero_attn=True), whole)
    assert layers_of(run) == []
    assert not_measured(run) == ["nn.MultiheadAttention with add_zero_attn, compiled"]


X = torch.randn(T, B, D, generator=torch.Generator().manual_seed(1)) * 2
ADDED = torch.randn(T, T, generator=torch.Generator().manual_seed(2))
PADDING = torch.tensor([[False] * T, [False] * 4 + [True] * 2])
OF_EACH = torch.randn(B * H, T, T, generator=torch.Generator().manual_seed(3))
CALLS = {
    "nothing": {},
    "no bias": {"bias": False},
    "other keys": {"kdim": 5},
    "float mask": {"attn_mask": ADDED},
    "boolean mask": {"attn_mask": ADDED > 1},
    "a mask for each head": {"attn_mask": OF_EACH},
    "a boolean mask for each head": {"attn_mask": OF_EACH > 1},
    "padding": {"key_padding_mask": PADDING},
    "padding as numbers": {"key_padding_mask": torch.zeros(B, T).masked_fill(PADDING, -torch.inf)},
    "two masks": {"key_padding_mask": PADDING, "attn_mask": ADDED > 1},
    "two masks of two kinds": {"key_padding_mask": PADDING, "attn_mask": ADDED},
    "two masks of numbers": {
        "key_padding_mask": torch.zeros(B, T).masked_fill(PADDING, -torch.inf), "attn_mask": OF_EACH,
    },
    "causal": {"attn_mask": hidden_mask(), "is_causal": True, "need_weights": False},
    "causal and padded": {
        "attn_mask": hidden_mask(), "is_causal": True, "need_weights": False, "key_padding_mask": PADDING,
    },
    "causal with weights": {"attn_mask": hidden_mask(), "is_causal": True},
    "one sequence": {"x": X[:, 0], "key_padding_mask": PADDING[1], "attn_mask": OF_EACH[:H]},
}  # fmt: skip


def site_of(attend, x, key, **given):
    """The site of a graph with this call only, and the tensors that the probe is given."""
    graph, values = fx.Graph(), {}

    def node_of(name, value):
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(name)
        values[node] = value.detach()
        return node

    separate = attend.in_proj_weight is None
    named = {
        "query": x, "key": key, "value": key, "embed_dim_to_check": D, "num_heads": H,
        "in_proj_weight": attend.in_proj_weight, "in_proj_bias": attend.in_proj_bias,
        "bias_k": attend.bias_k, "bias_v": attend.bias_v, "add_zero_attn": attend.add_zero_attn, "dropout_p": 0.0,
        "out_proj_weight": attend.out_proj.weight, "out_proj_bias": attend.out_proj.bias,
    }  # fmt: skip
    given.update(
        use_separate_proj_weight=separate,
        q_proj_weight=attend.q_proj_weight,
        k_proj_weight=attend.k_proj_weight,
        v_proj_weight=attend.v_proj_weight,
    )
    args = tuple(node_of(name, value) for name, value in named.items())
    kwargs = {name: node_of(name, value) for name, value in given.items()}
    site, inputs = site_at(graph.call_function(F.multi_head_attention_forward, args, kwargs))
    return site, [values[node] for node in inputs]


@pytest.mark.parametrize("case", CALLS)
def test_a_call_of_multi_head_attention_against_its_weights(case):
    given = dict(CALLS[case])
    x, bias, kdim = given.pop("x", X), given.pop("bias", True), given.pop("kdim", None)
    torch.manual_seed(0)
    attend = nn.MultiheadAttention(D, H, bias=bias, kdim=kdim, vdim=kdim)
    key = x if kdim is None else x[..., :kdim]
    if bias:
        nn.init.normal_(attend.in_proj_bias)
    seen = site_of(attend, x, key, **given)
    seen = seen[0].see(seen[1])
    given["need_weights"] = True
    weights = attend(x, key, key, **given, average_attn_weights=False)[1]
    expected = entropy_of_weights(weights if weights.dim() == 4 else weights[None])
    measured = measure(seen, rows="all", seed=0)
    assert torch.allclose(measured.columns_CH[0].float(), expected, atol=1e-5)
    assert seen.scale == K**-0.5
    assert seen.q.shape == ((B, H, T, K) if x.dim() == 3 else (1, H, T, K))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"add_bias_kv": True}, "bias_k"), ({"add_zero_attn": True}, "add_zero_attn")],
)
def test_keys_that_multi_head_attention_adds_are_not_measured(options, said):
    site, tensors = site_of(nn.MultiheadAttention(D, H, **options), X, X)
    with pytest.raises(NotMeasuredError, match=f"nn.MultiheadAttention with {said}, compiled"):
        site.see(tensors)


class Breaking(nn.Module):
    """A break in a loop: Dynamo leaves this code to Python and compiles the functions that it calls, FlexAttention too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.out = nn.Linear(D, D).requires_grad_(False), nn.Linear(D, D)

    def forward(self, x):
        q = self.frozen(x).view(B, T, H, K).transpose(1, 2)
        for _ in range(2):
            torch._dynamo.graph_break()
            mixed = flex_attention(q, q, q)
            x = x + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return x


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_function_that_is_compiled_by_itself_is_seen_once(tmp_path):
    run, eager = compare(tmp_path, Breaking(), whole)
    assert_same_layers(run, eager)
    assert (run.heads["rows"] == 2 * B * T).all()


# -- optimizers --


def compiled_step(optimizer):
    return torch.compile(lambda: optimizer.step())


def compiled_method(optimizer):
    return torch.compile(optimizer.step)


@pytest.mark.slow
@pytest.mark.parametrize("step", [compiled_step, compiled_method])
def test_an_optimizer_that_is_compiled_steps_as_ever_and_it_is_said(tmp_path, step):
    run, _ = compare(tmp_path, Blocks(1), lambda model: lambda x: loss_of(model, x), step)
    assert not_measured(run) == [
        "an optimizer that steps in a compiled graph: its updates are not seen, call it outside of torch.compile"
    ]
    assert len(run.steps) == 1, "all of it is one step, as far as is seen"


@pytest.mark.slow
def test_a_whole_step_that_is_compiled(tmp_path):
    def train(model):
        torch._dynamo.reset()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        data = torch.Generator().manual_seed(0)

        @torch.compile
        def step(x):
            loss = loss_of(model, x)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(STEPS):
            step(torch.randn(B, T, D, generator=data))
        return model.state_dict()

    plain = train(Blocks(2))
    model = Blocks(2)
    with watch_model(model, path=tmp_path / "run"):
        watched = train(model)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    run = open_run(tmp_path / "run")
    assert [layer["name"] for layer in layers_of(run)] == ["blocks.0.attn", "blocks.1.attn"]
    assert "optimizer that steps in a compiled graph" in " ".join(not_measured(run))


# -- what is left of watching --


def test_functions_of_pytorch_found_while_it_was_watched_go_on_as_before(tmp_path):
    """They are ours still where the script kept them in a container of its own."""
    with watch_model(nn.Linear(1, 1), path=tmp_path / "run"):
        kept = {"softmax": F.softmax}
    x = torch.randn(2, 3, 4)
    assert torch.equal(kept["softmax"](x, dim=-1), F.softmax(x, dim=-1))
    compiled = torch.compile(lambda x: kept["softmax"](x, dim=-1), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), F.softmax(x, dim=-1))


class Attends(nn.Module):
    """A block without a feed-forward part."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, H, K)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Stacked(nn.Module):
    """Blocks one after the other, and a final norm."""

    def __init__(self, n_eager):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.norm = nn.ModuleList([Attends() for _ in range(3)]), nn.LayerNorm(D)
        for layer in self.layers[n_eager:]:
            layer.compile()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


@pytest.mark.parametrize("n_eager", [0, 1])
def test_the_stream_is_not_seen_in_compiled_blocks_nor_mistaken_after_them(tmp_path, n_eager):
    with watch_model(path=tmp_path / "run"):
        model = Stacked(n_eager)
        trained(model, lambda x: loss_of(model, x))
    run = open_run(tmp_path / "run")
    assert len(layers_of(run)) == 3
    assert not len(run.layers)
    (fields,) = run.events[run.events["kind"] == "not_recorded"]["fields"]
    assert "compiled graphs" in fields["table layers"]
