"""Wrong configs: each gives one line, matched whole, that says what, where, what is allowed and the nearest name."""

import pytest

from attnscope.config import (
    Config,
    load_config,
    members_of,
    parse_assignment,
    parse_toml,
    with_control,
)
from attnscope.errors import ConfigError

CASES = {
    "[model]\nd_modle = 3": 'a.toml: [model] has no setting "d_modle". Did you mean d_model? Settings: kind, d_model, n_layers, n_heads, d_head, d_ff, seq_len, norm, norm_kind, position, activation, tie_embeddings.',
    "[modle]\nd_model = 3": 'a.toml: there is no section "modle". Did you mean model? Sections: model, attention, init, optimizer, clip, precision, data, train, record.',
    "d_model = 3": 'a.toml: there is no section "d_model". Did you mean model.d_model? Sections: model, attention, init, optimizer, clip, precision, data, train, record.',
    "[optimizer]\nd_model = 3": 'a.toml: [optimizer] has no setting "d_model". Did you mean model.d_model? Settings: name, lr, momentum, betas, eps, weight_decay, warmup_steps, schedule, z_loss.',
    "[attention]\nheads = 3": 'a.toml: [attention] has no setting "heads". Settings: scale, mask, window, backend, qk_norm, logit_softcap, qk_clip, dropout.',
    "[model]\nd_model = 'big'": 'a.toml: model.d_model is "big", but must be a whole number, at least 1.',
    "[model]\nd_model = true": "a.toml: model.d_model is true, but must be a whole number, at least 1.",
    "[model]\nd_model = 1.5": "a.toml: model.d_model is 1.5, but must be a whole number, at least 1.",
    "[model]\nd_model = 0": "a.toml: model.d_model is 0, but must be a whole number, at least 1.",
    "[model]\nd_model = 99999999999999999999": "a.toml: model.d_model is 99999999999999999999, but must be a whole number, at least 1.",
    "[model]\nn_heads = 3": "a.toml: model.n_heads is 3, which does not divide model.d_model = 128. Use 1, 2, 4, 8, 16, 32, 64 or 128, or set model.d_head.",
    "[model]\nd_model = 1\nn_heads = 2": "a.toml: model.n_heads is 2, more than model.d_model = 1. Use 1.",
    "[model]\nseq_len = 1": "a.toml: model.seq_len is 1, but must be a whole number, at least 2.",
    "[model]\nnorm = 'layer'": 'a.toml: model.norm is "layer", but must be one of pre, post, none.',
    "[model]\nkind = 'decodr'": 'a.toml: model.kind is "decodr", but must be one of decoder, encoder. Did you mean decoder?',
    "[model]\ntie_embeddings = 1": "a.toml: model.tie_embeddings is 1, but must be true or false.",
    "[model]\nposition = 'rope'\nd_head = 7": "a.toml: d_head is 7, but model.position = rope rotates pairs of dimensions. Use an even d_head.",
    "[model]\nposition = 'sinusoidal'\nd_model = 9\nn_heads = 1": "a.toml: model.d_model is 9, but model.position = sinusoidal pairs a sine with a cosine. Use an even d_model.",
    "[attention]\nscale = 'inverse_sqr'": 'a.toml: attention.scale is "inverse_sqr", but must be a finite number above 0 or inverse_sqrt, none, inverse, depth, learned. Did you mean inverse_sqrt?',
    "[attention]\nscale = -1": "a.toml: attention.scale is -1, but must be a finite number above 0 or inverse_sqrt, none, inverse, depth, learned.",
    "[attention]\nscale = true": "a.toml: attention.scale is true, but must be a finite number above 0 or inverse_sqrt, none, inverse, depth, learned.",
    "[attention]\nwindow = [4, 4]": "a.toml: attention.window lists 2 windows for model.n_layers = 4. Give one window per layer, or a single number.",
    "[attention]\nwindow = -1": "a.toml: attention.window is -1, but must be a whole number, at least 0, or a list of one or more values, each a whole number, at least 0.",
    "[attention]\nwindow = []": "a.toml: attention.window is [], but must be a whole number, at least 0, or a list of one or more values, each a whole number, at least 0.",
    "[attention]\nwindow = 'wide'": 'a.toml: attention.window is "wide", but must be a whole number, at least 0, or a list of one or more values, each a whole number, at least 0.',
    "[attention]\nbackend = 'flash'": 'a.toml: attention.backend is "flash", but must be one of eager, sdpa.',
    "[attention]\nbackend = 'sdpa'\nlogit_softcap = 30": "a.toml: attention.logit_softcap is 30, but attention.backend = sdpa cannot cap logits. Use backend = eager.",
    "[attention]\nmask = 'padding'": "a.toml: attention.mask is padding, but model.kind = decoder has no padding. Use mask = causal or none, or kind = encoder.",
    "[model]\nkind = 'encoder'": "a.toml: attention.mask is causal, but model.kind = encoder reads both ways. Use mask = padding or none, or kind = decoder.",
    "[model]\nkind = 'encoder'\n[attention]\nmask = 'none'": "a.toml: data.objective is next_token, but model.kind = encoder trains with masked. Change one of them.",
    "[data]\nobjective = 'masked'": "a.toml: data.objective is masked, but model.kind = decoder trains with next_token. Change one of them.",
    "[attention]\ndropout = 1.0": "a.toml: attention.dropout is 1.0, but must be a finite number at least 0 and below 1.",
    "[attention]\nqk_norm = 'yes'": 'a.toml: attention.qk_norm is "yes", but must be true or false.',
    "[init]\ngain = 0": "a.toml: init.gain is 0, but must be a finite number above 0.",
    "[init]\nscheme = 'xavier'": 'a.toml: init.scheme is "xavier", but must be one of xavier_uniform, xavier_normal, kaiming, normal, orthogonal, gpt2. Did you mean xavier_normal?',
    "[init]\nstd = nan": "a.toml: init.std is nan, but must be a finite number above 0.",
    "[optimizer]\nlr = -0.1": "a.toml: optimizer.lr is -0.1, but must be a finite number at least 0.",
    "[optimizer]\nlr = inf": "a.toml: optimizer.lr is inf, but must be a finite number at least 0.",
    "[optimizer]\nlr = '1e-3'": 'a.toml: optimizer.lr is "1e-3", but must be a finite number at least 0.',
    "[optimizer]\nname = 'adam'": 'a.toml: optimizer.name is "adam", but must be one of sgd, adamw, muon. Did you mean adamw?',
    "[optimizer]\nbetas = [0.9]": "a.toml: optimizer.betas is [0.9], but must be a list of 2 values, each a finite number at least 0 and below 1.",
    "[optimizer]\nbetas = [0.9, 1.0]": "a.toml: optimizer.betas is [0.9, 1.0], but must be a list of 2 values, each a finite number at least 0 and below 1.",
    "[optimizer]\nmomentum = 1": "a.toml: optimizer.momentum is 1, but must be a finite number at least 0 and below 1.",
    "[optimizer]\nschedule = 'cosine'\nwarmup_steps = 300": "a.toml: optimizer.warmup_steps is 300, but train.steps = 300 leaves nothing for the cosine schedule. Warm up for fewer steps.",
    "[clip]\nthreshold = 0": "a.toml: clip.threshold is 0, but must be a finite number above 0 or none.",
    "[clip]\nmode = 'L2'": 'a.toml: clip.mode is "L2", but must be one of none, norm, value, adaptive.',
    "[precision]\ndtype = 'float8'": 'a.toml: precision.dtype is "float8", but must be one of float32, bfloat16, float16. Did you mean float32?',
    "[data]\nsource = ''": 'a.toml: data.source is "", but must be a text on one line, not empty.',
    "[data]\nsource = 3": "a.toml: data.source is 3, but must be a text on one line, not empty.",
    "[train]\nsteps = 0": "a.toml: train.steps is 0, but must be a whole number, at least 1.",
    "[train]\ndevice = 'gpu'": 'a.toml: train.device is "gpu", but must be one of auto, cpu, cuda, mps. Did you mean cpu?',
    "[train]\neval_lengths = [0]": "a.toml: train.eval_lengths is [0], but must be a list of one or more values, each a whole number, at least 1 and at most 64.",
    "[train]\neval_lengths = 2": "a.toml: train.eval_lengths is 2, but must be a list of one or more values, each a whole number, at least 1 and at most 64.",
    "[train]\neval_lengths = [2]\n[data]\nsource = 'recall'": "a.toml: train.eval_lengths asks for longer sequences, but data.source = recall has tasks of one length. Use [1], or another source.",
    "[record]\nrows = 'none'": 'a.toml: record.rows is "none", but must be a whole number, at least 1 or all.',
    "[record]\nevery = 0": "a.toml: record.every is 0, but must be a whole number, at least 1.",
    "[model]\nkind = 'encoder'\n[attention]\nmask = 'padding'\n[data]\nobjective = 'masked'\nsource = 'modular'": "a.toml: data.source = modular scores its answers only and has no masked objective. Use stdlib, markov or a path.",
    "[model]\nkind = 'encoder'\n[attention]\nmask = 'padding'\n[data]\nobjective = 'masked'\n[train]\nsample_tokens = 5": "a.toml: train.sample_tokens is 5, but an encoder cannot generate. Set it to 0, or use model.kind = decoder.",
    "[model\nd_model = 3": "a.toml: not valid TOML: Expected ']' at the end of a table declaration (at line 1, column 7).",
    "[model]\nd_model = 3\nd_model = 4": "a.toml: not valid TOML: Cannot overwrite a value (at end of document).",
    "model = 3": "a.toml: model is 3, but must be a section. Write [model].",
    "[arm]\nname = 'a'": "a.toml: arm must be a list of tables. Write [[arm]], not [arm].",
    "[[arm]]\n[arm.model]\nd_model = 3": 'a.toml: arm 1 has no name, or one that cannot be shown. Add a line like name = "rope".',
    "[[arm]]\nname = 'a'\n[[arm]]\nname = 'a'": "a.toml: arm 2: the name 'a' is taken. Give every arm its own name.",
    "[[arm]]\nname = 'a'\nmodel.d_modle = 3": 'a.toml: arm a: [model] has no setting "d_modle". Did you mean d_model? Settings: kind, d_model, n_layers, n_heads, d_head, d_ff, seq_len, norm, norm_kind, position, activation, tie_embeddings.',
    "[[arm]]\nname = 'a'\nmodel.n_heads = 3": "a.toml: arm a: model.n_heads is 3, which does not divide model.d_model = 128. Use 1, 2, 4, 8, 16, 32, 64 or 128, or set model.d_head.",
    '[model]\nnorm = "\\u001b[31mred"': 'a.toml: model.norm is "\\u001b[31mred", but must be one of pre, post, none.',
    '["\\u001b[31m"]\nx = 1': 'a.toml: there is no section "\\u001b[31m". Sections: model, attention, init, optimizer, clip, precision, data, train, record.',
    "[model]\nd_model = [1, 2]": "a.toml: model.d_model is [1, 2], but must be a whole number, at least 1.",
    "[optimizer]\nlr = {a = 1}": "a.toml: optimizer.lr is a table, but must be a finite number at least 0.",
    '"model.d_model" = 5': "a.toml: model.d_model must stand in its section. Write it without quotes.",
    "[optimizer]\nlr = 10000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000": "a.toml: optimizer.lr is a whole number of more than 60 digits, but must be a finite number at least 0.",
    "[model]\nd_model = 100000000000000000000000000000000000000000000000000000000000000000000000000000000": "a.toml: model.d_model is a whole number of more than 60 digits, but must be a whole number, at least 1.",
    "[attention]\nscale = 0": "a.toml: attention.scale is 0, but must be a finite number above 0 or inverse_sqrt, none, inverse, depth, learned.",
    '[[arm]]\nname = "\\u001b[2J"': 'a.toml: arm 1 has no name, or one that cannot be shown. Add a line like name = "rope".',
    '[data]\nsource = "a\\nb"': 'a.toml: data.source is "a\\nb", but must be a text on one line, not empty.',
}


