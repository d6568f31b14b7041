"""FlexAttention, flash-attn and xFormers, each against logits computed one by one.

flash-attn and xFormers need a GPU: modules with their signatures stand in for them and return the queries, as the watcher
reads nothing but arguments. FlexAttention has no backward pass on a CPU: what it is given is frozen here, and what follows
it is trained.
"""

import importlib.util
import itertools
import math
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from attnscope.capture.flex import flex_call
from attnscope.capture.seen import NotMeasuredError, measure
from attnscope.metrics.rows import sample_rows
from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model
from tests.watch.foreign import entropy_by_head, entropy_of_weights, layers_of, train_watched

B, T, S, H, K = 2, 7, 9, 4, 8
D = H * K
X = torch.randn(B, S, D, generator=torch.Generator().manual_seed(0)) * 2
SLOPES = [0.5, 0.25, 0.125, 0.0625]
DOCUMENTS = [[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1, 1]]

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # Inductor
]
compiles = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


def everything(*_):
    return True


def unchanged(z, *_):
    return z


def weights_one_by_one(q_BTHK, k_BSHK, scale, *, visible=everything, score=unchanged):
    """softmax(z) from a loop over all logits, (B, H, T, S); 0 in rows that see nothing."""
    (n_batch, n_queries, n_heads, _), n_keys = q_BTHK.shape, k_BSHK.shape[1]
    shared = n_heads // k_BSHK.shape[2]
    q, k = q_BTHK.double(), k_BSHK.double()
    z = torch.full((n_batch, n_heads, n_queries, n_keys), -torch.inf, dtype=torch.float64)
    for b, h, i, j in itertools.product(*map(range, z.shape)):
        if visible(b, h, i, j):
            z[b, h, i, j] = score(scale * float(q[b, i, h] @ k[b, j, h // shared]), b, h, i, j)
    return z.softmax(dim=-1).nan_to_num(0.0)


class Attending(nn.Module):
    """Gives q (B, T, H, K) and k, v (B, S, n_kv_heads, K) to `attend`; leaves q and k behind."""

    def __init__(self, attend, *, n_queries=T, n_kv_heads=H, frozen=False):
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.n_queries = attend, n_queries
        self.q, self.kv = nn.Linear(D, D), nn.Linear(D, 2 * n_kv_heads * K)
        self.out = nn.Linear(D, D)
        if frozen:
            self.q.requires_grad_(False)
            self.kv.requires_grad_(False)

    def forward(self, x):
        q = self.q(x[:, -self.n_queries :]).unflatten(-1, (-1, K))
        k, v = self.kv(x).unflatten(-1, (2, -1, K)).unbind(-3)
        self.heads = q.detach(), k.detach()
        return self.out(self.attend(q, k, v).flatten(-2))


def loss_of(model):
    return model(X).square().mean()


def not_measured(run, backend):
    """Reasons why calls of a backend were not measured."""
    found = run.events["fields"][run.events["kind"] == "not_measured"]
    return [fields["reason"] for fields in found if fields["backend"] == backend]


# -- FlexAttention --


def flex(score_mod=None, block_mask=None, **options):
    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(q, k, v, score_mod, block_mask, **options).transpose(1, 2)

    return attend


def block_mask_of(mask_mod, *, per_sequence=False):
    return create_block_mask(mask_mod, B if per_sequence else None, None, T, S, device="cpu")


slopes, documents = torch.tensor(SLOPES), torch.tensor(DOCUMENTS)
by_distance = torch.randn(H, T + S, generator=torch.Generator().manual_seed(1))
table = by_distance.tolist()


def documents_mask(b, h, i, j):
    return documents[b, i + 2] == documents[b, j]


# mask_mod, score_mod, and the same of plain numbers.
FLEX = {
    "nothing": (None, None, everything, unchanged),
    "causal": (lambda b, h, i, j: i >= j, None, lambda b, h, i, j: i >= j, unchanged),
    "window": (
        lambda b, h, i, j: (i >= j) & (i - j < 3), None, lambda b, h, i, j: 0 <= i - j < 3, unchanged,
    ),
    "documents": (
        documents_mask, None, lambda b, h, i, j: DOCUMENTS[b][i + 2] == DOCUMENTS[b][j], unchanged,
    ),
    "heads": (
        lambda b, h, i, j: (h % 2 == 0) | (j < 4), None, lambda b, h, i, j: h % 2 == 0 or j < 4, unchanged,
    ),
    "alibi": (
        None, lambda z, b, h, i, j: z - slopes[h] * (i - j).abs(),
        everything, lambda z, b, h, i, j: z - SLOPES[h] * abs(i - j),
    ),
    "soft-cap": (
        lambda b, h, i, j: i >= j, lambda z, b, h, i, j: 2 * torch.tanh(z / 2),
        lambda b, h, i, j: i >= j, lambda z, b, h, i, j: 2 * math.tanh(z / 2),
    ),
    "learned": (
        None, lambda z, b, h, i, j: z + by_distance[h][i - j + S],
        everything, lambda z, b, h, i, j: z + table[h][i - j + S],
    ),
    "hidden by the score": (
        None, lambda z, b, h, i, j: torch.where(i >= j, z, -float("inf")), lambda b, h, i, j: i >= j, unchanged,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FLEX)
def test_flex_attention(tmp_path, case):
    mask_mod, score_mod, visible, score = FLEX[case]
    block_mask = mask_mod and block_mask_of(mask_mod, per_sequence=case == "documents")
    model = Attending(flex(score_mod, block_mask), frozen=True)
    run = train_watched(tmp_path / "run", model, loss_of)
    (layer,) = layers_of(run)
    names = {"mask_mod": mask_mod, "score_mod": score_mod}
    assert layer["mask"] == (" and ".join(name for name in names if names[name]) or "none")
    assert (layer["name"], layer["backend"], layer["n_heads"]) == ("Attending", "flex", H)
    assert layer["scale"] == pytest.approx(K**-0.5)
    weights = weights_one_by_one(*model.heads, K**-0.5, visible=visible, score=score)
    assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(weights), atol=1e-5)
    hidden_rows = ((weights[:, 0] > 0).sum(dim=-1) < 2).sum()
    assert run.heads["rows_left_out"].iloc[0] == int(hidden_rows)
    assert not_measured(run, "flex") == []
    assert math.isnan(run.heads["max_logit_bound"].iloc[0]) == (score_mod is not None)


def test_flex_attention_with_grouped_queries_and_a_scale_of_its_own(tmp_path):
    block_mask = block_mask_of(lambda b, h, i, j: i >= j)
    attend = flex(block_mask=block_mask, scale=0.3, enable_gqa=True)
    model = Attending(attend, n_kv_heads=H // 2, frozen=True)
    run = train_watched(tmp_path / "run", model, loss_of)
    (layer,) = layers_of(run)
    assert (layer["n_heads"], layer["scale"]) == (H, pytest.approx(0.3))
    weights = weights_one_by_one(*model.heads, 0.3, visible=lambda b, h, i, j: i >= j)
    assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(weights), atol=1e-5)


def test_several_block_masks_in_one_model(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                Attending(flex(block_mask=block_mask_of(FLEX[case][0])), frozen=True) for case in ("causal", "window")
            )

        def forward(self, x):
            return self.layers[0](x) + self.layers[1](x)

    model = Two()
    run = train_watched(tmp_path / "run", model, loss_of)
    assert [layer["name"] for layer in layers_of(run)] == ["layers.0", "layers.1"]
    for number, case in enumerate(("causal", "window")):
        weights = weights_one_by_one(*model.layers[number].heads, K**-0.5, visible=FLEX[case][2])
        assert torch.allclose(entropy_by_head(run, number), entropy_of_weights(weights), atol=1e-5)


@pytest.mark.parametrize("case", ["documents", "soft-cap"])
def test_sampled_rows_are_those_of_all_rows(case):
    mask_mod, score_mod, visible, score = FLEX[case]
    model = Attending(flex(), frozen=True)
    model(X)
    q, k = (x.transpose(1, 2) for x in model.heads)
    seen = flex_call(q, k, None, score_mod, mask_mod, factor=1.0, backend="flex")
    rows = sample_rows(n_batch=B, n_queries=T, rows=6, seed=3, device=q.device)
    weights = weights_one_by_one(*model.heads, K**-0.5, visible=visible, score=score)
    cut = weights[rows.sequences][:, :, rows.positions]
    found = measure(seen, rows=6, seed=3).columns_CH
    assert cut.shape[0] * cut.shape[2] == 6
    assert torch.allclose(found[0], entropy_of_weights(cut), atol=1e-5)


def test_a_score_mod_that_fails_is_a_reason_and_draws_no_random_numbers():
    q = torch.randn(B, H, T, K)
    before = torch.get_rng_state()

    def failing(z, b, h, i, j):
        return z / (1 // 0)

    def random(z, b, h, i, j):
        return z + torch.rand(())

    for mod, reason in ((failing, "ZeroDivisionError"), (random, "RuntimeError")):
        seen = flex_call(q, q, None, mod, None, factor=1.0, backend="flex")
        with pytest.raises(NotMeasuredError, match=f"^score_mod raised {reason}: "):
            measure(seen, rows="all", seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_mods_run_without_gradients_and_without_autocast():
    modes = []

    def mod(z, b, h, i, j):
        modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), z.dtype))
        return z

    q = torch.randn(B, H, T, K, dtype=torch.bfloat16)
    with torch.autocast("cpu"):
        measure(flex_call(q, q, None, mod, None, factor=1.0, backend="flex"), rows="all", seed=0)
    assert set(modes) == {(False, False, torch.float32)}


def test_watching_flex_attention_changes_no_number(tmp_path):
    def losses(watched):
        attend = flex(FLEX["soft-cap"][1], block_mask_of(FLEX["causal"][0]))
        model = Attending(lambda *heads: F.dropout(attend(*heads)), frozen=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        torch.manual_seed(5)

        def train():
            for _ in range(3):
                optimizer.zero_grad()
                loss = loss_of(model)
                loss.backward()
                optimizer.step()
                found.append(loss.item())

        if watched:
            with watch_model(model, optimizer, tmp_path / "run", every=1, rows=6):
                train()
        else:
            train()
        return found, torch.rand(3).tolist()

    assert losses(watched=True) == losses(watched=False)
    assert len(open_run(tmp_path / "run").heads) == 3 * H


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def watched_forward(path, model, call, n=1):
    """Outputs of `call` without watching and with it, and the run."""
    with torch.no_grad():
        plain = [call(X) for _ in range(n)]
        torch._dynamo.reset()
        with watch_model(model, path=path, rows="all"):
            watched = [call(X) for _ in range(n)]
    return plain, watched, open_run(path)


@compiles
def test_flex_attention_in_a_compiled_model(tmp_path, compiler):
    class Chunked(Attending):
        """Inductor on a CPU takes no other views for q."""

        def __init__(self, attend):
            super().__init__(attend)
            self.qkv = nn.Linear(D, 3 * D)

        def forward(self, x):
            q, k, v = (y.view(B, S, H, K) for y in self.qkv(x).chunk(3, dim=-1))
            self.heads = q.detach(), k.detach()
            return self.out(self.attend(q, k, v).flatten(-2))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            mask = create_block_mask(same_document, B, None, S, S, device="cpu")
            self.documents = Chunked(flex(FLEX["soft-cap"][1], mask))
            self.plain = Chunked(flex(scale=0.3))

        def forward(self, x):
            return self.documents(x) + self.plain(x)

    def same_document(b, h, i, j):
        return documents[b, i] == documents[b, j]

    def visible(b, h, i, j):
        return DOCUMENTS[b][i] == DOCUMENTS[b][j]

    model = Two()
    compiled = torch.compile(model)
    plain, watched, run = watched_forward(tmp_path / "run", model, compiled)
    assert torch.equal(plain[0], watched[0])
    layers = layers_of(run)
    assert [(layer["name"], layer["backend"], layer["mask"]) for layer in layers] == [
        ("documents", "compiled flex", "mask_mod and score_mod"),
        ("plain", "compiled flex", "none"),
    ]
    assert [layer["scale"] for layer in layers] == pytest.approx([K**-0.5, 0.3])
    assert run.events["fields"][run.events["kind"] == "not_measured"].tolist() == []
    with torch.no_grad():
        model(X)
    for number, (layer, sees, score, scale) in enumerate((
        (model.documents, visible, FLEX["soft-cap"][3], K**-0.5),
        (model.plain, everything, unchanged, 0.3),
    )):  # fmt: skip
        weights = weights_one_by_one(*layer.heads, scale, visible=sees, score=score)
        assert torch.allclose(entropy_by_head(run, number), entropy_of_weights(weights), atol=1e-5)


@compiles
def test_the_compiled_function_in_models_that_are_not_compiled(tmp_path, compiler, monkeypatch):
    """As the documentation of FlexAttention has it. The second window is a number that the graph takes as an input."""
    function = torch.compile(flex_attention)

    def within(window):
        def attend(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            mask = block_mask_of(lambda b, h, i, j: (i >= j) & (i - j < window))
            return function(q, k, v, block_mask=mask).transpose(1, 2)

        return attend

    model = nn.Sequential(*(Attending(within(window), n_queries=T, frozen=True) for window in (3, 4, 5)))

    def call(x):
        return torch.stack([layer(x) for layer in model])

    plain, watched, run = watched_forward(tmp_path / "run", model, call)
    assert torch.equal(plain[0], watched[0])
    assert [layer["name"] for layer in layers_of(run)] == ["0", "1", "2"]
    assert {layer["backend"] for layer in layers_of(run)} == {"compiled flex"}
    for number, window in enumerate((3, 4, 5)):
        weights = weights_one_by_one(*model[number].heads, K**-0.5, visible=lambda b, h, i, j, w=window: 0 <= i - j < w)
        assert torch.allclose(entropy_by_head(run, number), entropy_of_weights(weights), atol=1e-5)


def attend_fused(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@compiles
@pytest.mark.parametrize("attend", [attend_fused, flex()], ids=["sdpa", "flex"])
def test_checkpoints_in_a_compiled_model(tmp_path, compiler, attend):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Attending(attend, n_queries=S, frozen=attend is not attend_fused)

        def forward(self, x):
            return checkpoint(self.layer, x, use_reentrant=False)

    model = Checkpointed()
    compiled = torch.compile(model)
    run = train_watched(tmp_path / "run", model, lambda _: loss_of(compiled))
    assert [layer["name"] for layer in layers_of(run)] == ["layer"]
    assert len(run.heads) == H and (run.heads["rows"] == B * S).all(), "once, and not in backward"
    assert not_measured(run, layers_of(run)[0]["backend"]) == []
    with torch.no_grad():
        model.layer(X)
    weights = weights_one_by_one(*model.layer.heads, K**-0.5)
    assert entropy_by_head(run, 0).sub(entropy_of_weights(weights)).abs().max() < 0.01, "one step on"


@compiles
def test_blocks_that_a_compiled_kernel_leaves_out_are_not_seen(tmp_path, compiler):
    """Block-sparse attention: no mask_mod, but a choice of blocks."""
    n, size = 256, 128
    block_mask = BlockMask.from_kv_blocks(
        kv_num_blocks=torch.tensor([[[1, 1]]], dtype=torch.int32),
        kv_indices=torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32),
        BLOCK_SIZE=size,
    )
    function = torch.compile(flex_attention)
    q = torch.randn(1, 2, n, K, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), watch_model(nn.Linear(1, 1), path=tmp_path / "run", rows="all"):
        function(q, q, q, block_mask=block_mask)
    visible = torch.zeros(n, n, dtype=torch.bool)
    visible[:size, size:] = visible[size:, :size] = True
    weights = (q @ q.mT * K**-0.5).masked_fill(~visible, -torch.inf).softmax(dim=-1)
    run = open_run(tmp_path / "run")
    assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(weights), atol=1e-5)


# -- flash-attn and xFormers --

FLASH = '''
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):
    return q

def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                              alibi_slopes=None, deterministic=False, return_attn_probs=False):
    return qkv[:, :, 0]

def flash_attn_kvpacked_func(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                             alibi_slopes=None, deterministic=False, return_attn_probs=False):
    return q

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):
    return q

def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False,
                                     window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                                     return_attn_probs=False):
    return qkv[:, 0]

def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, softmax_scale=None, causal=False):
    return q
'''  # fmt: skip

XFORMERS = '''
import torch

class LowerTriangularMask:
    pass

class BlockDiagonalMask:
    def __init__(self, sizes):
        self.sizes = sizes

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        blocks = [torch.ones(q, k, dtype=dtype, device=device) for q, k in self.sizes]
        return torch.block_diag(*blocks).log()

class GappyMask:
    pass

def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    return query

def memory_efficient_attention_partial(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    return query, None
'''  # fmt: skip


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """Packages that can be imported, and are not yet."""
    for name, inner, code in (
        ("flash_attn", "flash_attn_interface", FLASH),
        ("xformers", "", ""),
        ("xformers.ops", "fmha", XFORMERS),
    ):
        folder = tmp_path / "libraries" / name.replace(".", "/")
        folder.mkdir(parents=True)
        reading = f"from {name}.{inner} import *\n" if inner else ""
        (folder / "__init__.py").write_text(reading)
        if inner:
            (folder / f"{inner}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "libraries")
    yield
    for name in [name for name in sys.modules if name.startswith(("flash_attn", "xformers"))]:
        del sys.modules[name]


def distance(i, j):
    """Before the key that the query stands at, where the last ones stand at each other."""
    return i + S - T - j


FLASH_CASES = {
    "nothing": ({}, everything, unchanged, "none"),
    "causal": ({"causal": True}, lambda b, h, i, j: distance(i, j) >= 0, unchanged, "causal"),
    "window": (
        {"window_size": (2, 1)}, lambda b, h, i, j: -1 <= distance(i, j) <= 2, unchanged, "window",
    ),
    "causal window": (
        {"causal": True, "window_size": (2, 5)}, lambda b, h, i, j: 0 <= distance(i, j) <= 2, unchanged, "causal, window",
    ),
    "soft-cap": (
        {"softcap": 2.0}, everything, lambda z, *_: 2 * math.tanh(z / 2), "soft-cap",
    ),
    "alibi": (
        {"alibi_slopes": torch.tensor(SLOPES)},
        everything, lambda z, b, h, i, j: z - SLOPES[h] * abs(distance(i, j)), "alibi",
    ),
    "alibi of each sequence": (
        {"alibi_slopes": torch.tensor([SLOPES, SLOPES[::-1]]), "softcap": 3.0, "causal": True},
        lambda b, h, i, j: distance(i, j) >= 0,
        lambda z, b, h, i, j: 3 * math.tanh(z / 3) - SLOPES[h if b == 0 else -1 - h] * abs(distance(i, j)),
        "causal, soft-cap, alibi",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FLASH_CASES)
def test_flash_attn(tmp_path, libraries, case):
    import flash_attn

    given, visible, score, mask = FLASH_CASES[case]
    model = Attending(lambda q, k, v: flash_attn.flash_attn_func(q, k, v, 0.0, 0.3, **given), n_kv_heads=2)  # fmt: skip
    run = train_watched(tmp_path / "run", model, loss_of)
    (layer,) = layers_of(run)
    assert (layer["name"], layer["backend"], layer["mask"]) == ("Attending", "flash-attn", mask)
    assert (layer["n_heads"], layer["scale"]) == (H, pytest.approx(0.3))
    weights = weights_one_by_one(*model.heads, 0.3, visible=visible, score=score)
    assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(weights), atol=1e-5)
    bound, largest = run.heads["max_logit_bound"], run.heads["max_logit"]
    assert bound.isna().all() if "alibi" in mask else (bound >= largest).all()
    if case == "soft-cap":
        assert (bound == 2.0).all()


def test_flash_attn_of_packed_projections(tmp_path, libraries):
    import flash_attn

    class Packed(Attending):
        def forward(self, x):
            q, kv = self.q(x).unflatten(-1, (1, -1, K)), self.kv(x).unflatten(-1, (2, -1, K))
            self.heads = q[:, :, 0].detach(), kv[:, :, 0].detach()
            qkv = torch.cat([q, kv], dim=2)
            first = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
            second = flash_attn.flash_attn_kvpacked_func(q[:, :, 0], kv, causal=True)
            return self.out((first + second).flatten(-2))

    model = Packed(None)
    run = train_watched(tmp_path / "run", model, loss_of)
    weights = weights_one_by_one(*model.heads, K**-0.5, visible=lambda b, h, i, j: i >= j)
    assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(weights), atol=1e-5)
    assert run.heads["rows_left_out"].sum() == 2 * 2 * H, "two calls, one row of each sequence"
    assert not_measured(run, "flash-attn") == []


@pytest.mark.parametrize("rows", ["all", 5])
def test_flash_attn_of_documents_in_a_row(tmp_path, libraries, rows):
    import flash_attn

    starts_q, starts_k = [0, 2, 7, 12], [0, 4, 9, 16]  # of 14 and 18 tokens: the rest is padding
    lengths = torch.tensor(starts_q, dtype=torch.int32), torch.tensor(starts_k, dtype=torch.int32)
    slopes_NH = torch.tensor([SLOPES, [0.0] * H, SLOPES[::-1]])

    def attend(q, k, v):
        packed = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        out = flash_attn.flash_attn_varlen_func(
            *packed, *lengths, 5, 7, causal=True, window_size=(3, 0), alibi_slopes=slopes_NH
        )
        return out.unflatten(0, (B, T))

    model = Attending(attend)
    run = train_watched(tmp_path / "run", model, loss_of, rows=rows)
    (layer,) = layers_of(run)
    assert layer["mask"] == "causal, window, documents, alibi"

    def place(starts, token):
        return next((n for n in range(3) if starts[n] <= token < starts[n + 1]), None)

    def before(i, j):
        n = place(starts_q, i)
        return starts_k[n + 1] - j - (starts_q[n + 1] - i)

    def visible(b, h, i, j):
        n = place(starts_q, i)
        return n is not None and n == place(starts_k, j) and 0 <= before(i, j) <= 3

    def score(z, b, h, i, j):
        return z - float(slopes_NH[place(starts_q, i), h]) * abs(before(i, j))

    q, k = (x.flatten(0, 1)[None] for x in model.heads)
    weights = weights_one_by_one(q, k, K**-0.5, visible=visible, score=score)
    if rows != "all":
        at = sample_rows(n_batch=1, n_queries=B * T, rows=rows, seed=0, device=q.device).positions
        weights = weights[:, :, at]
    assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(weights), atol=1e-5)


def test_flash_attn_of_packed_documents_in_a_row(tmp_path, libraries):
    import flash_attn

    lengths = torch.tensor([0, 4, B * S], dtype=torch.int32)

    def attend(q, k, v):
        packed = torch.stack([q, k, v], dim=2).flatten(0, 1)
        return flash_attn.flash_attn_varlen_qkvpacked_func(packed, lengths, 14).unflatten(0, (B, S))

    model = Attending(attend, n_queries=S)
    run = train_watched(tmp_path / "run", model, loss_of)
    q, k = (x.flatten(0, 1)[None] for x in model.heads)
    weights = weights_one_by_one(q, k, K**-0.5, visible=lambda b, h, i, j: (i < 4) == (j < 4))
    assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(weights), atol=1e-5)


def test_what_flash_attn_computes_in_another_way_is_said(tmp_path, libraries):
    import flash_attn

    pages = torch.zeros(1, 1, dtype=torch.int32)
    ends = torch.tensor([0, B * T], dtype=torch.int32), torch.tensor([0, B * S], dtype=torch.int32)

    def attend(q, k, v):
        flash_attn.flash_attn_with_kvcache(q, k, v)
        packed = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        flash_attn.flash_attn_varlen_func(*packed, *ends, B * T, B * S, block_table=pages)
        return q

    run = train_watched(tmp_path / "run", Attending(attend), loss_of, steps=2)
    assert not_measured(run, "flash-attn") == [
        "argument k_cache, of which attnscope does not know what it does",
        "argument block_table, of which attnscope does not know what it does",
    ]
    assert layers_of(run) == []


def test_a_multiplication_before_the_call_belongs_to_the_scale(tmp_path, libraries):
    import flash_attn

    def attend(q, k, v):
        return flash_attn.flash_attn_func(q * 0.5, k, v, softmax_scale=1.0)

    run = train_watched(tmp_path / "run", Attending(attend), loss_of)
    assert layers_of(run)[0]["scale"] == 0.5


def test_xformers(tmp_path, libraries):
    import xformers.ops as xops

    added = torch.randn(B, H, T, S, generator=torch.Generator().manual_seed(1))
    blocks = xops.BlockDiagonalMask([(3, 4), (4, 5)])
    numbers = added.tolist()
    cases = (
        (None, everything, unchanged, "none"),
        (added, everything, lambda z, b, h, i, j: z + numbers[b][h][i][j], "float"),
        (added[0, 0], everything, lambda z, b, h, i, j: z + numbers[0][0][i][j], "float"),
        (xops.LowerTriangularMask(), lambda b, h, i, j: i >= j, unchanged, "causal"),
        (blocks, lambda b, h, i, j: (i < 3) == (j < 4), unchanged, "BlockDiagonalMask"),
    )
    for number, (bias, visible, score, mask) in enumerate(cases):
        model = Attending(lambda q, k, v, bias=bias: xops.memory_efficient_attention(q, k, v, bias, scale=0.3))  # fmt: skip
        run = train_watched(tmp_path / f"run-{number}", model, loss_of)
        (layer,) = layers_of(run)
        assert (layer["backend"], layer["mask"]) == ("xformers", mask)
        assert (layer["n_heads"], layer["scale"]) == (H, pytest.approx(0.3))
        weights = weights_one_by_one(*model.heads, 0.3, visible=visible, score=score)
        assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(weights), atol=1e-5)


