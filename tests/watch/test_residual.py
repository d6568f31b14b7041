"""The residual stream of foreign models: the rows are those that hooks on an unwatched copy give, or there are none."""

import copy
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model

TOKENS = torch.randint(11, (5, 7), generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class ByHand(nn.Module):
    """RMSNorm as most models write it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Unseen(ByHand):
    """The same of operators that nobody listens to."""

    def forward(self, x):
        return self.weight * (x / (x.square().mean(-1, keepdim=True) + 1e-6) ** 0.5)


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm_1, self.attn, self.norm_2 = norm(), Attention(), norm()
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Dropout(0.1))

    def forward(self, x):
        residual = x
        x = self.norm_1(x)  # what the argument is called is something else now
        x = residual + self.attn(x)
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self, norm=lambda: nn.LayerNorm(16), *, block=Block, final=None, n_layers=3):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16)
        self.h = nn.ModuleList([block(norm) for _ in range(n_layers)])
        self.final, self.head = (final or norm)(), nn.Linear(16, 11)

    def run(self, block, x):
        return block(x)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.h:
            x = self.run(block, x)
        return self.head(self.final(x))


def loss_of(model, tokens=TOKENS):
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def train(model, path=None, *, steps=2, loss_of=loss_of, **settings):
    """Train with SGD, watched where there is a path; losses, and numbers drawn after it."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []

    def each_step():
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

    if path is None:
        each_step()
    else:
        with watch_model(path=path, **({"every": 1} | settings)):
            each_step()
    return losses, torch.rand(3).tolist()


def hooked(model, blocks):
    """Where hooks put what the blocks of an unwatched model put out, in training."""
    seen = []
    for block in blocks:
        block.register_forward_hook(lambda _block, _args, out: seen.append(out.detach()))
    return seen


def rms(x):
    return x.double().square().mean().sqrt().item()


def cosine(x_BTD):
    """Over all pairs of different tokens of up to four sequences, one by one."""
    found = []
    for x_TD in x_BTD[:4].double():
        u_TD = F.normalize(x_TD, dim=-1)
        pairs = u_TD @ u_TD.T
        found.append(pairs[~torch.eye(len(pairs), dtype=torch.bool)].mean())
    return torch.stack(found).mean().item()


def rows(run, column, step=0):
    table = run.layers[run.layers["step"] == step]
    return dict(zip(table["layer"].tolist(), table[column].tolist(), strict=True))


def not_recorded(run):
    (fields,) = run.events[run.events["kind"] == "not_recorded"]["fields"]
    return fields


NONE = {"activation_rms_max", "token_cosine", "table layers"}


# -- what is recorded --


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(16), lambda: nn.RMSNorm(16), ByHand])
def test_rows_are_what_hooks_on_an_unwatched_copy_give_and_the_script_computes_the_same(tmp_path, norm):
    model, twin = GPT(norm), GPT(norm)
    done = train(model, tmp_path / "run", steps=3)
    seen = hooked(twin, twin.h)
    assert train(twin, steps=3) == done, "losses and random numbers, to the bit"
    run = open_run(tmp_path / "run")
    for step in range(3):
        outs = seen[3 * step : 3 * step + 3]
        assert rows(run, "activation_rms", step) == pytest.approx(dict(enumerate(map(rms, outs))), rel=1e-5)
        assert rows(run, "token_cosine", step) == pytest.approx(dict(enumerate(map(cosine, outs))), abs=1e-5)
        row = run.steps.iloc[step]
        assert row["activation_rms_max"] == pytest.approx(max(map(rms, outs)), rel=1e-5)
        assert row["token_cosine"] == pytest.approx(cosine(outs[-1]), abs=1e-5)
    assert not NONE & set(not_recorded(run))


