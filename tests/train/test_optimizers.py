"""Optimizers against torch.optim, members against themselves alone, and what Muon's orthogonalization gives."""

import pytest
import torch

from attnscope.train.optimizer import (
    DECAYED,
    MATRICES,
    OPTIMIZERS,
    Hyper,
    add_decay,
    optimizer_state,
    orthogonalize,
)

STEPS = 5
SHAPES = {
    "token_embedding": (7, 6),
    "qkv": (2, 6, 3, 6),
    "o": (2, 6, 6),
    "mlp_in": (2, 6, 10),
    "mlp_out": (2, 10, 6),
    "head": (6, 7),
    "norm_attention": (2, 6),
}


def draw(n_members, seed):
    """One tensor per parameter; member i has the same numbers whatever n_members is."""
    members = []
    for member in range(n_members):
        generator = torch.Generator().manual_seed(1000 * member + seed)
        members.append({n: torch.randn(s, generator=generator) for n, s in SHAPES.items()})
    return {name: torch.stack([each[name] for each in members]) for name in SHAPES}


def hyper(**numbers):
    """Numbers of every member; a single one means M = 1."""
    values = {
        "lr": 0.01, "momentum": 0.9, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0,
    } | numbers  # fmt: skip
    n_members = max([len(v) for v in values.values() if isinstance(v, list)], default=1)
    return Hyper(
        **{f"{name}_M": torch.tensor(v if isinstance(v, list) else [v] * n_members) for name, v in values.items()}
    )


def train(name, numbers, *, parameters=None, gradients=None):
    """Five updates with drawn gradients; the parameters and the state afterwards."""
    n_members = len(numbers.lr_M)
    parameters = parameters or draw(n_members, seed=0)
    state = optimizer_state(name, parameters)
    updates = {key: torch.zeros_like(value) for key, value in parameters.items()}
    for step in range(STEPS):
        found = gradients[step] if gradients else draw(n_members, seed=step + 1)
        changed = []
        for key in OPTIMIZERS[name](found, state, numbers, updates):
            add_decay(key, updates[key], parameters[key], numbers)
            parameters[key].add_(updates[key])
            changed.append(key)
        assert sorted(changed) == sorted(SHAPES)
    return parameters, state


def train_with_torch(make):
    leaves = {name: value.clone() for name, value in draw(1, seed=0).items()}
    optimizer = make(leaves)
    for step in range(STEPS):
        for name, gradient in draw(1, seed=step + 1).items():
            leaves[name].grad = gradient
        optimizer.step()
    return leaves


def assert_same(found, expected, tolerance=1e-6):
    for name in SHAPES:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_that_of_torch(momentum):
    found, _ = train("sgd", hyper(momentum=momentum))
    expected = train_with_torch(lambda leaves: torch.optim.SGD(leaves.values(), lr=0.01, momentum=momentum))
    assert_same(found, expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_is_that_of_torch_with_decay_on_weight_matrices_only(weight_decay):
    numbers = hyper(beta2=0.99, eps=1e-3, weight_decay=weight_decay)
    found, _ = train("adamw", numbers)

    def make(leaves):
        decayed = [value for name, value in leaves.items() if name in DECAYED]
        others = [value for name, value in leaves.items() if name not in DECAYED]
        groups = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-3)

    assert_same(found, train_with_torch(make))


def test_weight_decay_leaves_embeddings_and_gains_alone():
    nothing = [{name: torch.zeros(1, *shape) for name, shape in SHAPES.items()}] * STEPS
    before = draw(1, seed=0)
    found, _ = train("sgd", hyper(lr=0.1, weight_decay=0.5), gradients=nothing)
    for name, value in before.items():
        factor = (1 - 0.1 * 0.5) ** STEPS if name in (*MATRICES, "head") else 1
        torch.testing.assert_close(found[name], value * factor)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (3, 2, 24, 80)])
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_orthogonalized_matrices_have_singular_values_near_one(shape, size):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    singular = torch.linalg.svdvals(orthogonalize(x))
    assert singular.min() > 0.6 and singular.max() < 1.3
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    nearest = u @ v
    cosine = (orthogonalize(x) * nearest).sum(dim=(-2, -1)) / (
        orthogonalize(x).flatten(-2).norm(dim=-1) * nearest.flatten(-2).norm(dim=-1)
    )
    assert (cosine > 0.97).all()


