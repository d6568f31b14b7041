"""Whether a tensor of the script's has numbers that can be read, and why not."""

import sys
from typing import Any

import torch
from torch import Tensor


class UnreadableError(Exception):
    """A tensor has no numbers that can be read here; says why."""


def why_without_numbers(x: Tensor) -> str | None:
    """In words; None where it has."""
    if x.device.type == "meta":
        return "it is on the meta device and has no numbers"
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return "it is inside a transform of torch.func and has no numbers yet"
    fake = getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", None)
    if fake is not None and isinstance(x, fake):
        return "it is a fake tensor and has no numbers"
    return None


@torch.no_grad()
def copy_of_scalar(x: Tensor) -> Tensor:
    """Its number as it is now, (), on its device.

    Raises:
        UnreadableError: it has none that can be read without asking other processes; says why.
    """
    why = why_without_numbers(x)
    if why is not None:
        raise UnreadableError(why)
    if x.is_complex():
        raise UnreadableError("it is complex")
    local: Any = x.detach()
    if hasattr(local, "to_local"):
        if not all(each.is_replicate() for each in local.placements):
            raise UnreadableError("each process has a part of it")
        local = local.to_local()
    if type(local) is not Tensor:
        local = local.as_subclass(Tensor)
    number: Tensor = local.reshape(()).clone()
    return number


def is_readable(x: object) -> bool:
    """Whether it is a plain tensor with numbers, as functions of PyTorch make them."""
    return (
        type(x) in (Tensor, torch.nn.Parameter) and why_without_numbers(x) is None  # type: ignore[arg-type]
    )


def device_name(device: torch.device) -> str:
    """As a person knows it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
