"""Sound programs of many kinds, as people write them: nothing in them is a mistake, however unusual it looks.

Shape key: B batch, H head, T query position, S key position, D d_model, K d_head, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model

V, T, D, H, K, B = 40, 24, 48, 4, 12, 8


def text(seed, n=B, length=T + 1):
    """Sequences (n, length) in which each token is followed by one of three others."""
    draw = torch.Generator().manual_seed(seed)
    after = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(s)) for s in range(3)])
    ids = torch.empty(n, length, dtype=torch.long)
    ids[:, 0] = torch.randint(0, V, (n,), generator=draw)
    for t in range(1, length):
        which = torch.randint(0, 3, (n,), generator=draw)
        ids[:, t] = after[which, ids[:, t - 1]]
    return ids


class Attention(nn.Module):
    """Causal self-attention written out; `logits_of` makes (B, H, T, S) of q and k."""

    def __init__(self, logits_of, *, sink=False):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.logits_of = logits_of
        self.sink = nn.Parameter(torch.zeros(H)) if sink else None

    def forward(self, x_BTD, hidden):
        q, k, v = (part(x_BTD).unflatten(-1, (H, K)).transpose(1, 2) for part in (self.q, self.k, self.v))
        z = self.logits_of(q, k).masked_fill(hidden, -torch.inf)
        if self.sink is not None:
            extra = self.sink.view(1, H, 1, 1).expand(*z.shape[:3], 1)
            p = F.softmax(torch.cat([z, extra], dim=-1), dim=-1)[..., :-1]
        else:
            p = F.softmax(z, dim=-1)
        return self.out((p @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, logits_of, **how):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = Attention(logits_of, **how)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x_BTD, hidden):
        x_BTD = x_BTD + self.attn(self.norm_1(x_BTD), hidden)
        return x_BTD + self.mlp(self.norm_2(x_BTD))


def usual(q, k):
    return q @ k.transpose(-2, -1) * K**-0.5


class GPT(nn.Module):
    """Blocks of a ModuleList between embeddings and an output layer."""

    def __init__(self, logits_of=usual, *, layers=2, seed=0, positions=True, **how):
        super().__init__()
        torch.manual_seed(seed)
        self.wte = nn.Embedding(V, D)
        self.wpe = nn.Embedding(T, D) if positions else None
        self.h = nn.ModuleList(Block(logits_of, **how) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)
        for each in (self.wte, self.wpe, self.head):
            if each is not None:
                nn.init.normal_(each.weight, std=0.02)

    def forward(self, ids_BT, documents_BT=None):
        at = torch.arange(ids_BT.shape[1])
        hidden = at[:, None] < at
        if documents_BT is not None:
            hidden = hidden | (documents_BT[:, None, :, None] != documents_BT[:, None, None, :])
        x = self.wte(ids_BT)
        if self.wpe is not None:
            x = x + self.wpe(at)
        for block in self.h:
            x = block(x, hidden)
        return self.head(self.ln_f(x))


def next_token_loss(model, seed):
    ids = text(seed)
    return F.cross_entropy(model(ids[:, :-1]).reshape(-1, V), ids[:, 1:].reshape(-1))


def adamw(parameters, lr=3e-3):
    return torch.optim.AdamW(parameters, lr=lr)


def train(path, model, loss_of=next_token_loss, *, optimizer=None, steps=120, warmup=10):
    """Watched; loss_of(model, step) is the loss of a step."""
    optimizer = optimizer or adamw(p for p in model.parameters() if p.requires_grad)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
    model.train()
    with watch_model(model, optimizer, path, every=5):
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return open_run(path)


def pretrained(steps=150, **how):
    """A GPT that knows the text."""
    model = GPT(**how)
    optimizer = adamw(model.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        next_token_loss(model, step).backward()
        optimizer.step()
    return model


# -- attention that is not softmax(q.k / sqrt(d_head)) --


def relative_bias(path):
    """T5: no scale, W_q drawn with 1/sqrt(d_model d_head), a bias per distance."""
    torch.manual_seed(0)
    bias = nn.Embedding(2 * T, H)
    at = torch.arange(T)

    def logits_of(q, k):
        n = q.shape[-2]
        return q @ k.transpose(-2, -1) + bias((at[:n, None] - at[:n]) + T).permute(2, 0, 1)

    model = GPT(logits_of, positions=False)
    model.bias = bias
    for block in model.h:
        nn.init.normal_(block.attn.q.weight, std=(D * K) ** -0.5)
        for part in (block.attn.k, block.attn.v):
            nn.init.normal_(part.weight, std=D**-0.5)
    return train(path, model)


def mup(path):
    """muP: 1/d_head, and learning rates of matrices that fall with width."""
    model = GPT(lambda q, k: q @ k.transpose(-2, -1) / K)
    matrices = [p for name, p in model.h.named_parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizer = torch.optim.AdamW([{"params": matrices, "lr": 1e-2 * 8 / D}, {"params": others, "lr": 3e-3}])
    return train(path, model, optimizer=optimizer)


def softcap(path):
    """Gemma 2."""
    return train(path, GPT(lambda q, k: 50 * torch.tanh(usual(q, k) / 50)))


def cosine(path):
    """Swin 2: normalized q and k, times a temperature that is learned and clamped."""
    torch.manual_seed(0)
    temperature = nn.Parameter(torch.full((H, 1, 1), math.log(10.0)))

    def logits_of(q, k):
        return (
            F.normalize(q, dim=-1)
            @ F.normalize(k, dim=-1).transpose(-2, -1)
            * temperature.clamp(max=math.log(100)).exp()
        )

    model = GPT(logits_of)
    model.temperature = temperature
    return train(path, model)


def alibi(path):
    slopes = 2.0 ** -(8.0 / H * torch.arange(1, H + 1))
    at = torch.arange(T)

    def logits_of(q, k):
        n = q.shape[-2]
        return usual(q, k) - slopes[:, None, None] * (at[:n, None] - at[:n]).abs()

    return train(path, GPT(logits_of, positions=False))


def sinks(path):
    """gpt-oss: a logit per head that no key belongs to; weights of keys sum to less than 1."""
    return train(path, GPT(sink=True))


# -- what is trained, and what is not --


def frozen_backbone(path):
    model = pretrained(60)
    model.requires_grad_(False)
    model.head = nn.Linear(D, V, bias=False)
    return train(path, model)


def frozen_embedding(path):
    model = GPT()
    nn.init.normal_(model.wte.weight, std=0.3)
    model.wte.requires_grad_(False)
    return train(path, model)


class LoRA(nn.Module):
    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T * 2.0


def lora(path):
    model = pretrained(60).requires_grad_(False)
    for block in model.h:
        block.attn.q, block.attn.v = LoRA(block.attn.q), LoRA(block.attn.v)
    return train(path, model, optimizer=adamw([p for p in model.parameters() if p.requires_grad], 1e-3))


def fine_tuning(path):
    model = pretrained()
    return train(path, model, lambda m, step: next_token_loss(m, 10_000 + step), optimizer=adamw(model.parameters(), 1e-4), warmup=1)  # fmt: skip


def overfitted(path):
    """From a loss near nothing: eight sequences known by heart."""
    model = GPT()
    optimizer = adamw(model.parameters())
    for _ in range(150):
        optimizer.zero_grad()
        next_token_loss(model, 0).backward()
        optimizer.step()
    return train(path, model, lambda m, step: next_token_loss(m, step % 2), optimizer=adamw(model.parameters(), 1e-4), warmup=1)  # fmt: skip


def five_steps(path):
    return train(path, GPT(), steps=5)


# -- loops --


def accumulation(path):
    """Four micro-batches to an update, each loss divided by four."""

    def loss_of(model, step):
        for part in range(3):
            (next_token_loss(model, 4 * step + part) / 4).backward()
        return next_token_loss(model, 4 * step + 3) / 4

    return train(path, GPT(), loss_of, steps=80)


def packed(path):
    """Documents one after the other in a row, none sees another, the first token of each is no target."""

    def loss_of(model, step):
        ids = torch.cat([text(3 * step + n, length=9) for n in range(3)], dim=1)[:, : T + 1]
        documents = torch.arange(T + 1).expand_as(ids) // 9
        targets = ids[:, 1:].masked_fill(documents[:, 1:] != documents[:, :-1], -100)
        return F.cross_entropy(model(ids[:, :-1], documents[:, :-1]).reshape(-1, V), targets.reshape(-1))

    return train(path, GPT(), loss_of)


def gan(path):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    both = nn.ModuleDict({"generator": generator, "critic": critic})
    one, other = (torch.optim.Adam(m.parameters(), 1e-3, betas=(0.5, 0.99)) for m in (generator, critic))
    yes, no = torch.ones(64, 1), torch.zeros(64, 1)
    judged = F.binary_cross_entropy_with_logits
    with watch_model(both, path=path, every=5):
        for _ in range(150):
            angle = 2 * math.pi * torch.rand(64, 1)
            real, fake = torch.cat([angle.cos(), angle.sin()], dim=1), generator(torch.randn(64, 8))
            other.zero_grad()
            (judged(critic(real), yes) + judged(critic(fake.detach()), no)).backward()
            other.step()
            one.zero_grad()
            judged(critic(fake), yes).backward()
            one.step()
    return open_run(path)


def contrastive(path):
    """CLIP: two towers, a learned temperature, every pair of a batch against every other."""
    torch.manual_seed(0)

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(D, H, 2 * D, dropout=0.0, batch_first=True, norm_first=True)
            self.embedding, self.tower = nn.Embedding(V, D), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.picture = nn.Sequential(nn.Linear(V, D), nn.GELU(), nn.Linear(D, D))
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

        def forward(self, ids, picture):
            a = F.normalize(self.tower(self.embedding(ids)).mean(dim=1), dim=-1)
            return a @ F.normalize(self.picture(picture), dim=-1).T * self.logit_scale.exp().clamp(max=100)

    def loss_of(model, step):
        ids = text(step, 16)
        counts = F.one_hot(ids, V).float().mean(dim=1)
        z, same = model(ids, counts), torch.arange(16)
        return (F.cross_entropy(z, same) + F.cross_entropy(z.T, same)) / 2

    return train(path, Towers(), loss_of, optimizer=None)


def ema_teacher(path):
    """A student that is to say what a slow copy of it says of another view."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(D, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))
    teacher = nn.Sequential(nn.Linear(D, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    predictor = nn.Linear(16, 16)
    model = nn.ModuleDict({"student": student, "predictor": predictor, "teacher": teacher})

    def loss_of(_, step):
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(32, D, generator=draw)
        one, other = (x + 0.1 * torch.randn(x.shape, generator=draw) for _ in range(2))
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
            target = teacher(other)
        return 1 - F.cosine_similarity(predictor(student(one)), target).mean()

    return train(path, model, loss_of)


def translation(path):
    """nn.Transformer with teacher forcing: the reversed sequence."""
    torch.manual_seed(0)

    class Seq2Seq(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.at = nn.Embedding(V, D), nn.Embedding(T + 1, D)
            self.net = nn.Transformer(D, H, 1, 1, 2 * D, dropout=0.1, batch_first=True)
            self.head = nn.Linear(D, V)

        def forward(self, source, target):
            n = target.shape[1]
            later = nn.Transformer.generate_square_subsequent_mask(n)
            x, y = (self.embedding(ids) + self.at.weight[: ids.shape[1]] for ids in (source, target))
            return self.head(self.net(x, y, tgt_mask=later, tgt_is_causal=True))

    def loss_of(model, step):
        source = text(step, length=12)
        target = source.flip(1)
        return F.cross_entropy(model(source, target[:, :-1]).reshape(-1, V), target[:, 1:].reshape(-1))

    return train(path, Seq2Seq(), loss_of)


PROGRAMS = (
    relative_bias, mup, softcap, cosine, alibi, sinks, frozen_backbone, frozen_embedding, lora, fine_tuning, overfitted,
    five_steps, accumulation, packed, gan, contrastive, ema_teacher, translation,
)  # fmt: skip
