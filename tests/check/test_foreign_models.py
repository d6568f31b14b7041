"""Models of others: what is sound passes, in whatever form it takes its batch and returns its output."""

import pytest
import torch
from torch import nn

from attnscope import check_model
from attnscope.errors import AttnscopeError, ShapeError
from tests.check.models import FLOATS, TOKENS, Attention, D, V, built, checked, model_of

MASK = torch.ones_like(TOKENS)
MASK[0, 8:] = 0


def not_passed(found):
    return {name: each.status for name, each in found.items() if each.status not in ("passed", "stated")}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_gpt2(backend, side):
    transformers = pytest.importorskip("transformers", reason="Hugging Face models")
    config = transformers.GPT2Config(
        n_layer=2, n_head=4, n_embd=D, vocab_size=V, n_positions=16, bos_token_id=0, eos_token_id=0,
        attn_implementation=backend, loss_type="ForCausalLMLoss",
    )  # fmt: skip
    model = built(transformers.GPT2LMHeadModel, config)
    mask = MASK if side == "right" else MASK.flip(1)
    found = checked(model, {"input_ids": TOKENS, "attention_mask": mask, "labels": TOKENS})
    assert not_passed(found) == {}
    assert found["future leak"].finding.startswith("Looks causal")
    assert {row["layer"] for row in found["attention scale"].evidence} == {"transformer.h.0.attn", "transformer.h.1.attn"}  # fmt: skip


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_bert(backend):
    transformers = pytest.importorskip("transformers", reason="Hugging Face models")
    config = transformers.BertConfig(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=D, intermediate_size=64, vocab_size=V,
        max_position_embeddings=16, attn_implementation=backend,
    )  # fmt: skip
    model = built(transformers.BertModel, config)  # last_hidden_state, pooler_output
    batch = {"input_ids": TOKENS, "attention_mask": MASK}
    found = checked(model, batch)
    assert not_passed(found) == {}
    assert found["future leak"].finding.startswith("Attends to the future")
    assert not_passed(checked(model, batch, causal=True)) == {"future leak": "failed"}


def test_t5_is_asked_about_its_decoder():
    transformers = pytest.importorskip("transformers", reason="Hugging Face models")
    config = transformers.T5Config(
        d_model=D, d_kv=8, num_heads=4, num_layers=2, d_ff=64, vocab_size=V, decoder_start_token_id=0
    )  # fmt: skip
    model = built(transformers.T5ForConditionalGeneration, config)
    found = checked(model, {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :7]})
    assert not_passed(found) == {"padding leak": "not looked"}
    assert found["attention scale"].status == "stated"
    assert "with weights of q that make up for it, as in T5" in found["attention scale"].finding


def test_x_transformers():
    x_transformers = pytest.importorskip("x_transformers", reason="x-transformers models")
    model = built(
        x_transformers.TransformerWrapper,
        num_tokens=V, max_seq_len=16,
        attn_layers=x_transformers.Decoder(dim=D, depth=2, heads=4, attn_dim_head=8),
    )  # fmt: skip
    assert not_passed(checked(model, {"x": TOKENS, "mask": MASK.bool()})) == {}


@pytest.mark.parametrize("causal", [True, False])
def test_transformer_encoder(causal):
    layer = nn.TransformerEncoderLayer(D, 4, 64, batch_first=True)
    model = built(nn.TransformerEncoder, layer, 2, enable_nested_tensor=False)
    batch = {"src": FLOATS, "src_key_padding_mask": MASK == 0}
    if causal:
        batch["mask"] = torch.ones(12, 12, dtype=torch.bool).triu(1)
    found = checked(model, batch, causal=causal)
    assert not_passed(found) == {}


def test_a_decoder_is_told_from_its_encoder():
    model = built(nn.Transformer, D, 4, 1, 1, 64, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(12)
    found = checked(model, {"src": FLOATS, "tgt": FLOATS, "tgt_mask": mask})
    assert not_passed(found) == {"padding leak": "not looked"}
    assert found["future leak"].finding.startswith("Looks causal")


class Returning(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.model, self.form = model_of(), form

    def forward(self, idx):
        return self.form(self.model(idx))


@pytest.mark.parametrize(
    "form",
    [
        lambda y: (y, y.mean()),
        lambda y: (y.mean(), y),
        lambda y: {"loss": y.mean(), "logits": y},
        lambda y: y.flatten(0, 1),
        lambda y: [y.half()],
    ],
)
def test_forms_of_outputs(form):
    assert not_passed(checked(Returning(form), TOKENS)) == {"padding leak": "not looked"}


def test_an_output_without_tensors_is_an_error_that_says_what_came():
    with pytest.raises(ShapeError) as caught:
        check_model(Returning(lambda y: "nothing"), TOKENS)
    assert str(caught.value) == ("the model returned a str without tensors, but no floating tensor.")


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ("text", "batch: is a str. Give token ids"),
        ((), "batch: holds nothing, but no input. Give token ids"),
        (TOKENS.bool(), "batch: holds tokens bool (3, 12), but no input. Give token ids"),
        (torch.zeros(3, 12, dtype=torch.long), "batch: tokens (3, 12) does not hold two different token ids, so that"),
    ],
)  # fmt: skip
def test_batches_that_cannot_be_used(batch, said):
    with pytest.raises(ShapeError) as caught:
        check_model(model_of(), batch)
    assert str(caught.value).startswith(said)


def test_a_model_that_is_none():
    with pytest.raises(ShapeError, match="model: is a str, but must be a"):
        check_model("gpt2", TOKENS)


def test_an_exception_in_the_forward_pass_is_named_with_its_place():
    with pytest.raises(AttnscopeError) as caught:
        check_model(model_of(), TOKENS + 10 * V)
    assert str(caught.value).startswith(
        "the forward pass of Model raised IndexError: index out of range in self (models.py, line "
    )
    assert isinstance(caught.value.__cause__, IndexError)


def test_an_exception_in_training_only_skips_what_needs_training():
    class Eval(nn.Module):
        def forward(self, x):
            assert not self.training, "not for training"
            return x

    found = checked(model_of(between=Eval()), (TOKENS, MASK))
    assert not_passed(found) == {
        "repeatable training": "not looked",
        "training and evaluation": "not looked",
    }
    assert "AssertionError: not for training" in found["repeatable training"].finding


def test_a_forward_pass_without_gradients_is_looked_at_as_far_as_it_goes():
    class NoGrad(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model_of(Attention(), Attention(hidden=None))

        def forward(self, idx):
            with torch.no_grad():
                return self.model(idx)

    found = checked(NoGrad())
    assert found["future leak"].status == "failed" and "gradients" not in found["future leak"].finding  # fmt: skip
    assert found["attention scale"].status == "not looked"
    assert found["masked rows"].status == "passed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    assert not_passed(checked(model_of().to(dtype), TOKENS)) == {"padding leak": "not looked"}
    broken = model_of(Attention(), Attention(hidden=2, scale=1.0)).to(dtype)
    found = not_passed(checked(broken, TOKENS))
    assert found == {"padding leak": "not looked", "future leak": "failed", "attention scale": "failed"}  # fmt: skip


def test_compiled_models_are_looked_into():
    assert not_passed(checked(torch.compile(model_of(), backend="eager"), TOKENS)) == {"padding leak": "not looked"}
