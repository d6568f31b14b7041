"""SGD with momentum, AdamW and Muon, for all members at once: gradients in, updates out.

An optimizer is a function that goes through the parameters, moves its state in place, writes what is to be added to the
parameter into `updates` (weight decay comes later), and yields the parameter's name: so that whoever measures or
applies the update does it while the numbers are in the cache. State tensors are named "<what>.<parameter>" and have the
leading axis M like everything else.

Shape key: M member, L layer, ... the axes of one parameter.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnscope.train.broadcast import fit

# (M, L, fan_in, fan_out); qkv (M, L, fan_in, 3, fan_out)
MATRICES = ("qkv", "o", "mlp_in", "mlp_out")
DECAYED = (*MATRICES, "head")  # weight decay leaves embeddings, gains and scales alone

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan et al. 2024, Muon
NEWTON_SCHULZ_STEPS = 5
MUON_RMS = 0.2  # update RMS like AdamW's, so that one lr fits both (Liu et al. 2025, Moonlight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hyper:
    """The numbers of one step, each (M,)."""

    lr_M: Tensor
    momentum_M: Tensor
    beta1_M: Tensor
    beta2_M: Tensor
    eps_M: Tensor
    weight_decay_M: Tensor


State = dict[str, Tensor]
Tensors = Mapping[str, Tensor]
Optimizer = Callable[[Tensors, State, Hyper, Tensors], Iterator[str]]


def sgd(gradients: Tensors, state: State, hyper: Hyper, updates: Tensors) -> Iterator[str]:
    """Heavy ball: b ← µ b + g, update -lr b (as `torch.optim.SGD`)."""
    down_M = -hyper.lr_M
    for name, gradient in gradients.items():
        momentum = state[f"momentum.{name}"]
        factor = fit(hyper.momentum_M, momentum)
        torch.addcmul(gradient, momentum, factor, out=momentum)
        torch.mul(momentum, fit(down_M, momentum), out=updates[name])
        yield name


def adamw(gradients: Tensors, state: State, hyper: Hyper, updates: Tensors) -> Iterator[str]:
    """Adam with bias correction (Kingma and Ba 2015); decoupled decay (Loshchilov and Hutter 2019) is added later."""
    state["count"] += 1
    correction1_M = 1 - hyper.beta1_M ** state["count"]
    correction2_M = 1 - hyper.beta2_M ** state["count"]
    for name, gradient in gradients.items():
        mean, square, update = state[f"mean.{name}"], state[f"square.{name}"], updates[name]
        mean.lerp_(gradient, fit(1 - hyper.beta1_M, mean))
        square.mul_(fit(hyper.beta2_M, square))
        torch.mul(gradient, gradient, out=update)
        square.addcmul_(update, fit(1 - hyper.beta2_M, square))
        torch.div(square, fit(correction2_M, square), out=update)
        update.sqrt_().add_(fit(hyper.eps_M, square))
        torch.div(mean, update, out=update)
        update.mul_(fit(-hyper.lr_M / correction1_M, mean))
        yield name


def muon(gradients: Tensors, state: State, hyper: Hyper, updates: Tensors) -> Iterator[str]:
    """Orthogonalized momentum for the matrices inside layers (Jordan et al. 2024), AdamW for everything else."""
    rest = {name: gradient for name, gradient in gradients.items() if name not in MATRICES}
    yield from adamw(rest, state, hyper, updates)
    for name in MATRICES:
        gradient, momentum = gradients[name], state[f"momentum.{name}"]
        rate = fit(hyper.momentum_M, momentum)
        momentum.mul_(rate).add_(gradient)
        direction = orthogonalize(_matrices(gradient + momentum * rate))  # Nesterov
        size = MUON_RMS * max(direction.shape[-2:]) ** 0.5
        update = _matrices(updates[name])
        update.copy_(direction).mul_(fit(-hyper.lr_M * size, update))
        yield name


def _matrices(x: Tensor) -> Tensor:
    """One of MATRICES as (..., fan_in, fan_out), a view: q, k and v are three."""
    return x.transpose(2, 3) if x.dim() == 5 else x


def orthogonalize(x: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly (singular values 0.7 to 1.2), by Newton-Schulz; (..., rows, columns)."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y / (torch.linalg.matrix_norm(y, keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if tall else y


OPTIMIZERS: dict[str, Optimizer] = {"sgd": sgd, "adamw": adamw, "muon": muon}
_MOMENTS = {"momentum": ("momentum",), "adam": ("mean", "square")}


def optimizer_state(name: str, parameters: Tensors) -> State:
    """Zeros for everything that optimizer `name` remembers of these parameters."""
    state: State = {}
    for parameter, value in parameters.items():
        kind = "momentum" if name == "sgd" or (name == "muon" and parameter in MATRICES) else "adam"
        state |= {f"{what}.{parameter}": torch.zeros_like(value) for what in _MOMENTS[kind]}
    if name != "sgd":
        some = next(iter(parameters.values()))
        state["count"] = torch.zeros(len(some), device=some.device)
    return state


def add_decay(name: str, update: Tensor, parameter: Tensor, hyper: Hyper) -> None:
    """Add -lr x weight_decay x weight to the update of a weight matrix, in place."""
    if name in DECAYED:
        update.addcmul_(parameter, fit(-hyper.lr_M * hyper.weight_decay_M, parameter))