def test_xformers_without_an_axis_of_heads_or_with_groups_of_them(tmp_path, libraries):
    import xformers.ops as xops

    added = torch.randn(B, T, S, generator=torch.Generator().manual_seed(1))

    def single(q, k, v):
        return xops.memory_efficient_attention(q[:, :, 0], k[:, :, 0], v[:, :, 0], added)[:, :, None].expand_as(q)  # fmt: skip

    def grouped(q, k, v):
        q, k, v = (x.unflatten(2, (2, 2)) for x in (q, k, v))
        return xops.memory_efficient_attention(q, k, v).flatten(2, 3)

    model = Attending(single)
    run = train_watched(tmp_path / "single", model, loss_of)
    q, k = (x[:, :, :1] for x in model.heads)
    weights = weights_one_by_one(q, k, K**-0.5, score=lambda z, b, h, i, j: z + float(added[b, i, j]))  # fmt: skip
    assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(weights), atol=1e-5)
    model = Attending(grouped)
    run = train_watched(tmp_path / "grouped", model, loss_of)
    weights = weights_one_by_one(*model.heads, K**-0.5)
    assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(weights), atol=1e-5)


def test_what_xformers_computes_in_another_way_is_said(tmp_path, libraries):
    import xformers.ops as xops

    def attend(q, k, v):
        xops.memory_efficient_attention(q, k, v, attn_bias=xops.GappyMask())
        xops.memory_efficient_attention_partial(q, k, v)
        return q

    run = train_watched(tmp_path / "run", Attending(attend), loss_of, steps=2)
    assert not_measured(run, "xformers") == [
        "attn_bias is a GappyMask, which has no materialize()",
        "attention over some of the keys, to be merged with that over others",
    ]


