"""Settings that are each fine but not together, and settings that would have no effect."""

import math

from attnscope.config.schema import Config
from attnscope.config.wording import one_line
from attnscope.errors import ConfigError

MAX_BYTES = 1 << 40  # of memory for one member
BYTES_PER_WEIGHT = 16  # float32: the weight, its gradient, what the optimizer remembers, the update
SHOWN_DIVISORS = 8


def check_together(config: Config, *, where: str) -> None:
    """Refuse combinations that cannot be trained.

    Raises:
        ConfigError: one line with the settings, their values and the way out.
    """
    where = one_line(where)
    model, attention, lengths = config.model, config.attention, config.train.eval_lengths
    if not model.d_head and model.d_model % model.n_heads:
        raise ConfigError(
            f"{where}: model.n_heads is {model.n_heads}, which does not divide model.d_model = "
            f"{model.d_model}. Use {_divisors_near(model.n_heads, model.d_model)}, or set model.d_head."
        )
    if model.position == "rope" and config.d_head % 2:
        width = "model.d_head" if model.d_head else "model.d_model / model.n_heads"
        raise ConfigError(
            f"{where}: {width} is {config.d_head}, but model.position = rope rotates pairs of "
            "dimensions. Use an even width."
        )
    if model.position == "sinusoidal" and model.d_model % 2:
        raise ConfigError(
            f"{where}: model.d_model is {model.d_model}, but model.position = sinusoidal pairs a "
            "sine with a cosine. Use an even d_model."
        )
    if isinstance(attention.window, tuple) and len(attention.window) != model.n_layers:
        raise ConfigError(
            f"{where}: attention.window lists {len(attention.window)} windows for model.n_layers = "
            f"{model.n_layers}. Give one window per layer, or a single number."
        )
    if attention.backend == "sdpa" and attention.logit_softcap:
        raise ConfigError(
            f"{where}: attention.logit_softcap is {attention.logit_softcap:g}, but attention.backend "
            "= sdpa cannot cap logits. Use backend = eager."
        )
    if model.kind == "encoder" and attention.mask == "causal":
        raise ConfigError(
            f"{where}: attention.mask is causal, but model.kind = encoder reads both ways. Use mask "
            "= padding or none, or kind = decoder."
        )
    if model.kind == "decoder" and attention.mask == "padding":
        raise ConfigError(
            f"{where}: attention.mask is padding, but model.kind = decoder has no padding. Use mask "
            "= causal or none, or kind = encoder."
        )
    if (model.kind == "encoder") != (config.data.objective == "masked"):
        fit, other = ("masked", "decoder") if model.kind == "encoder" else ("next_token", "encoder")
        raise ConfigError(
            f"{where}: data.objective is {config.data.objective}, but model.kind = {model.kind} "
            f"trains with {fit}. Use objective = {fit}, or kind = {other}."
        )
    if config.data.objective == "masked" and config.data.source in ("recall", "modular"):
        raise ConfigError(
            f"{where}: data.source = {config.data.source} scores its answers only and has no masked "
            "objective. Use stdlib, markov or a path."
        )
    if config.train.sample_tokens and model.kind == "encoder":
        raise ConfigError(
            f"{where}: train.sample_tokens is {config.train.sample_tokens}, but an encoder cannot "
            "generate. Set it to 0, or use model.kind = decoder."
        )
    if len(set(lengths)) < len(lengths):
        raise ConfigError(
            f"{where}: train.eval_lengths is {list(lengths[:16])}, which names a length twice. Name each once."
        )
    if max(lengths) > 1 and config.data.source in ("recall", "modular"):
        raise ConfigError(
            f"{where}: train.eval_lengths asks for longer sequences, but data.source = "
            f"{config.data.source} has tasks of one length. Use [1], or another source."
        )
    if 1 not in lengths and model.position == "learned":
        raise ConfigError(
            f"{where}: train.eval_lengths has no 1, but model.position = learned has no positions beyond "
            "model.seq_len. Add 1, or use another position."
        )
    warmup = config.optimizer.warmup_steps
    if config.optimizer.schedule != "constant" and warmup >= config.train.steps:
        raise ConfigError(
            f"{where}: optimizer.warmup_steps is {warmup}, but train.steps = {config.train.steps} "
            f"leaves nothing for the {config.optimizer.schedule} schedule. Warm up for fewer steps."
        )
    _check_size(config, where)


