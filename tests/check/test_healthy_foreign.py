"""Sound models of other libraries: no check fails."""

import pytest
import torch

from tests.check.models import TOKENS, D, V, built, sound

MASK = torch.ones_like(TOKENS)
MASK[0, 8:] = 0
PICTURES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
SIZES = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": D,
    "intermediate_size": 64,
}
TEXT = {**SIZES, "vocab_size": V, "max_position_embeddings": 32}


# -- Hugging Face --


def hugging_face(name, batch, config=None, **settings):
    transformers = pytest.importorskip("transformers", reason="Hugging Face models")
    model = getattr(transformers, name)
    config = model.config_class(**settings) if config is None else config
    return built(model, config), batch


IDS = {"input_ids": TOKENS, "attention_mask": MASK}
T5 = {"d_model": D, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 64, "vocab_size": V, "decoder_start_token_id": 0}  # fmt: skip
SEQ2SEQ = {
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": D,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": V, "max_position_embeddings": 16,
}  # fmt: skip
TRANSFORMERS = {
    "grouped keys": ("LlamaForCausalLM", IDS, {**TEXT, "num_key_value_heads": 2}, {"future_leak": "passed"}),
    "sliding window": ("MistralForCausalLM", IDS, {**TEXT, "num_key_value_heads": 2, "sliding_window": 4}, {"future_leak": "passed"}),
    "soft-cap, another scale": ("Gemma2ForCausalLM", IDS, {**TEXT, "head_dim": 8, "num_key_value_heads": 2, "sliding_window": 4, "query_pre_attn_scalar": 11, "attn_implementation": "eager"}, {}),
    "experts": ("MixtralForCausalLM", IDS, {**TEXT, "num_local_experts": 4, "num_key_value_heads": 2}, {}),
    "classifier": ("BertForSequenceClassification", IDS, TEXT, {"future_leak": "not_looked", "padding_leak": "passed"}),
    "shared layers": ("AlbertModel", IDS, {**TEXT, "embedding_size": 16}, {"future_leak": "stated"}),
    "images": ("ViTForImageClassification", {"pixel_values": PICTURES}, {**SIZES, "image_size": 16, "patch_size": 4}, {"batch_leak": "passed", "attention_scale": "passed"}),
    "T5": ("T5ForConditionalGeneration", {**IDS, "decoder_input_ids": TOKENS}, T5, {"attention_scale": "stated", "future_leak": "passed", "padding_leak": "passed"}),
    "T5's encoder": ("T5EncoderModel", IDS, T5, {"future_leak": "stated"}),
    "encoder-decoder": ("BartForConditionalGeneration", {**IDS, "decoder_input_ids": TOKENS[:, :9]}, SEQ2SEQ, {"future_leak": "passed", "padding_leak": "passed"}),
    "no attention": ("MambaForCausalLM", {"input_ids": TOKENS}, {"num_hidden_layers": 2, "hidden_size": D, "vocab_size": V, "state_size": 4}, {"future_leak": "passed", "attention_scale": "not_looked"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.filterwarnings("ignore")
def test_transformers(kind):
    name, batch, settings, expected = TRANSFORMERS[kind]
    sound(*hugging_face(name, batch, **settings), **expected)


@pytest.mark.filterwarnings("ignore")
def test_a_contrastive_model_compares_all_sequences_by_design():
    transformers = pytest.importorskip("transformers", reason="Hugging Face models")
    ends = {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config={**TEXT, **ends}, vision_config={**SIZES, "image_size": 16, "patch_size": 4}, projection_dim=16
    )  # fmt: skip
    sound(*hugging_face("CLIPModel", {**IDS, "pixel_values": PICTURES}, config))


@pytest.mark.filterwarnings("ignore")
def test_a_cache_among_the_arguments_is_filled_anew_in_every_pass():
    transformers = pytest.importorskip("transformers", reason="Hugging Face models")
    model, _ = hugging_face("LlamaForCausalLM", IDS, **TEXT)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=TOKENS, past_key_values=cache)
    batch = {"input_ids": TOKENS[:, :4], "past_key_values": cache}
    sound(model, batch, repeatable_training="passed", future_leak="passed")
    assert cache.get_seq_length() == 12


def test_x_transformers():
    x_transformers = pytest.importorskip("x_transformers", reason="x-transformers models")
    for stack, more in (("Encoder", {"alibi_pos_bias": True}), ("Decoder", {"rel_pos_bias": True})):
        layers = getattr(x_transformers, stack)(dim=D, depth=2, heads=4, attn_dim_head=8, **more)
        model = built(x_transformers.TransformerWrapper, num_tokens=V, max_seq_len=16, attn_layers=layers)
        sound(model, {"x": TOKENS, "mask": MASK.bool()})
