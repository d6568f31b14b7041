"""Settings that are each fine but not together, and settings that would have no effect."""

from attnscope.config.schema import Config
from attnscope.errors import ConfigError


def check_together(config: Config, *, where: str) -> None:
    """Refuse combinations that cannot be trained.

    Raises:
        ConfigError: one line with the settings, their values and the way out.
    """
    model, attention = config.model, config.attention
    if not model.d_head and model.d_model % model.n_heads:
        divisors = [str(n) for n in range(1, model.d_model + 1) if model.d_model % n == 0]
        raise ConfigError(
            f"{where}: model.n_heads is {model.n_heads}, which does not divide model.d_model = "
            f"{model.d_model}. Use {', '.join(divisors[:-1])} or {divisors[-1]}, or set model.d_head."
            if len(divisors) > 1
            else f"{where}: model.n_heads is {model.n_heads}, more than model.d_model = 1. Use 1."
        )
    if model.position == "rope" and config.d_head % 2:
        raise ConfigError(
            f"{where}: d_head is {config.d_head}, but model.position = rope rotates pairs of "
            "dimensions. Use an even d_head."
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
        fit = "masked" if model.kind == "encoder" else "next_token"
        raise ConfigError(
            f"{where}: data.objective is {config.data.objective}, but model.kind = {model.kind} "
            f"trains with {fit}. Change one of them."
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
    if max(config.train.eval_lengths) > 1 and config.data.source in ("recall", "modular"):
        raise ConfigError(
            f"{where}: train.eval_lengths asks for longer sequences, but data.source = "
            f"{config.data.source} has tasks of one length. Use [1], or another source."
        )
    warmup = config.optimizer.warmup_steps
    if config.optimizer.schedule != "constant" and warmup >= config.train.steps:
        raise ConfigError(
            f"{where}: optimizer.warmup_steps is {warmup}, but train.steps = {config.train.steps} "
            f"leaves nothing for the {config.optimizer.schedule} schedule. Warm up for fewer steps."
        )


def warnings_of(config: Config) -> tuple[str, ...]:
    """One line for each setting that differs from its default and changes nothing."""
    model, attention, optimizer, init = (
        config.model, config.attention, config.optimizer, config.init,
    )  # fmt: skip
    gpt_like = ("normal", "gpt2")
    idle = [
        (config.clip.mode == "none" and config.clip.threshold != "none",
         "clip.threshold has no effect with clip.mode = none"),
        (config.clip.mode in ("value", "adaptive") and config.clip.threshold == "none",
         f"clip.mode = {config.clip.mode} has no effect while clip.threshold is none"),
        (optimizer.name == "adamw" and optimizer.momentum != 0.9,
         "optimizer.momentum has no effect with adamw (use betas)"),
        (optimizer.name == "sgd" and optimizer.betas != (0.9, 0.95),
         "optimizer.betas has no effect with sgd (use momentum)"),
        (optimizer.name == "sgd" and optimizer.eps != 1e-8,
         "optimizer.eps has no effect with sgd"),
        (init.scheme not in gpt_like and init.std != 0.02,
         f"init.std has no effect with init.scheme = {init.scheme}"),
        (config.precision.loss_scaling and config.precision.dtype != "float16",
         f"precision.loss_scaling has no effect with dtype {config.precision.dtype}"),
        (model.norm == "none" and model.norm_kind != "layernorm",
         "model.norm_kind has no effect with model.norm = none"),
        (optimizer.lr == 0, "optimizer.lr is 0: nothing will be learned"),
        (optimizer.schedule == "constant" and optimizer.warmup_steps >= config.train.steps,
         f"optimizer.warmup_steps = {optimizer.warmup_steps} lasts the whole run: lr is never reached"),
        (bool(attention.qk_clip) and attention.qk_norm,
         "attention.qk_clip has no effect with attention.qk_norm: the norm undoes it"),
        (any(window >= model.seq_len for window in config.windows),
         "attention.window reaches over the whole seq_len: it hides nothing"),
    ]  # fmt: skip
    return tuple(text for active, text in idle if active)
