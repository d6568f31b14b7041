"""Whatever is done to a model inside, afterwards it is as it was, and so are the random numbers of the process."""

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (dict, OrderedDict, list, set)  # of which forward passes change the contents


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back all of the model and all random numbers.

    That is: parameters (of which it takes a copy), their gradients and requires_grad, buffers, training flags, plain
    attributes of every module and what lists, dictionaries and sets among them hold, generators that modules own, and the
    states of torch on every device in use, numpy and random.
    """
    parameters = list(model.parameters())
    contents = [p.detach().clone() for p in parameters]
    flags = [(p.requires_grad, p.grad) for p in parameters]
    generators = [
        (value, value.get_state())
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Generator)
    ]
    for p in parameters:
        p.grad = None  # so that nothing can be added to it
    try:
        with same_state(model):
            yield
    finally:
        for p, content, (requires_grad, grad) in zip(parameters, contents, flags, strict=True):
            if not torch.equal(p, content):
                p.data.copy_(content)
            p.requires_grad_(requires_grad)
            p.grad = grad
        for generator, state in generators:
            generator.set_state(state)


@contextmanager
def same_state(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass changes in a model, and the random numbers: `undisturbed` but parameters and own generators."""
    modules = [_Attributes(module) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    put_back = random_numbers()
    try:
        yield
    finally:
        put_back()
        for attributes in modules:
            attributes.put_back()
        for buffer, content in buffers:
            if not torch.equal(buffer, content):
                buffer.data.copy_(content)


def random_numbers() -> Callable[[], None]:
    """Remember the states of all global generators; the returned function puts them back."""
    numpy: Any = sys.modules.get("numpy")
    python, cpu = random.getstate(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    numpys = None if numpy is None else numpy.random.get_state()

    def put_back() -> None:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        if numpys is not None:
            numpy.random.set_state(numpys)

    return put_back


def seed_all(seed: int) -> None:
    """Seed all global generators in use.

    torch.manual_seed would also seed devices that nobody has used yet, which could not be put back.
    """
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


class _Attributes:
    """What stands in a module at the moment, one level deep.

    Invariant: `put_back` leaves the same objects in the same places; it changes only what has changed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._now = vars(module)
        self._before = dict(self._now)
        self._held: list[tuple[Any, Any]] = [
            (value, value.copy()) for value in self._before.values() if type(value) in CONTAINERS
        ]

    def put_back(self) -> None:
        if _differ(self._now, self._before):
            self._now.clear()
            self._now.update(self._before)
        for value, before in self._held:
            if _differ(value, before):
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(before)


def _differ(value: Any, before: Any) -> bool:
    """By the identity of what they hold: tensors and arrays cannot be asked for equality."""
    if len(value) != len(before):
        return True
    if isinstance(value, dict):
        return any(
            ours != theirs or value[ours] is not before[theirs] for ours, theirs in zip(value, before, strict=True)
        )
    if isinstance(value, list):
        return any(ours is not theirs for ours, theirs in zip(value, before, strict=True))
    return {id(item) for item in value} != {id(item) for item in before}


def copied(value: Any, keep: Tensor | None = None) -> Any:
    """Arguments of its own for a forward pass that may write into them: tensors, what holds them, caches; but not `keep`."""
    if isinstance(value, Tensor):
        return value if value is keep else value.detach().clone()
    if type(value) in (dict, OrderedDict):
        return type(value)((key, copied(item, keep)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(copied(item, keep) for item in value)
    if isinstance(value, nn.Module):
        return value
    try:
        return copy.deepcopy(value)  # a cache of keys and values
    except Exception:  # whatever cannot be copied is handed on as it is
        return value
