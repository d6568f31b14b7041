"""Half precision, loss scaling, z-loss, QK-Clip and the trained scale: whole training steps of a tiny model."""

import math

import pytest
import torch

from attnscope.config import apply_changes, parse_table
from attnscope.data import Batch
from attnscope.metrics.attention import max_attn_logit
from attnscope.metrics.loss import token_losses
from attnscope.model import forward, initial_parameters
from attnscope.train import step as step_module
from attnscope.train.clipping import clip_state
from attnscope.train.optimizer import optimizer_state
from attnscope.train.step import attention_call, loss_scaling_state, run_step, set_up

CPU = torch.device("cpu")
VOCAB = 11


def tiny(**changes):
    config = parse_table(
        {
            "model": {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 16, "seq_len": 6},
            "data": {"batch_size": 3},
        }
    )
    return apply_changes(config, {key.replace("__", "."): v for key, v in changes.items()}, where="")


def batch_of(step):
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(VOCAB, (3, 7), generator=generator)
    return Batch(tokens_BT=tokens[:, :-1], targets_BT=tokens[:, 1:], scores_all=True, visible_BS=None)


class Training:
    """Members of one part with everything that moves."""

    def __init__(self, *configs):
        config = configs[0]
        self.parameters = initial_parameters(configs, vocab_size=VOCAB)
        self.state = optimizer_state(config.optimizer.name, self.parameters)
        self.state |= clip_state(config.clip.mode, len(configs), CPU)
        if config.precision.loss_scaling:
            self.state |= loss_scaling_state(len(configs), CPU)
        for value in self.parameters.values():
            value.requires_grad_()
        self.setup = set_up(configs, self.parameters, device=CPU, forward=forward)
        self.done = 0

    def step(self, n_steps=1, *, batch=None, observer=None):
        """Train; the losses before each update, (steps, M)."""
        losses = []
        for _ in range(n_steps):
            losses.append(
                run_step(
                    self.setup,
                    self.parameters,
                    self.state,
                    batch or batch_of(self.done),
                    step=self.done,
                    observer=observer,
                )
            )
            self.done += 1
        return torch.stack(losses)

    def snapshot(self):
        everything = {f"parameters/{n}": v for n, v in self.parameters.items()} | self.state
        return {name: value.detach().clone() for name, value in everything.items()}

    def logits(self, batch, observer=None):
        with torch.no_grad():
            return forward(
                {name: value.to(self.setup.dtype) for name, value in self.parameters.items()},
                self.setup.config,
                self.setup.geometry,
                batch.tokens_BT,
                attn_scale_ML=self.setup.attn_scale_ML,
                observer=observer,
            )

    def finite(self):
        return all(value.isfinite().all() for value in self.parameters.values())


def test_float16_overflows_where_float32_does_not():
    large = {"init__qk_gain": 80.0, "init__embedding_std": 4.0, "optimizer__lr": 1e-7}
    half = Training(tiny(precision__dtype="float16", **large))
    single = Training(tiny(precision__dtype="float32", **large))
    assert half.step(5).isnan().any() and not half.finite()
    assert single.step(5).isfinite().all() and single.finite()


def test_float16_gradients_underflow_without_loss_scaling_and_survive_with_it():
    # Small weights make the gradients of q smaller than the smallest float16, 6e-8.
    found = {}
    for scaling in (False, True):
        config = tiny(
            precision__dtype="float16",
            precision__loss_scaling=scaling,
            init__gain=0.01,
            optimizer__lr=1.0,
            optimizer__momentum=0.0,
        )
        training = Training(config)
        before = training.snapshot()
        training.step()
        moved = (training.parameters["qkv"] - before["parameters/qkv"])[..., 0, :]
        found[scaling] = (moved != 0).float().mean().item()
    assert found[True] > 2 * found[False]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_bfloat16_trains_and_keeps_float32_weights(optimizer):
    training = Training(tiny(precision__dtype="bfloat16", optimizer__name=optimizer))
    before = training.snapshot()
    losses = training.step(15, batch=batch_of(0))
    assert losses.isfinite().all() and losses[-1] < losses[0]
    assert training.finite()
    for name, value in training.parameters.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[f"parameters/{name}"])


