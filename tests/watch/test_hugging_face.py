"""Hugging Face models, built from configs: every layer is seen, and its entropies are those of the model's own weights."""

import pytest
import torch

from tests.watch.foreign import entropy_by_head, entropy_of_weights, layers_of, train_watched

transformers = pytest.importorskip("transformers", reason="Hugging Face models")

TOKENS = torch.randint(0, 60, (3, 20), generator=torch.Generator().manual_seed(0))


def gpt2(**more):
    config = transformers.GPT2Config(
        n_layer=2, n_head=4, n_embd=32, vocab_size=60, n_positions=32, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
        initializer_range=0.3, **more,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(**more):
    config = transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64,
        vocab_size=60, max_position_embeddings=32, initializer_range=0.3, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert(**more):
    config = transformers.BertConfig(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=60,
        max_position_embeddings=32, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, initializer_range=0.3,
        **more,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


NAMES = {
    gpt2: "transformer.h.{}.attn",
    llama: "model.layers.{}.self_attn",
    bert: "bert.encoder.layer.{}.attention.self",
}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [gpt2, llama, bert], ids=lambda build: build.__name__)
def test_every_layer_is_seen_with_the_entropies_of_its_own_weights(tmp_path, build, backend):
    torch.manual_seed(0)
    model = build(attn_implementation=backend)
    torch.manual_seed(0)
    twin = build(attn_implementation="eager")
    mask = torch.ones_like(TOKENS)
    mask[0, 15:] = 0 if build is bert else 1

    run = train_watched(
        tmp_path / "run",
        model,
        lambda m: m(input_ids=TOKENS, attention_mask=mask, labels=TOKENS).loss,
    )

    with torch.no_grad():
        weights = twin(input_ids=TOKENS, attention_mask=mask, output_attentions=True).attentions
    layers = layers_of(run)
    assert [layer["name"] for layer in layers] == [NAMES[build].format(i) for i in range(2)]
    assert {layer["n_heads"] for layer in layers} == {4}
    assert {layer["d_head"] for layer in layers} == {8}
    assert [layer["scale"] for layer in layers] == pytest.approx([8**-0.5] * 2, rel=1e-3)
    assert {layer["backend"] for layer in layers} == {backend}
    for layer in range(2):
        found = entropy_by_head(run, layer)
        assert torch.allclose(found, entropy_of_weights(weights[layer]), atol=1e-5), layer


@pytest.mark.parametrize("build", [gpt2, llama, bert], ids=lambda build: build.__name__)
def test_the_residual_stream_is_what_the_blocks_put_out(tmp_path, build):
    """Before a final LayerNorm, before one written by hand, and of blocks that end in one."""
    torch.manual_seed(0)
    model = build()
    torch.manual_seed(0)
    twin = build()

    def loss_of(model):
        return model(input_ids=TOKENS, labels=TOKENS).loss

    run = train_watched(tmp_path / "run", model, loss_of)
    path = NAMES[build].partition(".{}")[0]
    seen = []
    for block in twin.get_submodule(path):
        block.register_forward_hook(lambda _block, _args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    loss_of(twin)
    expected = [x.square().mean().sqrt().item() for x in seen]
    assert run.layers["layer"].tolist() == [0, 1]
    assert run.layers["activation_rms"].tolist() == pytest.approx(expected, rel=1e-5)