def warnings_of(config: Config) -> tuple[str, ...]:
    """One line for each setting that differs from its default and changes nothing."""
    model, attention, optimizer, init = (
        config.model, config.attention, config.optimizer, config.init,
    )  # fmt: skip
    default = Config()
    gpt_like = ("normal", "gpt2")
    idle = [
        (config.clip.mode == "none" and config.clip.threshold != default.clip.threshold,
         "clip.threshold has no effect with clip.mode = none"),
        (config.clip.mode in ("value", "adaptive") and config.clip.threshold == "none",
         f"clip.mode = {config.clip.mode} has no effect while clip.threshold is none"),
        (optimizer.name == "adamw" and optimizer.momentum != default.optimizer.momentum,
         "optimizer.momentum has no effect with adamw (use betas)"),
        (optimizer.name == "sgd" and optimizer.betas != default.optimizer.betas,
         "optimizer.betas has no effect with sgd (use momentum)"),
        (optimizer.name == "sgd" and optimizer.eps != default.optimizer.eps,
         "optimizer.eps has no effect with sgd"),
        (init.scheme not in gpt_like and init.std != default.init.std,
         f"init.std has no effect with init.scheme = {init.scheme}"),
        (config.precision.loss_scaling and config.precision.dtype != "float16",
         f"precision.loss_scaling has no effect with dtype {config.precision.dtype}"),
        (model.norm == "none" and model.norm_kind != default.model.norm_kind,
         "model.norm_kind has no effect with model.norm = none"),
        (optimizer.lr == 0, "optimizer.lr is 0: nothing will be learned"),
        (optimizer.schedule == "constant" and optimizer.warmup_steps > config.train.steps,
         f"optimizer.warmup_steps = {optimizer.warmup_steps} is more than train.steps = "
         f"{config.train.steps}: lr is never reached"),
        (bool(attention.qk_clip) and attention.qk_norm,
         "attention.qk_clip has no effect with attention.qk_norm: the norm undoes it"),
        (0 < attention.logit_softcap <= attention.qk_clip,
         f"attention.qk_clip = {attention.qk_clip:g} has no effect: attention.logit_softcap = "
         f"{attention.logit_softcap:g} keeps logits below it"),
        (max(config.windows) >= _longest(config),
         "attention.window reaches over the whole seq_len: it hides nothing"),
        (1 in config.windows,
         "attention.window = 1 shows a query nothing but itself: there is no attention to measure"),
    ]  # fmt: skip
    return tuple(text for active, text in idle if active)


def _longest(config: Config) -> int:
    """Tokens of the longest sequence that is trained or evaluated on; learned positions end at seq_len."""
    learned = config.model.position == "learned"
    return config.model.seq_len * (1 if learned else max(config.train.eval_lengths))


def _divisors_near(wanted: int, number: int) -> str:
    """The divisors of `number`, or those nearest to `wanted` where there are many: "1, 2 or 4"."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    divisors = sorted({*small, *(number // n for n in small)}, key=lambda n: abs(n - wanted))
    *most, last = [str(n) for n in sorted(divisors[:SHOWN_DIVISORS])]
    return f"{', '.join(most)} or {last}" if most else last


def _check_size(config: Config, where: str) -> None:
    """Refuse what no machine holds. A lower bound: vocabulary, activations of the MLP and data come on top."""
    model, batch_size = config.model, config.data.batch_size
    width = 4 if config.precision.dtype == "float32" else 2
    d_attn = model.n_heads * config.d_head
    weights = model.n_layers * model.d_model * (4 * d_attn + 2 * config.d_ff)
    stream = model.n_layers * batch_size * model.seq_len * model.d_model
    # Training keeps every layer's attention weights; evaluation on longer sequences only one layer's at a time.
    rows_and_keys = max(model.n_layers * model.seq_len**2, _longest(config) ** 2)
    eager = config.attention.backend == "eager"
    parts = (
        (BYTES_PER_WEIGHT * weights, "weights and optimizer", "model.d_model, d_ff or n_layers"),
        (width * stream, "the residual stream", "data.batch_size or model.seq_len"),
        (
            width * batch_size * model.n_heads * rows_and_keys * eager,
            "attention weights",
            "data.batch_size, model.seq_len or train.eval_lengths, or attention.backend = sdpa",
        ),
    )
    size, what, remedy = max(parts)
    if size > MAX_BYTES:
        raise ConfigError(
            f"{where}: {what} of one member would need {size / 2**40:.3g} TiB of memory or more; the most "
            f"allowed is 1 TiB. Use a smaller {remedy}."
        )
