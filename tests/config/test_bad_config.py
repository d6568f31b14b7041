"""Wrong configs: each gives one line, matched whole, that says what, where, what is allowed and the nearest name."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnscope.config import (
    SECTIONS,
    SETTINGS,
    Arm,
    Config,
    apply_changes,
    load_config,
    members_of,
    parse_assignment,
    parse_table,
    parse_toml,
    with_control,
    without_control,
)
from attnscope.errors import ConfigError

ZEROS = 400 * "0"
# What is in a.toml, and the whole error.
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
    "[model]\nd_model = 99999999999999999999": "a.toml: model.d_model is 99999999999999999999, but must be a whole number, at least 1. The largest is 2147483647.",
    "[model]\nn_heads = 3": "a.toml: model.n_heads is 3, which does not divide model.d_model = 128. Use 1, 2, 4, 8, 16, 32, 64 or 128, or set model.d_head.",
    "[model]\nd_model = 1\nn_heads = 2": "a.toml: model.n_heads is 2, which does not divide model.d_model = 1. Use 1, or set model.d_head.",
    "[model]\nseq_len = 1": "a.toml: model.seq_len is 1, but must be a whole number, at least 2.",
    "[model]\nnorm = 'layer'": 'a.toml: model.norm is "layer", but must be one of pre, post, none.',
    "[model]\nkind = 'decodr'": 'a.toml: model.kind is "decodr", but must be one of decoder, encoder. Did you mean decoder?',
    "[model]\ntie_embeddings = 1": "a.toml: model.tie_embeddings is 1, but must be true or false.",
    "[model]\nposition = 'rope'\nd_head = 7": "a.toml: model.d_head is 7, but model.position = rope rotates pairs of dimensions. Use an even width.",
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
    "[model]\nkind = 'encoder'\n[attention]\nmask = 'none'": "a.toml: data.objective is next_token, but model.kind = encoder trains with masked. Use objective = masked, or kind = decoder.",
    "[data]\nobjective = 'masked'": "a.toml: data.objective is masked, but model.kind = decoder trains with next_token. Use objective = next_token, or kind = encoder.",
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
    "[data]\nsource = ''": 'a.toml: data.source is "", but must be a text on one line, not empty and without invisible characters.',
    "[data]\nsource = 3": "a.toml: data.source is 3, but must be a text on one line, not empty and without invisible characters.",
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
    "[model]\nd_model = 3\nd_model = 4": "a.toml: not valid TOML: Cannot overwrite a value (at line 3, column 12).",
    "model = 3": "a.toml: model is 3, but must be a section. Write [model].",
    "[arm]\nname = 'a'": "a.toml: arm must be a list of tables. Write [[arm]], not [arm].",
    "[[arm]]\n[arm.model]\nd_model = 3": 'a.toml: arm 1 has no name. Add a line like name = "rope".',
    "[[arm]]\nname = 'a'\n[[arm]]\nname = 'a'": 'a.toml: arm 2: the name "a" is taken. Give every arm its own name.',
    "[[arm]]\nname = 'a'\nmodel.d_modle = 3": 'a.toml: arm a: [model] has no setting "d_modle". Did you mean d_model? Settings: kind, d_model, n_layers, n_heads, d_head, d_ff, seq_len, norm, norm_kind, position, activation, tie_embeddings.',
    "[[arm]]\nname = 'a'\nmodel.n_heads = 3": "a.toml: arm a: model.n_heads is 3, which does not divide model.d_model = 128. Use 1, 2, 4, 8, 16, 32, 64 or 128, or set model.d_head.",
    '[model]\nnorm = "\\u001b[31mred"': 'a.toml: model.norm is "\\u001b[31mred", but must be one of pre, post, none.',
    '["\\u001b[31m"]\nx = 1': 'a.toml: there is no section "\\u001b[31m". Sections: model, attention, init, optimizer, clip, precision, data, train, record.',
    "[model]\nd_model = [1, 2]": "a.toml: model.d_model is [1, 2], but must be a whole number, at least 1.",
    "[optimizer]\nlr = {a = 1}": "a.toml: optimizer.lr is a table, but must be a finite number at least 0.",
    '"model.d_model" = 5': "a.toml: model.d_model must stand in its section. Write it without quotes.",
    f"[optimizer]\nlr = 1{ZEROS}": "a.toml: optimizer.lr is a whole number of more than 60 digits, but must be a finite number at least 0.",
    f"[model]\nd_model = 1{ZEROS}": "a.toml: model.d_model is a whole number of more than 60 digits, but must be a whole number, at least 1. The largest is 2147483647.",
    "[attention]\nscale = 0": "a.toml: attention.scale is 0, but must be a finite number above 0 or inverse_sqrt, none, inverse, depth, learned.",
    '[[arm]]\nname = "\\u001b[2J"': 'a.toml: the name of arm 1 is "\\u001b[2J", but must be a text on one line, not empty, without invisible characters, of at most 60 characters.',
    '[data]\nsource = "a\\nb"': 'a.toml: data.source is "a\\nb", but must be a text on one line, not empty and without invisible characters.',
    # numbers that float32 does not have
    "[optimizer]\nlr = 1e39": "a.toml: optimizer.lr is 1e+39, but must be a finite number at least 0. In float32, which training computes in, 1e+39 is inf.",
    "[optimizer]\nlr = nan": "a.toml: optimizer.lr is nan, but must be a finite number at least 0.",
    "[optimizer]\nlr = -inf": "a.toml: optimizer.lr is -inf, but must be a finite number at least 0.",
    "[optimizer]\neps = 1e-60": "a.toml: optimizer.eps is 1e-60, but must be a finite number above 0. In float32, which training computes in, 1e-60 is 0.",
    "[optimizer]\nbetas = [0.9, 0.9999999999]": "a.toml: optimizer.betas is [0.9, 0.9999999999], but must be a list of 2 values, each a finite number at least 0 and below 1. In float32, which training computes in, 0.9999999999 is 1.",
    # sizes
    "[model]\nd_model = 1000000000": "a.toml: weights and optimizer of one member would need 6.98e+08 TiB of memory or more; the most allowed is 1 TiB. Use a smaller model.d_model, d_ff or n_layers.",
    "[model]\nn_layers = 1000000000": "a.toml: model.n_layers is 1000000000, but must be a whole number, at least 1 and at most 1024.",
    "[model]\nseq_len = 1000000": "a.toml: attention weights of one member would need 233 TiB of memory or more; the most allowed is 1 TiB. Use a smaller data.batch_size, model.seq_len or train.eval_lengths, or attention.backend = sdpa.",
    "[data]\nbatch_size = 100000000\n[attention]\nbackend = 'sdpa'": "a.toml: the residual stream of one member would need 5.96 TiB of memory or more; the most allowed is 1 TiB. Use a smaller data.batch_size or model.seq_len.",
    "[train]\nsample_tokens = 100001": "a.toml: train.sample_tokens is 100001, but must be a whole number, at least 0 and at most 100000.",
    "[model]\nd_model = 5040\nn_heads = 17": "a.toml: model.n_heads is 17, which does not divide model.d_model = 5040. Use 10, 12, 14, 15, 16, 18, 20 or 21, or set model.d_head.",
    # settings that do not go together
    "[model]\nposition = 'rope'\nd_model = 6": "a.toml: model.d_model / model.n_heads is 3, but model.position = rope rotates pairs of dimensions. Use an even width.",
    "[attention]\nwindow = [4, 4, 4, -4]": "a.toml: attention.window is [4, 4, 4, -4], but must be a whole number, at least 0, or a list of one or more values, each a whole number, at least 0.",
    "[attention]\nwindow = [[4], 4, 4, 4]": "a.toml: attention.window is [[...], 4, 4, 4], but must be a whole number, at least 0, or a list of one or more values, each a whole number, at least 0.",
    "[attention]\nwindow = true": "a.toml: attention.window is true, but must be a whole number, at least 0, or a list of one or more values, each a whole number, at least 0.",
    "[optimizer]\nschedule = 'wsd'\nwarmup_steps = 400": "a.toml: optimizer.warmup_steps is 400, but train.steps = 300 leaves nothing for the wsd schedule. Warm up for fewer steps.",
    "[train]\neval_lengths = [1, 2, 2]": "a.toml: train.eval_lengths is [1, 2, 2], which names a length twice. Name each once.",
    "[train]\neval_lengths = [2]": "a.toml: train.eval_lengths has no 1, but model.position = learned has no positions beyond model.seq_len. Add 1, or use another position.",
    "[optimizer]\nname = 'SGD'": 'a.toml: optimizer.name is "SGD", but must be one of sgd, adamw, muon. Did you mean sgd?',
    "[record]\nrows = 'alll'": 'a.toml: record.rows is "alll", but must be a whole number, at least 1 or all. Did you mean all?',
    "[train]\ncompile = 'true'": 'a.toml: train.compile is "true", but must be true or false.',
    "[train]\ndevice = 0": "a.toml: train.device is 0, but must be one of auto, cpu, cuda, mps.",
    # TOML that is not a config
    "[train]\nsteps = 10\nseed = = 3": "a.toml: not valid TOML: Invalid value (at line 3, column 8).",
    "[train]\nsteps =": "a.toml: not valid TOML: Invalid value (at line 2, column 8).",
    "[train]\n[train]": "a.toml: not valid TOML: Cannot declare ('train',) twice (at line 2, column 7).",
    f"[train]\nsteps = 1{10 * ZEROS}{ZEROS}": "a.toml: a number has thousands of digits.",
    f"[train]\nsteps = 0x1{10 * ZEROS}": "a.toml: train.steps is a whole number of more than 60 digits, but must be a whole number, at least 1. The largest is 2147483647.",
    f"[train]\nsteps = {5000 * '['}": "a.toml: lists or tables are nested too deeply.",
    "[train]\nsteps = 2026-01-01": "a.toml: train.steps is 2026-01-01, but must be a whole number, at least 1.",
    "[train.steps]\nx = 1": "a.toml: train.steps is a table, but must be a whole number, at least 1.",
    "[[model]]\nd_model = 3": "a.toml: model is [a table], but must be a section. Write [model].",
    f"[model]\n{ZEROS} = 1": f'a.toml: [model] has no setting "{56 * "0"}.... Settings: kind, d_model, n_layers, n_heads, d_head, d_ff, seq_len, norm, norm_kind, position, activation, tie_embeddings.',
    f"[model]\nnorm = '{ZEROS}'": f'a.toml: model.norm is "{56 * "0"}..., but must be one of pre, post, none.',
    '[model]\n"d_model\\u0000\\u202e" = 1': 'a.toml: [model] has no setting "d_model\\u0000\\u202e". Did you mean d_model? Settings: kind, d_model, n_layers, n_heads, d_head, d_ff, seq_len, norm, norm_kind, position, activation, tie_embeddings.',
    '[model]\nnorm = "größe\\u009b"': 'a.toml: model.norm is "größe\\u009b", but must be one of pre, post, none.',
    # arms
    "[[arms]]\nname = 'a'": 'a.toml: "arms" is a list of tables, but only [[arm]] may be one.',
    "arm = [1]": "a.toml: arm must be a list of tables. Write [[arm]], not [arm].",
    "[[arm]]\nname = 3": "a.toml: the name of arm 1 is 3, but must be a text on one line, not empty, without invisible characters, of at most 60 characters.",
    f"[[arm]]\nname = '{ZEROS}'": f'a.toml: the name of arm 1 is "{56 * "0"}..., but must be a text on one line, not empty, without invisible characters, of at most 60 characters.',
    "[[arm]]\nname = 'hot'\noptimizer.lr = -1": "a.toml: arm hot: optimizer.lr is -1, but must be a finite number at least 0.",
    "[[arm]]\nname = 'hot'\nlr = 1": 'a.toml: arm hot: there is no section "lr". Did you mean optimizer.lr? Sections: model, attention, init, optimizer, clip, precision, data, train, record.',
    "[[arm]]\nname = 'wide'\nmodel.d_model = 1000000000": "a.toml: arm wide: weights and optimizer of one member would need 6.98e+08 TiB of memory or more; the most allowed is 1 TiB. Use a smaller model.d_model, d_ff or n_layers.",
    10_001 * "[[arm]]\n": "a.toml: there are 10001 arms, but at most 10000 fit a run.",
}


def message_of(make):
    with pytest.raises(ConfigError) as caught:
        make()
    message = str(caught.value)
    assert message.isprintable(), "more than one line, or control characters"
    assert len(message) < 500
    return message


@pytest.mark.parametrize("text", CASES, ids=range(len(CASES)))
def test_message(text):
    assert message_of(lambda: members_of(parse_toml(text, where="a.toml"), where="a.toml")) == CASES[text]


ASSIGNMENTS = {
    "model.d_model": "--set model.d_model: write section.setting=value, for example model.d_model=64.",
    "=3": "--set =3: write section.setting=value, for example model.d_model=64.",
    "model.d_model=": "--set model.d_model=: write section.setting=value, for example model.d_model=64.",
    "mo\x1b[2J\ndel": "--set mo\\u001b[2J\\u000adel: write section.setting=value, for example model.d_model=64.",
    "optimizer.lrr=1": '--set optimizer.lrr=1: [optimizer] has no setting "lrr". Did you mean lr? Settings: name, lr, momentum, betas, eps, weight_decay, warmup_steps, schedule, z_loss.',
    "lr=1": '--set lr=1: there is no section "lr". Did you mean optimizer.lr? Sections: model, attention, init, optimizer, clip, precision, data, train, record.',
    "modl.d_model=1": '--set modl.d_model=1: there is no section "modl". Did you mean model? Sections: model, attention, init, optimizer, clip, precision, data, train, record.',
    "\x1b.x=1": '--set \\u001b.x=1: there is no section "\\u001b". Sections: model, attention, init, optimizer, clip, precision, data, train, record.',
    "model.d_model=big": '--set model.d_model=big: model.d_model is "big", but must be a whole number, at least 1.',
    "train.seed=1\n[model]": '--set train.seed=1\\u000a[model]: train.seed is "1\\n[model]", but must be a whole number, at least 0.',
    "attention.window=[4": '--set attention.window=[4: attention.window is "[4", but must be a whole number, at least 0, or a list of one or more values, each a whole number, at least 0.',
    "attention.scale=invers": '--set attention.scale=invers: attention.scale is "invers", but must be a finite number above 0 or inverse_sqrt, none, inverse, depth, learned. Did you mean inverse?',
    f"train.steps=1{20 * ZEROS}": f'--set train.steps=1{59 * "0"}...{78 * "0"}: train.steps is "1{55 * "0"}..., but must be a whole number, at least 1.',
}


@pytest.mark.parametrize("text", ASSIGNMENTS, ids=range(len(ASSIGNMENTS)))
def test_wrong_assignments(text):
    def assign():
        return apply_changes(Config(), dict([parse_assignment(text)]), where=f"--set {text}")

    assert message_of(assign) == ASSIGNMENTS[text]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_missing_file_names_its_neighbour(here):
    (here / "default.toml").write_text("")
    missing = "defualt.toml: no such config file. Did you mean default.toml?"
    assert message_of(lambda: load_config("defualt.toml")) == missing
    assert message_of(lambda: load_config("zzz")) == "zzz: no such config file."
    assert message_of(lambda: load_config("no/a.toml")) == "no/a.toml: no such config file."


def test_paths_with_control_characters_are_escaped(here):
    (here / "a\x1b[2J.toml").write_text("")
    assert message_of(lambda: load_config("b\x1b[2J\n.toml")) == (
        "b\\u001b[2J\\u000a.toml: no such config file. Did you mean a\\u001b[2J.toml?"
    )
    assert message_of(lambda: load_config("\0")) == "\\u0000: no such config file."


def test_a_path_that_is_too_long_is_cut(here):
    assert message_of(lambda: load_config("x" * 5000)) == (
        f"{78 * 'x'}...{78 * 'x'} cannot be read: File name too long."
    )


def test_folders_and_files_below_files(here):
    (here / "a.toml").write_text("")
    assert message_of(lambda: load_config(".")) == ". is a folder. Give the path of a TOML file."
    below = "a.toml/b.toml cannot be read: Not a directory."
    assert message_of(lambda: load_config("a.toml/b.toml")) == below


def test_a_file_that_is_not_utf_8(here):
    (here / "latin.toml").write_bytes(b"# caf\xe9")
    assert message_of(lambda: load_config("latin.toml")) == ("latin.toml is not text in UTF-8. Save it as UTF-8.")


@pytest.mark.parametrize("name", ["large.toml", "/dev/zero"])
def test_a_file_that_is_too_large_is_not_read_to_its_end(name, here):
    (here / "large.toml").write_bytes(b"#" * (2**20 + 1))
    assert message_of(lambda: load_config(name)) == (
        f"{name} has more than 1048576 bytes, too many for a config. Is it the right file?"
    )


@pytest.mark.parametrize("make", [with_control, without_control])
def test_no_scale_refuses_a_config_that_has_arms(make):
    def config(n_arms):
        return parse_toml("".join(f'[[arm]]\nname = "{i}"\n' for i in range(n_arms)))

    assert message_of(lambda: make(config(2))) == (
        "--no-scale makes its own two arms, but the config already has 2 (0, 1). Drop the flag, or the [[arm]] tables."
    )
    assert message_of(lambda: make(config(900))) == (
        "--no-scale makes its own two arms, but the config already has 900 (0, 1, 2, ...). Drop the flag, or "
        "the [[arm]] tables."
    )


def test_a_config_made_by_hand_is_checked_like_a_file():
    config = replace(Config(), optimizer=replace(Config().optimizer, lr=float("nan")))
    assert message_of(lambda: members_of(config)) == (
        "config: optimizer.lr is nan, but must be a finite number at least 0."
    )
    twice = replace(Config(), arms=2 * (Arm(name="a", changes={}),))
    assert message_of(lambda: members_of(twice)) == (
        'config: arm 2: the name "a" is taken. Give every arm its own name.'
    )
    odd = replace(Config(), arms=(Arm(name="a", changes={"lr": 1}),))
    assert message_of(lambda: members_of(odd)).startswith("config: arm a: ")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from([*SECTIONS, "arm", "name", "d_model", "lr"]) | st.text()


@given(
    table=st.dictionaries(names, anything | st.dictionaries(names, anything, max_size=3)),
    key=st.sampled_from(sorted(SETTINGS)),
    value=anything,
    where=st.text(),
)
def test_whatever_is_wrong_the_message_is_one_short_line(table, key, value, where):
    for attempt in (
        lambda: members_of(parse_table(table, where=where), where=where),
        lambda: apply_changes(Config(), {key: value}, where=where),
        lambda: apply_changes(Config(), dict([parse_assignment(f"{key}={value}")]), where=f"--set {key}={value}"),
    ):
        try:
            attempt()
        except ConfigError as error:
            assert str(error).isprintable() and len(str(error)) < 500
