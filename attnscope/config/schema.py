"""Every setting of attnscope: its section, default, what it may be, and whether members of one part may differ in it.

One frozen dataclass per TOML section. A setting that is `per_member` is only a number (or a choice of initial
numbers) to the code that trains, so members that differ in nothing else share one batched part; any other difference
changes shapes or the graph and makes a new part (`attnscope.config.members`).
"""

from dataclasses import Field, dataclass, field, fields
from typing import Any, cast

from attnscope.config.checks import Check, Choice, Flag, Number, OneLine, Several, Whole

SCALES = ("inverse_sqrt", "none", "inverse", "depth", "learned")


def setting(default: object, check: Check, meaning: str, *, per_member: bool = False) -> Any:
    """A dataclass field that knows what it may be (`check`) and what it means (one line, shown in errors and docs)."""
    return field(default=default, metadata={"check": check, "per_member": per_member, "meaning": meaning})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The transformer's shape."""

    kind: str = setting("decoder", Choice(("decoder", "encoder")), "decoder reads left to right")
    d_model: int = setting(128, Whole(low=1), "width of the residual stream")
    n_layers: int = setting(4, Whole(low=1, high=1024), "transformer blocks")
    n_heads: int = setting(2, Whole(low=1, high=1024), "attention heads per layer")
    d_head: int = setting(0, Whole(low=0), "width of a head; 0 = d_model / n_heads")
    d_ff: int = setting(0, Whole(low=0), "width of the MLP; 0 = 4 x d_model")
    seq_len: int = setting(32, Whole(low=2), "tokens per sequence")
    norm: str = setting("none", Choice(("pre", "post", "none")), "where normalization stands")
    norm_kind: str = setting("layernorm", Choice(("layernorm", "rmsnorm")), "which normalization")
    position: str = setting("learned", Choice(("learned", "sinusoidal", "rope", "alibi", "none")), "position encoding")
    activation: str = setting("gelu", Choice(("gelu", "relu", "silu")), "nonlinearity of the MLP")
    tie_embeddings: bool = setting(False, Flag(), "LM head = token embedding, transposed")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """What happens between q, k and the attention output."""

    scale: str | float = setting(
        "inverse_sqrt",
        Number(above=0, words=SCALES),
        "what multiplies q.k: 1/sqrt(d_head), 1, 1/d_head, 1/((layer + 1) sqrt(d_head)), trained, or a number",
        per_member=True,
    )
    mask: str = setting("causal", Choice(("causal", "padding", "none")), "which keys a query may not see")
    window: int | tuple[int, ...] = setting(
        0,
        Several(entry=Whole(low=0), or_one=True),
        "keys a query sees, itself included; 0 = all; a list gives one per layer",
    )
    backend: str = setting("eager", Choice(("eager", "sdpa")), "who computes attention")
    qk_norm: bool = setting(False, Flag(), "RMSNorm of q and k per head, with a gain")
    logit_softcap: float = setting(0.0, Number(low=0), "c tanh(z / c) on attention logits; 0 = off")
    qk_clip: float = setting(0.0, Number(low=0), "QK-Clip threshold on max_logit; 0 = off")
    dropout: float = setting(0.0, Number(low=0, below=1), "share of attention weights dropped")


