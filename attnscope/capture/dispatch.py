"""Operators of PyTorch, listened to where they are dispatched: below everything that Python sees of them.

No function is replaced. What a script compares, pickles, scripts, traces, exports or finds in a table are PyTorch's own
functions, and an operator is heard however it was called: by any name, from C++, from TorchScript. A kernel of ours stands
before the operator's own one and hands the arguments on as they came.

Where it stands depends on the operator. One that PyTorch composes of others (linear, matmul, softmax) is heard above
autograd, with the tensors of the script; one that has kernels of its own (bmm, embedding) just below it, before a kernel is
chosen. Modes and tensor subclasses that look at operators see the same ones with and without us.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from attnscope.capture.dynamo import compiled_by, leave_alone, set_compiler

Original = Callable[..., Any]
# Called with the operator, and the arguments in the order of its schema, those left out that have their defaults.
Look = Callable[[Original, tuple[Any, ...], dict[str, Any]], Any]

# Devices that attention runs on, as PyTorch calls their kernels.
_BACKENDS = ("CPU", "CUDA", "XPU", "MPS", "HPU", "PrivateUse1")
_KEY: Any = torch._C.DispatchKey
_KEYS: Any = torch._C.DispatchKeySet
_has_kernel: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key


class Listening:
    """Who listens to an operator.

    Invariant: its kernel is registered while somebody listens, and not any longer.
    """

    def __init__(self, name: str) -> None:
        self.looks: tuple[Look, ...] = ()
        self._name = name
        base, _, overload = name.partition(".")
        self._operator: Any = getattr(getattr(torch.ops.aten, base), overload or "default")
        self._library: Any = None

    def add(self, look: Look) -> None:
        """One more."""
        self.looks = (*self.looks, look)
        if self._library is None:
            self._register()

    def discard(self, look: Look) -> None:
        """One less."""
        self.looks = tuple(each for each in self.looks if each is not look)
        if not self.looks and self._library is not None:
            self._library.reset()
            self._library = None

    def _register(self) -> None:
        # Not torch.library.Library, which lets nobody else override the same operator: the script may want to.
        self._library = torch._C._dispatch_library("IMPL", "aten", "", __file__, 0)
        qualified = f"aten::{self._name}"
        below_autograd = torch._C._dispatch_keyset_full_after(_KEY.BackendSelect)
        # Nothing stands in this place but functions without tensors, which ask for a device. Inference mode has no autograd.
        self._library.impl(self._name, "BackendSelect", self._kernel(lambda keys: keys & below_autograd), True)
        if not _has_kernel(qualified, "CompositeImplicitAutograd"):
            return
        # What is composed is the same for every device; as a kernel for the CPU, nobody has another one.
        composed = _KEYS(_KEY.CPU)
        for backend in (*_BACKENDS, "NestedTensor"):
            own = ("NestedTensorCPU", "CompositeImplicitAutogradNestedTensor")
            names = own if backend == "NestedTensor" else (backend,)
            if not any(_has_kernel(qualified, name) for name in (*names, f"Autograd{backend}")):
                kernel = self._kernel(lambda _keys: composed)
                self._library.impl(self._name, f"Autograd{backend}", kernel, True)

    def _kernel(self, below: Callable[[Any], Any]) -> Callable[..., Any]:
        """A kernel that goes on with the keys that `below` makes of those it is called with."""
        redispatch = self._operator.redispatch
        known: dict[int, Any] = {}

        def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
            compiler = set_compiler(None)
            try:
                number = keys.raw_repr()
                rest = known.get(number)
                if rest is None:
                    rest = below(keys)
                    if keys.has(_KEY.PythonDispatcher):  # a graph is made, with kernels in Python
                        rest = rest.add(_KEY.PythonDispatcher)
                    known[number] = rest
                call: Original = partial(redispatch, rest)
                if compiler is not None:
                    call = compiled_by(compiler, call)
                first, *others = self.looks or (_nobody,)
                for look in others:
                    call = partial(_looked_at, look, call)
                return first(call, args, kwargs)
            finally:
                set_compiler(compiler)

        leave_alone(kernel)
        return kernel


def _looked_at(look: Look, call: Original, *args: Any, **kwargs: Any) -> Any:
    return look(call, args, kwargs)


def _nobody(call: Original, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return call(*args, **kwargs)


_listening: dict[str, Listening] = {}
_lock = threading.Lock()


def listen(name: str, look: Look) -> Callable[[], None]:
    """Call `look` in place of an operator, aten::`name`; returns how to stop."""
    with _lock:
        if name not in _listening:
            _listening[name] = Listening(name)
        _listening[name].add(look)

    def stop() -> None:
        with _lock:
            _listening[name].discard(look)

    return stop


def why_unseen(x: object) -> str | None:
    """Why our arithmetic must leave a tensor alone: None = it need not; "" = nothing is computed here, a graph is made."""
    if not isinstance(x, Tensor):
        return "no tensor"
    if torch._C._get_tracing_state() is not None:  # even sizes would become part of the trace
        return "torch.jit.trace"
    if x.is_meta:
        return ""
    kind = type(x)
    if torch._C._functorch.is_functorch_wrapped_tensor(x) and not _is_differentiated(x):
        return "torch.vmap runs over it: its calls are not those of single examples"
    if kind is not Tensor and kind is not nn.Parameter:
        keys: Any = torch._C._dispatch_keys(x)
        if x.is_nested:
            return "nested tensors"
        if keys.has(_KEY.Python):  # its numbers are not where they seem to be
            is_symbolic = kind.__name__ in ("FakeTensor", "FunctionalTensor")
            return "" if is_symbolic else f"a tensor of the class {kind.__name__}"
    elif x.is_nested:
        return "nested tensors"
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "capture of a CUDA graph"
    return None


def outside(given: Any) -> Any:
    """The same tensors, alone or in a tuple or dict, as they are outside of torch.func.grad, if it goes on."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return given
    if isinstance(given, Tensor):
        return _unwrapped(given)
    if isinstance(given, tuple | list):
        return type(given)(map(outside, given))
    if isinstance(given, dict):
        return type(given)((key, outside(value)) for key, value in given.items())
    return given


def _unwrapped(x: Any) -> Any:
    while torch._C._functorch.is_gradtrackingtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def _is_differentiated(x: Tensor) -> bool:
    """Whether torch.func.grad, and nothing else of torch.func, has wrapped a tensor."""
    return not torch._C._functorch.is_functorch_wrapped_tensor(_unwrapped(x))


class Unobserved:
    """A context for our own arithmetic: no mode, default device, profiler or transform of the script's sees it.

    A subclass of tensors keeps its own dispatch: the numbers of a DTensor are nowhere else.
    """

    __slots__ = ("_guards", "_is_profiled")

    def __enter__(self) -> None:
        self._is_profiled = torch._C._autograd._profiler_enabled()
        if self._is_profiled:
            torch._C._autograd._enable_record_function(False)
        guards: list[Any] = [torch._C.DisableTorchFunction()]
        if torch._C._len_torch_dispatch_stack():
            guards.append(_disable_current_modes())
        if torch._C._functorch.peek_interpreter_stack() is not None:
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            guards.append(temporarily_clear_interpreter_stack())
        for guard in guards:
            guard.__enter__()
        self._guards = guards

    def __exit__(self, *_: object) -> None:
        for guard in reversed(self._guards):
            guard.__exit__(None, None, None)
        if self._is_profiled:
            torch._C._autograd._enable_record_function(True)