def test_a_library_imported_while_it_is_watched(tmp_path, libraries):
    before = list(sys.meta_path)

    def attend(q, k, v):
        from flash_attn.flash_attn_interface import flash_attn_func

        return flash_attn_func(q, k, v)

    assert "flash_attn" not in sys.modules
    model = Attending(attend)
    run = train_watched(tmp_path / "run", model, loss_of)
    assert torch.allclose(
        entropy_by_head(run, 0),
        entropy_of_weights(weights_one_by_one(*model.heads, K**-0.5)),
        atol=1e-5,
    )
    import flash_attn

    assert sys.meta_path == before
    for module in (flash_attn, sys.modules["flash_attn.flash_attn_interface"]):
        assert not hasattr(module.flash_attn_func, "__wrapped__"), "put back"
        assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"  # fmt: skip


def test_a_library_that_is_only_looked_for_is_not_imported_and_not_watched_later(tmp_path, libraries):
    with watch_model(nn.Linear(1, 1), path=tmp_path / "run"):
        spec = importlib.util.find_spec("flash_attn")
        assert spec.origin.endswith("__init__.py")
        assert "flash_attn" not in sys.modules
        assert importlib.util.find_spec("xformers.no_such_module") is None
    module = importlib.util.module_from_spec(spec)
    sys.modules["flash_attn"] = module
    spec.loader.exec_module(module)
    assert not hasattr(module.flash_attn_func, "__wrapped__")


