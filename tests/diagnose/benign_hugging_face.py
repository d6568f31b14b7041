"""Sound Hugging Face models, built from small configs: nothing in them is a mistake."""

import torch
import transformers

from tests.diagnose.benign import D, H, K, T, V, text, train


def hf_t5(path):
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=D, d_kv=K, num_heads=H, d_ff=2 * D, num_layers=2, vocab_size=V + 1, dropout_rate=0.0, decoder_start_token_id=V,
        pad_token_id=V,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    return train(path, model, lambda m, step: m(input_ids=text(step, length=12), labels=text(step, length=12).flip(1)).loss)  # fmt: skip


def hf_gpt2(path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=H, n_embd=D, vocab_size=V, n_positions=T + 1, bos_token_id=0, eos_token_id=0
    )
    return train(path, transformers.GPT2LMHeadModel(config), lambda m, s: m(input_ids=text(s), labels=text(s)).loss)


def hf_bert(path):
    """A masked-language model."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=2, num_attention_heads=H, hidden_size=D, intermediate_size=2 * D, vocab_size=V + 2,
        max_position_embeddings=32, pad_token_id=V + 1,
    )  # fmt: skip

    def loss_of(model, step):
        ids = text(step, 16)
        hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(step)) < 0.15
        return model(input_ids=ids.masked_fill(hidden, V), labels=ids.masked_fill(~hidden, -100)).loss

    return train(path, transformers.BertForMaskedLM(config), loss_of)


def hf_vit(path):
    """A vision transformer."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        num_hidden_layers=2, num_attention_heads=H, hidden_size=D, intermediate_size=2 * D, image_size=16, patch_size=4,
        num_labels=4,
    )  # fmt: skip

    def loss_of(model, step):
        draw = torch.Generator().manual_seed(step)
        labels = torch.randint(0, 4, (16,), generator=draw)
        picture = torch.randn(16, 3, 16, 16, generator=draw)
        for n, label in enumerate(labels.tolist()):
            y, x = 8 * (label // 2), 8 * (label % 2)
            picture[n, :, y : y + 8, x : x + 8] += 1.5
        return model(pixel_values=picture, labels=labels).loss

    return train(path, transformers.ViTForImageClassification(config), loss_of)


HUGGING_FACE = (hf_t5, hf_gpt2, hf_bert, hf_vit)