def message_of(make):
    with pytest.raises(ConfigError) as caught:
        make()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    return message


@pytest.mark.parametrize("text", CASES, ids=range(len(CASES)))
def test_message(text):
    assert (
        message_of(lambda: members_of(parse_toml(text, where="a.toml"), where="a.toml"))
        == CASES[text]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model.d_model",
            "--set model.d_model: write section.setting=value, for example model.d_model=64.",
        ),
        ("=3", "--set =3: write section.setting=value, for example model.d_model=64."),
        (
            "model.d_model=",
            "--set model.d_model=: write section.setting=value, for example model.d_model=64.",
        ),
        (
            "optimizer.lrr=1",
            '--set: [optimizer] has no setting "lrr". Did you mean lr? Settings: name, lr, momentum, betas, eps, '
            "weight_decay, warmup_steps, schedule, z_loss.",
        ),
    ],
)
def test_wrong_assignments(text, message):
    assert message_of(lambda: parse_assignment(text)) == message


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "default.toml").write_text("")
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9")
    (tmp_path / "large.toml").write_bytes(b"#" * (1 << 20) + b"#")
    cases = {
        "defualt.toml": f"{tmp_path}/defualt.toml: no such config file. Did you mean default.toml?",
        "latin.toml": f"{tmp_path}/latin.toml is not text in UTF-8. Save it as UTF-8.",
        "large.toml": f"{tmp_path}/large.toml has 1048577 bytes; a config has at most 1048576.",
        ".": f"{tmp_path} is a folder. Give the path of a TOML file.",
    }
    for name, message in cases.items():
        assert message_of(lambda name=name: load_config(tmp_path / name)) == message


def test_no_scale_refuses_a_config_that_has_arms():
    config = parse_toml('[[arm]]\nname = "a"\n[[arm]]\nname = "b"')
    assert message_of(lambda: with_control(config)) == (
        "--no-scale makes its own two arms, but the config already has 2 (a, b). Drop the flag, or the [[arm]] "
        "tables."
    )


def test_the_default_config_is_fine():
    assert len(members_of(Config())) == 1