OVERFLOWING = 2.0**100  # a loss scale no float16 gradient survives


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("clip", ["norm", "value", "adaptive"])
def test_a_step_that_overflows_is_forgotten_by_the_member_concerned_only(optimizer, clip):
    config = tiny(
        precision__dtype="float16",
        precision__loss_scaling=True,
        optimizer__name=optimizer,
        optimizer__weight_decay=0.1,
        clip__mode=clip,
        clip__threshold=2.0,
    )
    both = Training(config, apply_changes(config, {"train.seed": 1}, where=""))
    both.state["loss_scale"].fill_(64.0)
    both.step()
    both.state["loss_scale"][1] = OVERFLOWING
    before = both.snapshot()
    assert both.step().isfinite().all()  # the loss itself is sound
    after = both.snapshot()
    assert after["loss_scale"].tolist() == [64, OVERFLOWING / 2]
    assert after["loss_scale_age"].tolist() == [2, 0]
    for name in before.keys() - {"loss_scale", "loss_scale_age"}:
        assert torch.equal(after[name][1], before[name][1]), name
        assert not torch.equal(after[name][0], before[name][0]), name

    undisturbed = Training(config)
    undisturbed.state["loss_scale"].fill_(64.0)
    undisturbed.step(2)
    for name, value in undisturbed.snapshot().items():
        torch.testing.assert_close(after[name][0], value[0], msg=name)


def test_the_loss_scale_falls_until_gradients_fit_and_then_trains():
    config = tiny(precision__dtype="float16", precision__loss_scaling=True)
    training = Training(config)
    training.state["loss_scale"].fill_(2.0**24)
    training.step(20)
    assert 1 < training.state["loss_scale"].item() < 2.0**24
    assert training.finite() and training.state["loss_scale_age"] > 0


def test_zclip_counts_only_the_norms_it_has_seen():
    config = tiny(
        precision__dtype="float16",
        precision__loss_scaling=True,
        clip__mode="adaptive",
        clip__threshold=2.5,
        optimizer__lr=0.0,
    )
    training = Training(config)
    training.state["loss_scale"].fill_(OVERFLOWING)
    training.step()  # forgotten
    assert training.state["clip_mean"] == 0
    training.state["loss_scale"].fill_(1.0)
    training.step(batch=batch_of(5))
    once = training.state["clip_mean"].item()
    training.step(batch=batch_of(5))
    assert training.state["clip_mean"].item() == pytest.approx(once)
    assert training.state["clip_variance"].item() == pytest.approx(0, abs=1e-6 * once**2)


def test_the_loss_scale_grows_after_enough_good_steps(monkeypatch):
    monkeypatch.setattr(step_module, "LOSS_SCALE_INTERVAL", 3)
    config = tiny(precision__dtype="float16", precision__loss_scaling=True, optimizer__lr=1e-5)
    training = Training(config, config)
    training.state["loss_scale"].copy_(torch.tensor([4.0, OVERFLOWING]))
    scales, ages = [], []
    for _ in range(7):
        training.step()
        scales.append(training.state["loss_scale"].tolist()[0])
        ages.append(training.state["loss_scale_age"].tolist()[0])
    assert scales == [4, 4, 8, 8, 8, 16, 16]
    assert ages == [1, 2, 0, 1, 2, 0, 1]
    assert training.state["loss_scale"][1] == OVERFLOWING / 2**7


def test_loss_scaling_changes_nothing_but_rounding():
    plain = Training(tiny(precision__dtype="float16"))
    scaled = Training(tiny(precision__dtype="float16", precision__loss_scaling=True))
    scaled.state["loss_scale"].fill_(1024.0)
    torch.testing.assert_close(plain.step(10), scaled.step(10), rtol=1e-2, atol=1e-2)


def test_z_loss_pulls_the_log_partition_towards_zero():
    members = [tiny(optimizer__lr=1e-3, optimizer__z_loss=weight) for weight in (0.0, 0.1)]
    training = Training(*members)
    batch = batch_of(0)

    def log_z_square_M():
        return token_losses(training.logits(batch), batch.targets_BT.flatten(), ignore=-100).log_z_square_M

    start_M = log_z_square_M()
    assert start_M[0] == start_M[1]
    training.step(10, batch=batch)
    plain, pulled = log_z_square_M().tolist()
    assert pulled < 0.7 * plain and pulled < start_M[1]


def test_the_gradient_of_the_z_loss_is_two_log_z_times_the_softmax():
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([1, -100, 0, 4])
    losses = token_losses(logits, targets, ignore=-100)
    (gradient,) = torch.autograd.grad(losses.log_z_square_M.sum(), logits)
    log_z = logits.logsumexp(dim=-1, keepdim=True)
    expected = 2 * log_z * logits.softmax(dim=-1) / 3
    expected[0, 1] = 0
    torch.testing.assert_close(gradient, expected)


def test_a_member_without_z_loss_does_not_feel_its_neighbours():
    plain, regular = tiny(), tiny(optimizer__z_loss=0.5)
    torch.testing.assert_close(Training(plain, regular).step(5)[:, 0], Training(plain).step(5)[:, 0])


class Largest:
    """The largest logit of every head in every layer, (M, H) each."""

    def __init__(self):
        self.found = []

    def attention(self, layer, inputs):
        self.found.append(max_attn_logit(attention_call(inputs, None)))

    def residual(self, layer, x_MND):
        pass


def largest_logits(training, batch):
    observer = Largest()
    training.logits(batch, observer)
    return torch.stack(observer.found, dim=1)