def test_no_hook_is_put_on_a_module_or_on_all_of_them(tmp_path):
    found = []

    class Looks(GPT):
        def run(self, block, x):
            everywhere = vars(nn.modules.module).items()
            found.extend(hooks for name, hooks in everywhere if name.startswith("_global_") and name.endswith("hooks"))
            for module in self.modules():
                found.extend(hooks for name, hooks in vars(module).items() if name.endswith("hooks"))
            return block(x)

    model = Looks()
    before = [set(vars(module)) for module in model.modules()]
    train(model, tmp_path / "run")
    assert found and not any(found)
    assert [set(vars(module)) for module in model.modules()] == before
    assert len(open_run(tmp_path / "run").layers) == 2 * 3


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_tokens_are_along_the_axis_that_attention_runs_over(tmp_path, batch_first, norm_first):
    def make():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            16, 2, 32, dropout=0.0, batch_first=batch_first, norm_first=norm_first, layer_norm_eps=0.1
        )
        final = nn.LayerNorm(16) if norm_first else None
        return nn.Sequential(
            nn.Linear(16, 16), nn.TransformerEncoder(layer, 3, norm=final, enable_nested_tensor=False), nn.Linear(16, 3)
        )

    def loss(model):
        return model(X).square().mean()

    twin = make()
    train(make(), tmp_path / "run", loss_of=loss, steps=1)
    seen = hooked(twin, twin[1].layers)
    loss(twin)
    run = open_run(tmp_path / "run")
    assert rows(run, "activation_rms") == pytest.approx(dict(enumerate(map(rms, seen))), rel=1e-5)
    expected = {n: cosine(x if batch_first else x.transpose(0, 1)) for n, x in enumerate(seen)}
    assert rows(run, "token_cosine") == pytest.approx(expected, abs=1e-5)


def test_an_encoder_and_a_decoder_are_told_apart(tmp_path):
    """The decoder's blocks are called with the states of the encoder, too."""

    def make():
        torch.manual_seed(0)
        settings = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, **settings), 2, norm=nn.LayerNorm(16), enable_nested_tensor=False
        )
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, **settings), 3, norm=nn.LayerNorm(16))
        return nn.Transformer(16, 2, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)

    def loss(model):
        return model(X, X.flip(1)).square().mean()

    twin = make()
    train(make(), tmp_path / "run", loss_of=loss, steps=1)
    seen = hooked(twin, [*twin.encoder.layers, *twin.decoder.layers])
    loss(twin)
    run = open_run(tmp_path / "run")
    assert rows(run, "activation_rms") == pytest.approx(dict(enumerate(map(rms, seen))), rel=1e-5)
    said = run.events[run.events["kind"] == "blocks"]["fields"].tolist()
    assert [(each["name"], each["first_layer"], each["n_blocks"]) for each in said] == [
        ("encoder.layers", 0, 2),
        ("decoder.layers", 2, 3),
    ]


def test_two_models_with_the_same_paths_have_layers_of_their_own(tmp_path):
    models = nn.ModuleList([GPT(), GPT(n_layers=3)])
    nn.init.normal_(models[1].embed.weight, std=5.0)
    twins = copy.deepcopy(models)
    one, other = models  # nothing holds both
    del models

    def loss(pair):
        return loss_of(pair[0]) + loss_of(pair[1])

    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
    torch.manual_seed(1)
    with watch_model(path=tmp_path / "run", every=1):
        loss((one, other)).backward()
        optimizer.step()
    seen = hooked(twins, [*twins[0].h, *twins[1].h])
    torch.manual_seed(1)
    loss(twins)
    found = rows(open_run(tmp_path / "run"), "activation_rms")
    assert found == pytest.approx(dict(enumerate(map(rms, seen))), rel=1e-5)


def test_checkpointed_blocks_are_seen_once(tmp_path):
    class Checkpointed(GPT):
        def run(self, block, x):
            return checkpoint(block, x, use_reentrant=False)

    train(Checkpointed(), tmp_path / "run", steps=1)
    train(GPT(), tmp_path / "plain", steps=1)
    run, plain = (open_run(tmp_path / name) for name in ("run", "plain"))
    assert run.layers.equals(plain.layers)


