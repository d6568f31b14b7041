"""Everything runs as it was written: what compiled or fused code does inside cannot be seen, and has other rows."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Leave out torch.compile and the fast paths of torch's modules, and let FlexAttention have gradients everywhere."""
    flex: Any = sys.modules.get("torch.nn.attention.flex_attention")
    with ExitStack() as stack:
        # These return other padding, and fewer positions, than the same modules do in training.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if flex is not None:
            _without_compiled_flex(stack, flex, model)
        yield


def _without_compiled_flex(stack: ExitStack, flex: Any, model: nn.Module) -> None:
    if hasattr(flex, "_validate_device"):
        # It refuses gradients on the CPU, which only its compiled kernels lack.
        before, flex._validate_device = flex._validate_device, lambda *_: None
        stack.callback(setattr, flex, "_validate_device", before)
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile")

    def flex_attention(*args: Any, **kwargs: Any) -> Any:
        return flex.flex_attention(*args, **kwargs)  # who looks at it replaces it there

    modules = [getattr(module, "__dict__", None) for module in list(sys.modules.values())]
    holders = [*modules, *(vars(module) for module in model.modules())]
    for names in (names for names in holders if isinstance(names, dict)):
        for name, value in list(names.items()):
            compiled_from = getattr(value, "_torchdynamo_orig_callable", None) if callable(value) else None
            if compiled_from is not None and compiled_from is flex.flex_attention:
                names[name] = flex_attention
                stack.callback(names.__setitem__, name, value)
