"""A training program as plain data: what it builds and how it trains. A fault is a change of some of it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One program. The defaults are a small pre-norm GPT that trains well.

    Attributes:
        attention: how it is computed: written (two products and a softmax), sdpa, mha (nn.MultiheadAttention), gpt2 (the whole
            model is that of transformers, whose blocks and position embeddings are what they are).
        objective: next_token with a causal mask, or masked without one, of padded sequences.
        source: of the data: stdlib, markov, recall or modular.
        norm: pre, post or none.
        position: learned or rope.
        mlp: gelu or swiglu.
        d_model: width.
        n_layers: blocks.
        n_heads: per layer.
        seq_len: tokens of a sequence.
        batch_size: sequences of a step.
        steps: updates.
        seed: of weights, batches and dropout.
        optimizer: adamw, sgd or muon (with adamw for what is no matrix).
        lr: after warm-up.
        warmup: steps of it.
        betas: of adamw.
        eps: of adamw.
        weight_decay: of adamw and muon.
        clip: largest norm of the gradient; 0 = none.
        dropout: of residual branches.
        accumulate: micro-batches of a step.
        dtype: of the weights: float32, bfloat16 or float16.
        scale: what q.k is multiplied by, in units of 1/sqrt(d_head); 0 = nothing.
        mask: causal, none, off_by_one (the next token is visible), transposed (the later ones are), added (hidden keys get +1e4),
            faint (hidden keys get -1e-12), strict (a token does not see itself either, and the first sees nothing).
        padding: hidden, seen, or inverted (nothing else is seen); of the masked objective.
        over_batch: attention takes the batch for the sequence.
        repeats_keys: all keys are that of the first position.
        norm_over: what a norm of a block is taken over: features, or one (each feature by itself).
        softmax_axis: of the logits: -1 keys, -2 queries.
        targets: shifted, same (the input itself), late (two further on), shuffled.
        loss_sign: -1 trains to raise the loss.
        loss_sum: summed over tokens, not averaged.
        divides: micro-batches' losses are divided by their number.
        zeroes_grad: gradients are zeroed after each step.
        repeats_batch: the first batch is the only one.
        poison_at: step whose batch has random targets and inputs of one token; -1 = none.
        has_residual: branches are added to the stream, not put in its place.
        has_attention_residual: those of attention are, where has_residual is true.
        embedding_std: of token embeddings.
        ties: the output layer has the embedding's weights.
        gain: of all initial matrices of blocks.
        qk_gain: of those of q and k.
        dead_layers: whose q and k are zero and stay so.
        copies_heads: all heads of a layer have the queries and keys of the first.
        left_out: words in names of parameters that no optimizer has.
        detached: layers whose branches are cut out of the graph.
        frozen: words in names of parameters that need no gradient, on purpose.
        still: words in names of parameters with a learning rate of 0.
        lr_times: what lr is multiplied by from lr_jump_at on.
        lr_jump_at: step; -1 = none.
        lr_growth: what lr is multiplied by at each step.
        evaluates: the model trains in evaluation mode.
    """

    attention: str = "sdpa"
    objective: str = "next_token"
    source: str = "stdlib"
    norm: str = "pre"
    position: str = "learned"
    mlp: str = "gelu"
    d_model: int = 64
    n_layers: int = 3
    n_heads: int = 4
    seq_len: int = 32
    batch_size: int = 8
    steps: int = 150
    seed: int = 0
    optimizer: str = "adamw"
    lr: float = 2e-3
    warmup: int = 10
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0
    dropout: float = 0.0
    accumulate: int = 1
    dtype: str = "float32"
    scale: float = 1.0
    mask: str = "causal"
    padding: str = "hidden"
    over_batch: bool = False
    repeats_keys: bool = False
    norm_over: str = "features"
    softmax_axis: int = -1
    targets: str = "shifted"
    loss_sign: float = 1.0
    loss_sum: bool = False
    divides: bool = True
    zeroes_grad: bool = True
    repeats_batch: bool = False
    poison_at: int = -1
    has_residual: bool = True
    has_attention_residual: bool = True
    embedding_std: float = 0.02
    ties: bool = False
    gain: float = 1.0
    qk_gain: float = 1.0
    dead_layers: tuple[int, ...] = ()
    copies_heads: bool = False
    left_out: tuple[str, ...] = ()
    detached: tuple[int, ...] = ()
    frozen: tuple[str, ...] = ()
    still: tuple[str, ...] = ()
    lr_times: float = 1.0
    lr_jump_at: int = -1
    lr_growth: float = 1.0
    evaluates: bool = False