def test_several_passes_of_a_step_are_as_one_over_all_sequences(tmp_path):
    parts = TOKENS, TOKENS[:2, :4], TOKENS[:1, :1]  # the last has no two tokens to compare

    def loss(model):
        for part in parts[1:]:
            loss_of(model, part).backward()
        return loss_of(model)

    model = GPT().eval()  # without dropout
    twin = copy.deepcopy(model)
    train(model, tmp_path / "run", steps=1, loss_of=loss)
    seen = hooked(twin, twin.h)
    for part in parts:
        twin(part)
    run = open_run(tmp_path / "run")
    for layer in range(3):
        outs = seen[layer::3]
        everything = torch.cat([x.flatten() for x in outs])
        assert rows(run, "activation_rms")[layer] == pytest.approx(rms(everything), rel=1e-5)
        expected = (4 * cosine(outs[0]) + 2 * cosine(outs[1])) / 6
        assert rows(run, "token_cosine")[layer] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_an_evaluation_between_steps_changes_no_row(tmp_path, with_gradients):
    def loss(model):
        with torch.set_grad_enabled(with_gradients):
            model.eval()
            for _ in range(20):
                model(TOKENS.flip(0))
            model.train()
        return loss_of(model)

    train(GPT(), tmp_path / "run", loss_of=loss)
    train(GPT(), tmp_path / "plain")
    run, plain = (open_run(tmp_path / name) for name in ("run", "plain"))
    assert run.layers.equals(plain.layers) and len(plain.layers) == 2 * 3


def test_only_measured_steps_have_rows(tmp_path):
    train(GPT(n_layers=2), tmp_path / "run", steps=26, every=5)
    run = open_run(tmp_path / "run")
    measured = [*range(20), 20, 25]
    assert run.layers["step"].tolist() == [step for step in measured for _ in range(2)]
    assert run.steps["step"][run.steps["activation_rms_max"].notna()].tolist() == measured


def test_a_stream_that_is_not_finite_is_recorded_as_it_is(tmp_path):
    def loss(model):
        with torch.no_grad():
            model.h[1].mlp[2].bias.fill_(math.inf)
        return loss_of(model)

    train(GPT(), tmp_path / "run", loss_of=loss, steps=1)
    run = open_run(tmp_path / "run")
    found = rows(run, "activation_rms")
    assert [math.isfinite(found[layer]) for layer in range(3)] == [True, False, False]
    assert not math.isfinite(run.steps["activation_rms_max"][0])


def test_nothing_of_the_script_is_kept_alive(tmp_path):
    alive = []

    class Notes(GPT):
        def run(self, block, x):
            y = block(x)
            alive.append(weakref.ref(y))
            return y

    model = Notes()
    alive.append(weakref.ref(model))
    with watch_model(path=tmp_path / "run", every=1):
        loss_of(model).backward()
        assert not any(each() is not None for each in alive[1:])
        del model
        assert alive[0]() is None


# -- what is not, rather than wrong --


def test_the_last_block_has_no_row_where_its_norm_cannot_be_seen(tmp_path):
    twin = GPT(Unseen)
    train(GPT(Unseen), tmp_path / "run", steps=1)
    seen = hooked(twin, twin.h)
    torch.manual_seed(1)
    loss_of(twin)
    found = rows(open_run(tmp_path / "run"), "activation_rms")
    assert found == pytest.approx({0: rms(seen[0]), 1: rms(seen[1])}, rel=1e-5)


def test_what_a_head_without_a_norm_is_given_may_be_anything(tmp_path):
    train(GPT(final=nn.Tanh), tmp_path / "run", steps=1)
    assert set(rows(open_run(tmp_path / "run"), "activation_rms")) == {0, 1}


def test_a_norm_of_something_else_after_the_last_block_is_not_its_output(tmp_path):
    class Beside(GPT):
        def forward(self, tokens):
            start = x = self.embed(tokens)
            for block in self.h:
                x = block(x)
            beside = self.final(start)
            return self.head(self.final(x) + beside)

    train(Beside(), tmp_path / "run", steps=1)
    assert set(rows(open_run(tmp_path / "run"), "activation_rms")) == {0, 1}