def test_a_library_that_cannot_be_imported_fails_as_ever(tmp_path, libraries):
    (tmp_path / "libraries" / "flash_attn" / "__init__.py").write_text("raise ImportError('no GPU')")
    with (
        watch_model(nn.Linear(1, 1), path=tmp_path / "run"),
        pytest.raises(ImportError, match="no GPU"),
    ):
        importlib.import_module("flash_attn")
    assert "flash_attn" not in sys.modules


def test_flex_attention_imported_while_it_is_watched(tmp_path):
    script = f"""
        import sys, warnings, torch
        from torch import nn
        from attnscope.watch.attach import watch_model

        with watch_model(nn.Linear(1, 1), path={str(tmp_path / "run")!r}), torch.no_grad():
            assert "torch.nn.attention.flex_attention" not in sys.modules
            from torch.nn.attention.flex_attention import flex_attention
            q = torch.randn(1, 1, 8, 4)
            flex_attention(q, q, q)
        assert not hasattr(sys.modules["torch.nn.attention.flex_attention"].flex_attention, "__wrapped__")
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
    assert [layer["backend"] for layer in layers_of(open_run(tmp_path / "run"))] == ["flex"]


@compiles
def test_operators_of_flash_attn_in_a_compiled_graph_are_said(tmp_path, compiler):
    @torch.library.custom_op("flash_attn::_stand_in_forward", mutates_args=())
    def forward(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q + k

    @forward.register_fake
    def _(q, k):
        return torch.empty_like(q)

    q = torch.randn(B, T, H, K)
    with watch_model(nn.Linear(1, 1), path=tmp_path / "run"), torch.no_grad():
        torch.compile(lambda x: forward(x, x))(q)
    assert not_measured(open_run(tmp_path / "run"), "compiled") == [
        "flash_attn._stand_in_forward.default in a compiled graph: it can be watched in eager calls only"
    ]


def test_a_float_mask_for_all_sequences_and_heads(tmp_path):
    added = torch.randn(T, S, generator=torch.Generator().manual_seed(1))

    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added).transpose(1, 2)

    model = Attending(attend)
    run = train_watched(tmp_path / "run", model, loss_of)
    weights = weights_one_by_one(*model.heads, K**-0.5, score=lambda z, b, h, i, j: z + float(added[i, j]))  # fmt: skip
    assert torch.allclose(entropy_by_head(run, 0), entropy_of_weights(weights), atol=1e-5)