@dataclass(frozen=True, slots=True, kw_only=True)
class InitConfig:
    """The weights at step 0."""

    scheme: str = setting(
        "xavier_uniform",
        Choice(("xavier_uniform", "xavier_normal", "kaiming", "normal", "orthogonal", "gpt2")),
        "how weight matrices are drawn",
        per_member=True,
    )
    gain: float = setting(1.0, Number(above=0), "multiplies every weight matrix", per_member=True)
    qk_gain: float = setting(1.0, Number(above=0), "multiplies W_q and W_k once more", per_member=True)
    std: float = setting(0.02, Number(above=0), "standard deviation of schemes normal and gpt2", per_member=True)
    embedding_std: float = setting(
        1.0, Number(above=0), "standard deviation of token and position embeddings", per_member=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: str = setting("sgd", Choice(("sgd", "adamw", "muon")), "which optimizer")
    lr: float = setting(1e-3, Number(low=0), "peak learning rate", per_member=True)
    momentum: float = setting(0.9, Number(low=0, below=1), "of sgd and muon", per_member=True)
    betas: tuple[float, float] = setting(
        (0.9, 0.95), Several(entry=Number(low=0, below=1), length=2), "of adamw", per_member=True
    )
    eps: float = setting(1e-8, Number(above=0), "of adamw", per_member=True)
    weight_decay: float = setting(0.0, Number(low=0), "decoupled, on weight matrices only", per_member=True)
    warmup_steps: int = setting(0, Whole(low=0), "steps of linear warm-up", per_member=True)
    schedule: str = setting("constant", Choice(("constant", "cosine", "wsd")), "what follows the warm-up")
    z_loss: float = setting(0.0, Number(low=0), "weight of log_z squared in the loss", per_member=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipConfig:
    """Gradient clipping. The threshold is a norm, a value, or (adaptive: ZClip) a z-score."""

    mode: str = setting("norm", Choice(("none", "norm", "value", "adaptive")), "what is compared")
    threshold: float | str = setting(
        "none", Number(above=0, words=("none",)), "above it gradients are clipped", per_member=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    """The dtype that weights are cast to in the forward pass; master weights stay float32."""

    dtype: str = setting("float32", Choice(("float32", "bfloat16", "float16")), "of the forward and backward pass")
    loss_scaling: bool = setting(False, Flag(), "dynamic loss scaling against float16 underflow")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What is trained on."""

    source: str = setting("stdlib", OneLine(), "stdlib, markov, recall, modular, or the path of a text file or folder")
    batch_size: int = setting(8, Whole(low=1), "sequences per step")
    seed: int = setting(0, Whole(low=0), "of the batches; members of one part see the same")
    objective: str = setting("next_token", Choice(("next_token", "masked")), "what is predicted")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long, where, and what is evaluated on the way."""

    steps: int = setting(300, Whole(low=1), "optimizer updates")
    seed: int = setting(0, Whole(low=0), "of the initial weights and of dropout", per_member=True)
    device: str = setting("auto", Choice(("auto", "cpu", "cuda", "mps")), "where to train")
    compile: bool = setting(False, Flag(), "torch.compile the model")
    eval_every: int = setting(0, Whole(low=0), "steps between evaluations on held-out data; 0 = only at the end")
    eval_lengths: tuple[int, ...] = setting(
        (1,), Several(entry=Whole(low=1, high=64)), "evaluate at these multiples of seq_len"
    )
    sample_tokens: int = setting(
        0,
        Whole(low=0, high=100_000),
        "tokens generated at the end from a held-out prompt; 0 = none",
    )
    checkpoint_every: int = setting(100, Whole(low=0), "steps between checkpoints; 0 = none")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordConfig:
    """What is recorded besides the loss of every step."""

    every: int = setting(1, Whole(low=1), "steps between records of heads and params")
    rows: int | str = setting(32, Whole(low=1, words=("all",)), "query rows sampled per head and step, or all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One named variation: `changes` maps "section.setting" to its value."""

    name: str
    changes: dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A setting that varies in a sweep, and its values."""

    key: str
    values: tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A grid. A cell is one combination of values along the axes; each of its seeds is one member.

    Attributes:
        vary: the axes, the slowest first.
        seeds: values of train.seed.
        baseline: setting to value of the cell that others are compared with, for every axis.
    """

    vary: tuple[Axis, ...]
    seeds: tuple[int, ...]
    baseline: dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that decides what a run does. Without `arms` and `sweep` that is one member, trained as configured."""

    model: ModelConfig = ModelConfig()
    attention: AttentionConfig = AttentionConfig()
    init: InitConfig = InitConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    clip: ClipConfig = ClipConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    record: RecordConfig = RecordConfig()
    arms: tuple[Arm, ...] = ()
    sweep: Sweep | None = None

    @property
    def d_head(self) -> int:
        """Width of one head, resolved."""
        return self.model.d_head or self.model.d_model // self.model.n_heads

    @property
    def d_ff(self) -> int:
        """Width of the MLP, resolved."""
        return self.model.d_ff or 4 * self.model.d_model

    @property
    def windows(self) -> tuple[int, ...]:
        """Visible keys per layer, resolved: 0 = all."""
        window = self.attention.window
        return window if isinstance(window, tuple) else (window,) * self.model.n_layers


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "attention": AttentionConfig,
    "init": InitConfig,
    "optimizer": OptimizerConfig,
    "clip": ClipConfig,
    "precision": PrecisionConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "record": RecordConfig,
}


def check_of(entry: Field[Any]) -> Check:
    """What the setting behind a dataclass field may be."""
    return cast(Check, entry.metadata["check"])


# "section.setting" -> its dataclass field, for every setting there is.
SETTINGS: dict[str, Field[Any]] = {
    f"{section}.{entry.name}": entry for section, kind in SECTIONS.items() for entry in fields(kind)
}
PER_MEMBER = frozenset(key for key, entry in SETTINGS.items() if entry.metadata["per_member"])