def test_qk_clip_brings_every_head_down_to_the_threshold():
    changes = {"attention__scale": "none", "model__n_layers": 1, "optimizer__lr": 0.0}
    batch = batch_of(0)
    before_MLH = largest_logits(Training(tiny(**changes)), batch)
    threshold = before_MLH.mean().item()  # one head above, one below
    assert before_MLH.min() < threshold < before_MLH.max()
    training = Training(tiny(attention__qk_clip=threshold, **changes))
    weights = training.snapshot()
    training.step(batch=batch)
    after_MLH = largest_logits(training, batch)
    torch.testing.assert_close(after_MLH, before_MLH.clamp(max=threshold))
    kept = before_MLH[0, 0] < threshold
    now_D3E, old_D3E = training.parameters["qkv"][0, 0], weights["parameters/qkv"][0, 0]
    for which in range(2):  # q and k
        heads = now_D3E[:, which].unflatten(-1, (2, 8)).unbind(1)
        old = old_D3E[:, which].unflatten(-1, (2, 8)).unbind(1)
        for h in range(2):
            assert torch.equal(heads[h], old[h]) == kept[h].item()
    assert torch.equal(now_D3E[:, 2], old_D3E[:, 2])


def test_qk_clip_holds_attention_logits_while_a_model_trains():
    changes = {
        "attention__scale": "none", "model__norm": "pre", "optimizer__name": "adamw",
        "optimizer__lr": 0.02, "init__qk_gain": 2.0,
    }  # fmt: skip
    batch = batch_of(0)
    free, held = Training(tiny(**changes)), Training(tiny(attention__qk_clip=5.0, **changes))
    free.step(30, batch=batch)
    held.step(30, batch=batch)
    assert largest_logits(free, batch).max() > 20
    assert largest_logits(held, batch).max() < 1.5 * 5  # clipped after the last update, not after the next


def test_qk_clip_does_not_end_a_head_whose_logits_are_infinite():
    # One dimension per head: q.k is a single product, infinite instead of Inf - Inf = NaN.
    config = tiny(attention__qk_clip=5.0, model__d_head=1, init__qk_gain=1e25, precision__loss_scaling=True)
    training = Training(config)
    assert largest_logits(training, batch_of(0)).isposinf().any()
    before = training.snapshot()
    training.step()
    now, then = training.parameters["qkv"], before["parameters/qkv"]
    assert torch.equal(now[..., :2, :], then[..., :2, :])


def test_qk_clip_hands_everything_on_to_the_observer():
    seen = []

    class Silent:
        def attention(self, layer, inputs):
            seen.append(("attention", layer))

        def residual(self, layer, x_MND):
            seen.append(("residual", layer))

        def output(self, output_logits_MNV, losses):
            seen.append("output")

        def gradients(self, gradients, clip):
            seen.append("gradients")

        def parameter(self, name, gradient, weight, update):
            seen.append(name)

    training = Training(tiny(attention__qk_clip=5.0))
    training.step(observer=Silent())
    layers = [(what, layer) for layer in range(2) for what in ("attention", "residual")]
    assert seen == [*layers, "output", "gradients", *training.parameters]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_learned_scale_receives_the_gradient_of_the_loss(backend):
    config = tiny(
        attention__scale="learned",
        attention__backend=backend,
        optimizer__lr=1.0,
        optimizer__momentum=0.0,
    )
    training = Training(config)
    before = training.snapshot()["parameters/scale"]
    batch = batch_of(0)
    exact = {name: value.detach().double() for name, value in training.parameters.items()}

    def loss(scale):
        logits = forward(
            {**exact, "scale": scale}, config, training.setup.geometry, batch.tokens_BT,
            attn_scale_ML=training.setup.attn_scale_ML,
        )  # fmt: skip
        return torch.nn.functional.cross_entropy(logits[0], batch.targets_BT.flatten()).item()

    training.step(batch=batch)
    gradient = before - training.parameters["scale"].detach()
    for layer in range(2):
        for head in range(2):
            nudge = torch.zeros_like(exact["scale"])
            nudge[0, layer, head] = 1e-4
            slope = (loss(exact["scale"] + nudge) - loss(exact["scale"] - nudge)) / 2e-4
            assert abs(slope) > 1e-3
            assert gradient[0, layer, head].item() == pytest.approx(slope, rel=1e-2, abs=1e-4)


def test_dropout_of_a_member_depends_on_its_seed_and_step_only():
    first = tiny(attention__dropout=0.5)
    second = apply_changes(first, {"train.seed": 1}, where="")
    together, alone = Training(second, first), Training(first)
    torch.testing.assert_close(together.step(3)[:, 1], alone.step(3)[:, 0])
    without = Training(tiny())
    assert not math.isclose(without.step()[0].item(), Training(first).step()[0].item(), rel_tol=1e-3)