def test_the_stream_is_found_among_other_arguments(tmp_path):
    class Masked(Block):
        def forward(self, mask, memory=None, x=None):
            return super().forward(x) + 0 * memory + 0 * mask.sum()

    class Gives(GPT):
        def forward(self, tokens):
            memory = x = self.embed(tokens)
            for block in self.h:
                x = block(torch.zeros(1, 1, 7, 7), memory=memory, x=x)
            return self.head(self.final(x))

    twin = Gives(block=Masked)
    train(Gives(block=Masked), tmp_path / "run", steps=1)
    seen = hooked(twin, twin.h)
    torch.manual_seed(1)
    loss_of(twin)
    found = rows(open_run(tmp_path / "run"), "activation_rms")
    assert found == pytest.approx(dict(enumerate(map(rms, seen))), rel=1e-5)


def test_a_block_that_leaves_the_addition_to_the_next_one_passes_on_no_stream(tmp_path):
    """As fused norms want it: the stream, and beside it what the block has to add."""

    class Pair(Block):
        def forward(self, x, residual):
            residual = residual + x
            residual = residual + self.attn(self.norm_1(residual))
            return self.mlp(self.norm_2(residual)), residual

    class Fused(GPT):
        def forward(self, tokens):
            x = self.embed(tokens)
            residual = torch.zeros_like(x)
            for block in self.h:
                x, residual = block(x, residual)
            return self.head(self.final(x + residual))

    train(Fused(block=Pair), tmp_path / "run", steps=1)
    assert set(rows(open_run(tmp_path / "run"), "activation_rms")) <= {2}


class Lists(nn.Module):
    """Layers whose parts stand in lists of their own: no module is a block."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(6)])
        self.attentions = nn.ModuleList([Attention() for _ in range(3)])
        self.mlps = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, tokens):
        x = self.embed(tokens)
        for n in range(3):
            x = x + self.attentions[n](self.norms[2 * n](x))
            x = x + self.mlps[n](self.norms[2 * n + 1](x))
        return self.head(x)


class Unnumbered(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.first, self.second = Block(lambda: nn.LayerNorm(16)), Block(lambda: nn.LayerNorm(16))

    def forward(self, tokens):
        return self.head(self.second(self.first(self.embed(tokens))))


class Reentrant(GPT):
    def run(self, block, x):
        return checkpoint(block, x, use_reentrant=True)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Lists, "straight to the next"),
        (Unnumbered, "numbered block"),
        (Reentrant, "reentrant checkpointing"),
    ],
)
def test_a_model_without_a_stream_that_can_be_seen_has_no_rows_and_is_told_why(tmp_path, make, why):
    train(make(), tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert not len(run.layers)
    found = not_recorded(run)
    assert {name for name, reason in found.items() if why in reason} == NONE
    assert "val_loss" in found


def test_what_comes_after_a_block_that_is_not_seen_is_not_the_output_of_the_one_before_it(tmp_path):
    class Partly(GPT):
        def run(self, block, x):
            return block(x) if block is self.h[0] else checkpoint(block, x, use_reentrant=True)

    train(Partly(), tmp_path / "run")
    assert not len(open_run(tmp_path / "run").layers)


def test_as_many_sequences_as_tokens_tell_no_axis_unless_a_module_does(tmp_path):
    square = TOKENS[:, :5]
    train(GPT(), tmp_path / "run", loss_of=lambda model: loss_of(model, square))
    run = open_run(tmp_path / "run")
    assert run.layers["token_cosine"].isna().all() and run.layers["activation_rms"].notna().all()
    assert set(not_recorded(run)) == {"val_loss", "token_cosine"}
    assert "which axis" in not_recorded(run)["token_cosine"]

    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    train(model, tmp_path / "torch", loss_of=lambda model: model(X[:, :5]).square().mean())
    assert open_run(tmp_path / "torch").layers["token_cosine"].notna().all()


def test_blocks_that_are_not_differentiated_are_seen_too(tmp_path):
    model = GPT()
    for part in (model.embed, *model.h):
        part.requires_grad_(False)
    twin = copy.deepcopy(model)
    train(model, tmp_path / "run", steps=1)
    seen = hooked(twin, twin.h)
    torch.manual_seed(1)
    twin(TOKENS)
    found = rows(open_run(tmp_path / "run"), "activation_rms")
    assert found == pytest.approx({0: rms(seen[0]), 1: rms(seen[1])}, rel=1e-5)