def test_muon_orthogonalizes_matrices_and_hands_the_rest_to_adamw():
    numbers = hyper(weight_decay=0.1)
    muon, state = train("muon", numbers)
    adamw, _ = train("adamw", numbers)
    for name in SHAPES:
        assert torch.equal(muon[name], adamw[name]) == (name not in MATRICES), name
        assert (f"momentum.{name}" in state) == (name in MATRICES)
        assert (f"mean.{name}" in state) == (name not in MATRICES)


def one_by_one(name, x):
    """q, k and v are three matrices to Muon."""
    return x.movedim(-2, -3) if name == "qkv" else x


def test_five_updates_of_muon_by_hand():
    found, _ = train("muon", hyper(momentum=0.8))
    expected, momentum = draw(1, seed=0), dict.fromkeys(MATRICES, 0)
    for step in range(STEPS):
        for name, gradient in draw(1, seed=step + 1).items():
            if name in MATRICES:
                momentum[name] = 0.8 * momentum[name] + gradient
                nesterov = gradient + 0.8 * momentum[name]
                width = 10 if name.startswith("mlp") else 6
                direction = orthogonalize(one_by_one(name, nesterov))
                expected[name] -= 0.01 * 0.2 * width**0.5 * one_by_one(name, direction)
    for name in MATRICES:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)


def test_the_update_of_muon_is_as_large_as_one_of_adamw():
    gradient = torch.randn(1, 1, 32, 128, generator=torch.Generator().manual_seed(0))
    others = {name: torch.zeros(1, 1, 4, 4) for name in MATRICES if name != "mlp_in"}
    gradients = {**others, "mlp_in": gradient}
    updates = {name: torch.zeros_like(value) for name, value in gradients.items()}
    list(OPTIMIZERS["muon"](gradients, optimizer_state("muon", gradients), hyper(), updates))
    rms = updates["mlp_in"].square().mean().sqrt().item()
    assert rms == pytest.approx(0.2 * 0.01, rel=0.2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_member_has_its_own_numbers(name):
    lists = {
        "lr": [0.01, 0.1, 0.003],
        "momentum": [0.9, 0.0, 0.5],
        "beta1": [0.9, 0.8, 0.0],
        "beta2": [0.95, 0.999, 0.5],
        "eps": [1e-8, 1e-2, 1e-4],
        "weight_decay": [0.0, 0.1, 1.0],
    }
    together, _ = train(name, hyper(**lists))
    for member in range(3):
        own = hyper(**{key: values[member] for key, values in lists.items()})
        gradients = [
            {key: value[member : member + 1] for key, value in draw(3, seed=step + 1).items()} for step in range(STEPS)
        ]
        parameters = {key: value[member : member + 1] for key, value in draw(3, seed=0).items()}
        alone, _ = train(name, own, parameters=parameters, gradients=gradients)
        for key in SHAPES:
            torch.testing.assert_close(together[key][member], alone[key][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_of_zero_leaves_the_weights(name):
    found, state = train(name, hyper(lr=[0.0, 0.1], weight_decay=1.0))
    for key, value in draw(2, seed=0).items():
        assert torch.equal(found[key][0], value[0])
        assert not torch.equal(found[key][1], value[1])
    assert all(value[0].abs().max() > 0 for value in state.values())  # it still remembers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_member_with_nan_gradients_does_not_disturb_its_neighbour(name):
    gradients = [draw(2, seed=step + 1) for step in range(STEPS)]
    sound, _ = train(name, hyper(lr=[0.01, 0.01]), gradients=gradients)
    for value in gradients[1].values():
        value[1] = float("nan")
    broken, _ = train(name, hyper(lr=[0.01, 0.01]), gradients=gradients)
    for key in SHAPES:
        assert torch.equal(sound[key][0], broken[key][0])
        assert broken[key][1].isnan().all()
