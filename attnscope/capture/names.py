"""Names of modules and parameters as the script's own model has them: transformer.h.3.attn, layer 3."""

import gc
import os
import re
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

# Models that hold the script's own one, and the attribute where they do.
HOLDERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "DataParallel": "module",
}
# What wrappers put before the names of the model they wrap: DistributedDataParallel, torch.compile, checkpoint_wrapper.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
FRAMES = 8  # looked through for the module that a call belongs to

# What models call their number of heads.
HEADS = (
    "num_heads", "n_heads", "n_head", "heads", "num_attention_heads", "nhead", "nheads", "num_head", "head_num", "h",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleCall:
    """A call of a module that goes on.

    Attributes:
        module: what was called.
        tensors: the tensors among its arguments, by place and by name, as they were given.
    """

    module: nn.Module
    tensors: tuple[Tensor, ...]


class Modules:
    """Knows modules and their parameters by name.

    A model that nobody gave is looked for among everything that is alive, which takes as long as a step of training: what is
    found is remembered. Invariant: holds no reference to a module or a parameter, so that a watched model can be freed.
    """

    def __init__(self) -> None:
        # By object: modules may call themselves equal, and an id may be that of a model made later.
        self._names = WeakIdKeyDictionary()
        self._models = WeakIdKeyDictionary()
        self._parameters = WeakIdKeyDictionary()
        self._roots = WeakIdKeyDictionary()  # to a weak reference

    def add(self, root: nn.Module) -> None:
        """Learn the names of everything in `root`."""
        model, at = type(unwrapped(root)).__name__, weakref.ref(root)
        for name, module in root.named_modules():
            self._roots[module] = at
            self._names[module] = without_wrappers(name)
            self._models[module] = model
        for name, parameter in root.named_parameters():
            self._parameters[parameter] = without_wrappers(name)

    def name_of(self, module: nn.Module) -> str:
        """Path from the largest model that holds the module; the name of its class where nothing holds it."""
        self._find(module)
        return self._names[module] or type(module).__name__

    def known_name_of(self, module: nn.Module) -> str | None:
        """The same without a search; None where nobody has asked for a module of its model yet."""
        found: str | None = self._names.get(module)
        return found

    def blocks_in(self, stack: str, model: str) -> dict[int, nn.Module]:
        """The modules known that stand in this stack of a model of this class, by their numbers there."""
        found = {}
        for module, name in self._names.items():
            block = block_at(name)
            if block is not None and block.stack == stack and self._models[module] == model:
                found[block.number] = module
        return found

    def model_of(self, module: nn.Module) -> str:
        """The class of the largest model that holds the module."""
        self._find(module)
        return str(self._models[module])

    def root_of(self, module: nn.Module) -> nn.Module:
        """The largest model that holds the module; itself where that is gone."""
        self._find(module)
        found: nn.Module | None = self._roots[module]()
        return module if found is None else found

    def names_of_parameters(self, parameters: Sequence[Tensor]) -> list[str]:
        """Path of each from the model that is known to have it, else from the largest alive, else parameter 0, 1, ..."""
        unknown = [p for p in parameters if p not in self._parameters]
        if unknown:
            for p, name in zip(unknown, _paths(unknown), strict=True):
                if name is not None:
                    self._parameters[p] = name
        return [self._parameters.get(p, f"parameter {number}") for number, p in enumerate(parameters)]

    def _find(self, module: nn.Module) -> None:
        if module not in self._names:
            self.add(_root_of(module))


def unwrapped(model: nn.Module) -> nn.Module:
    """The script's own model."""
    while type(model).__name__ in HOLDERS:
        model = getattr(model, HOLDERS[type(model).__name__])
    return model


def without_wrappers(name: str) -> str:
    """The name without what torch.compile, DistributedDataParallel and the like put into it."""
    return WRAPPERS.sub("", f"{name}.").removesuffix(".")


def _root_of(module: nn.Module) -> nn.Module:
    """The largest module alive that holds `module`; itself if none does."""
    holders = [each for each in _modules_alive() if any(part is module for part in each.modules())]
    return max(holders, key=lambda each: sum(1 for _ in each.modules()), default=module)


def module_with_id(number: int) -> nn.Module | None:
    """The module alive that has this id."""
    return next((each for each in _modules_alive() if id(each) == number), None)


def _paths(parameters: Sequence[Tensor]) -> list[str | None]:
    """Path of each parameter in the largest module alive that has it."""
    wanted = {id(parameter) for parameter in parameters}
    names: dict[int, str] = {}
    sizes: dict[int, int] = {}
    for module in _modules_alive():
        own = {id(p): name for name, p in module.named_parameters()}
        for key in wanted & own.keys():
            if len(own) > sizes.get(key, 0):
                names[key], sizes[key] = without_wrappers(own[key]), len(own)
    return [names.get(id(parameter)) for parameter in parameters]


def places(names: Mapping[int, str]) -> dict[int, tuple[int, str]]:
    """Parameter to layer and group: transformer.h.3.attn.c_attn.weight is in layer 3, group attn.c_attn.

    The layer is the first number in the name; -1 where there is none. Weight and bias are one group. Where there are several
    stacks of layers (encoder.layers.0, decoder.layers.0) the group says which.
    """
    cut = {key: _cut(name) for key, name in names.items()}
    stacks = {stack for stack, layer, _ in cut.values() if layer >= 0}
    found = {}
    for key, (stack, layer, rest) in cut.items():
        named = f"{stack} {rest}" if layer >= 0 and len(stacks) > 1 else rest
        found[key] = (layer, named or names[key])
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberedBlock:
    """A module with a number: transformer.h.3 is block 3 of the stack transformer.h.

    Attributes:
        stack: path of what holds the blocks; empty where that is the model.
        number: there.
    """

    stack: str
    number: int


def block_at(path: str) -> NumberedBlock | None:
    """The block with this path; None where it does not end in a number."""
    stack, _, number = path.rpartition(".")
    return NumberedBlock(stack=stack, number=int(number)) if number.isdecimal() else None


def blocks_around(path: str) -> list[NumberedBlock]:
    """The blocks that the module with this path is or is in, the outermost first."""
    words = path.split(".")
    blocks = (block_at(".".join(words[: end + 1])) for end in range(len(words)))
    return [block for block in blocks if block is not None]


def module_calls() -> list[ModuleCall]:
    """The calls of modules that go on in this thread, the innermost first.

    Only frames of PyTorch's own `nn.Module.__call__` are looked into: they hold their arguments until they return, and what
    a forward calls its input may have been given another value since.
    """
    frame: FrameType | None = sys._getframe(1)
    calls = []
    while frame is not None:
        if frame.f_code is _CALL:
            names = frame.f_locals
            given = (*names["args"], *names["kwargs"].values())
            tensors = tuple(x for x in given if issubclass(type(x), Tensor))  # isinstance would load lazy objects
            calls.append(ModuleCall(module=names["self"], tensors=tensors))
        frame = frame.f_back
    return calls


def module_of_call() -> nn.Module | None:
    """The module whose method is nearest to the caller on the stack.

    Only what stands first in a method is looked at, so that no frame outside of modules is touched.
    """
    frame = sys._getframe(1).f_back
    looked_at = 0
    while frame is not None and looked_at < FRAMES:
        code = frame.f_code
        if not code.co_filename.startswith(_OURS):
            looked_at += 1
            if code.co_argcount:
                first: Any = frame.f_locals.get(code.co_varnames[0])
                if isinstance(first, nn.Module) and not isinstance(first, nn.Softmax):
                    return first
        frame = frame.f_back
    return None


def called_by_torch() -> bool:
    """Whether what we replaced is called by PyTorch itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("torch.")


def n_heads_of(module: nn.Module | None) -> int | None:
    """How many heads a module says it has."""
    for name in HEADS:
        value = getattr(module, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def batch_and_heads(lead: torch.Size, module: nn.Module | None, d_head: int | None) -> tuple[int, int]:
    """B and H of attention whose tensors have these axes before the last two.

    Two axes are these. In one axis the heads are folded, in more there are windows before them or groups of them: then it
    counts how many the module says it has, if that is the size of the last axes, and of a width that its parameters have.
    """
    if len(lead) == 2:
        return lead[0], lead[1]
    n_heads = n_heads_of(module)
    if module is None or n_heads is None or not _is_width(module, n_heads, d_head):
        return lead[0], lead[1:].numel()
    if len(lead) == 1:
        return (lead[0] // n_heads, n_heads) if lead[0] % n_heads == 0 else (lead[0], 1)
    sizes = (lead[at:].numel() for at in range(len(lead) - 1, 0, -1))
    n_last = next((n for n in sizes if n == n_heads), lead[1:].numel())
    return lead.numel() // n_last, n_last


def _is_width(module: nn.Module, n_heads: int, d_head: int | None) -> bool:
    """Whether all heads together are as wide as a parameter: what a module calls its heads may be something else."""
    sizes = {n for p in module.parameters() for n in p.shape}
    return d_head is None or not sizes or any(n_heads * d_head * parts in sizes for parts in (1, 2, 3))  # fmt: skip


def _cut(name: str) -> tuple[str, int, str]:
    words = name.split(".")
    if words[-1] in ("weight", "bias") and len(words) > 1:
        words = words[:-1]
    for at, word in enumerate(words):
        if word.isdecimal():
            return ".".join(words[:at]), int(word), ".".join(words[at + 1 :]) or words[at - 1]
    return "", -1, ".".join(words)


def any_alive(kind: type) -> bool:
    """Whether there is an object of this class, or of one made from it."""
    return any(issubclass(type(each), kind) for each in gc.get_objects())


def _modules_alive() -> list[nn.Module]:
    # issubclass(type(x)) and not isinstance(x): lazy objects would be loaded by it.
    return [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]


_OURS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")  # noqa: PTH118, PTH120 - as code objects have it
_CALL = nn.Module._wrapped_call_impl.__code__
