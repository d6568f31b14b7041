"""Ways in which a script may look at PyTorch or at itself: each gives the same watched as plain.

Every way is a function that returns what it has seen. Beside looking, each of them runs attention while it is watched.
"""

import collections
import contextlib
import copy
import gc
import inspect
import io
import math
import pickle
import re
import sys
import traceback
import types
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode, get_overridable_functions, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attnscope.runs.reader import open_run
from attnscope.watch.attach import watch_model

FUNCTIONS = {
    "torch.matmul": torch.matmul, "torch.bmm": torch.bmm, "torch.baddbmm": torch.baddbmm, "torch.einsum": torch.einsum,
    "torch.softmax": torch.softmax, "torch.addmm": torch.addmm, "F.linear": F.linear, "F.softmax": F.softmax,
    "F.embedding": F.embedding, "F.layer_norm": F.layer_norm, "F.sdpa": F.scaled_dot_product_attention,
    "Tensor.softmax": torch.Tensor.softmax, "Tensor.__matmul__": torch.Tensor.__matmul__, "Tensor.bmm": torch.Tensor.bmm,
}  # fmt: skip


class Attention(nn.Module):
    """By hand, with what a whole model has around it."""

    def __init__(self, d=16, heads=2):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        w = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(d // self.heads), dim=-1)
        return x + self.out((w @ v).transpose(1, 2).reshape(b, t, d))


class Fused(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def model(kind=Attention):
    torch.manual_seed(0)
    return kind()


def batch(*shape):
    return torch.randn(*(shape or (2, 5, 16)), generator=torch.Generator().manual_seed(1))


def trained(net):
    """Numbers of two steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = net(batch()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in net.parameters()]


# -- compilers and tracers --


def script_a_module():
    net = torch.jit.script(model(lambda: nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16))))
    return str(net.graph), trained(net)


def script_a_function_in_attention():
    @torch.jit.script
    def weights(z: torch.Tensor) -> torch.Tensor:
        return torch.softmax(z, dim=-1)

    q = batch().requires_grad_()
    out = weights(q @ q.mT) @ q
    out.sum().backward()
    return str(weights.graph), out, q.grad


def script_functional():
    @torch.jit.script
    def layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.softmax(F.linear(x, w), dim=-1)

    return layer.code, layer(batch(), batch(16, 16))


def trace_a_model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model(Fused), batch())
    return str(traced.graph), traced(batch())


def trace_by_hand():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model(), batch(2, 70, 16))
    return str(traced.inlined_graph)


def save_a_traced_model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model(), batch())
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        return torch.jit.load(file)(batch())


def freeze_a_script():
    net = model(lambda: nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1))).eval()
    net = torch.jit.freeze(torch.jit.script(net))
    return str(net.graph), net(batch())


def symbolic_trace():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            return torch.softmax(self.linear(x) @ x.mT, -1) @ F.linear(x, self.linear.weight)

    graph = torch.fx.symbolic_trace(model(Plain))
    return graph.code, [str(node.target) for node in graph.graph.nodes], graph(batch())


def make_fx_of_real_tensors():
    return make_fx(model())(batch()).code


def make_fx_of_fake_tensors():
    return make_fx(model(), tracing_mode="fake", _allow_non_fake_inputs=True)(batch()).code


def make_fx_of_symbolic_shapes():
    return make_fx(model(Fused), tracing_mode="symbolic", _allow_non_fake_inputs=True)(batch()).code


def make_fx_before_dispatch():
    return make_fx(model(), pre_dispatch=True)(batch()).code


def export():
    exported = torch.export.export(model(Fused), (batch(),))
    return str(exported.graph), exported.module()(batch())


def export_of_dynamic_shapes():
    sizes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    exported = torch.export.export(model(), (batch(4, 5, 16),), dynamic_shapes=sizes)
    return str(exported.graph), str(exported.run_decompositions().graph)


def graphs_of_dynamo(dynamic=False):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph

    out = torch.compile(model(), backend=backend, dynamic=dynamic)(batch())
    return graphs, out


def graphs_of_dynamo_of_dynamic_shapes():
    return graphs_of_dynamo(dynamic=True)


def graphs_of_autograd(dynamic=False):
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph.code)
        return graph

    net = model()
    compiled = torch.compile(net, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), dynamic=dynamic)  # fmt: skip
    compiled(batch()).square().sum().backward()
    return graphs, net.qkv.weight.grad


def graphs_of_autograd_of_dynamic_shapes():
    return graphs_of_autograd(dynamic=True)


def explained_by_dynamo():
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model(Fused))(batch())
    return explained.graph_count, explained.graph_break_count, explained.op_count


# -- modes, subclasses, counters --


def count_flops():
    with FlopCounterMode(display=False) as counter:
        model()(batch()).sum().backward()
    return counter.get_total_flops(), {k: dict(v) for k, v in counter.get_flop_counts().items()}


def operators_under_a_mode():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names = []
    with Seen():
        model(Fused)(batch()).sum().backward()
        model()(batch()).sum().backward()
    return names


def functions_under_a_mode():
    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(resolve_name(func))
            return func(*args, **(kwargs or {}))

    names = []
    with Seen():
        model()(batch()).sum().backward()
        model(Fused)(batch()).sum().backward()
    return names


def modes_in_the_forward_pass():
    stacks = []
    net = model()

    def look(*_):
        stacks.append((torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()))
        stacks.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    for module in net.modules():
        module.register_forward_hook(look)
    net(batch())
    return stacks


def debug_mode():
    debug = pytest.importorskip("torch.utils._debug_mode").DebugMode()
    with debug:
        model()(batch()).sum().backward()
    return debug.debug_string()


def profiled():
    def names():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            net(batch()).sum().backward()
        return sorted((each.key, each.count) for each in profile.key_averages())

    net = model()
    names()
    return names()


def fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return model(Fused)(torch.randn(2, 5, 16)).shape


def on_the_meta_device():
    with torch.device("meta"):
        out = Attention()(torch.randn(2, 5, 16))
    out.sum().backward()
    return out.shape, out.device


def table_of_functions():
    table = {function: name for name, function in FUNCTIONS.items()}

    class Like:
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return table.get(func, f"not found: {func}")

    x = batch()
    return [
        torch.matmul(Like(), x), torch.bmm(Like(), x), torch.softmax(Like(), -1), F.linear(Like(), x), F.embedding(x, Like()),
        F.layer_norm(Like(), (16,)), F.scaled_dot_product_attention(Like(), x, x), F.softmax(Like(), -1), x @ Like(),
    ]  # fmt: skip


def subclass_that_counts():
    counts = collections.Counter()

    class Counting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            counts[func.__name__] += 1
            return super().__torch_function__(func, types, args, kwargs or {})

    x = batch().as_subclass(Counting)
    out = model()(x)
    return dict(counts), type(out).__name__, out.as_subclass(torch.Tensor)


def subclass_of_backward():
    seen = []

    class Loss(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func is torch.Tensor.backward)
            return super().__torch_function__(func, types, args, kwargs or {})

    loss = model()(batch()).sum().as_subclass(Loss)
    loss.backward()
    return any(seen)


def default_device():
    with torch.device("cpu"):
        return model()(batch())


def masked_causal_bias():
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q = batch(2, 4, 6, 8)
    return [F.scaled_dot_product_attention(q, q, q, attn_mask=mask(6, 6)) for mask in (causal_lower_right, causal_upper_left)]  # fmt: skip


def nested_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        padding = torch.arange(5)[None] >= torch.tensor([3, 5])[:, None]
        with torch.no_grad():
            net.eval()
            torch.manual_seed(0)
            for p in net.parameters():
                p.normal_()
            return net(batch(), src_key_padding_mask=padding)


def jagged_tensors():
    linear = model(lambda: nn.Linear(16, 16))
    x = torch.nested.nested_tensor([batch(n, 16) for n in (5, 9)], layout=torch.jagged)
    out = linear(x)
    out.values().sum().backward()
    return out.values(), linear.weight.grad


# -- transforms --


def weights_of(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def gradient_of_a_function():
    net = model()
    return grad(lambda w: functional_call(net, w, (batch(),)).square().mean())(weights_of(net))


def gradients_per_sample():
    net = model(Fused)

    def loss(w, x):
        return functional_call(net, w, (x[None],)).square().mean()

    return vmap(grad(loss), in_dims=(None, 0))(weights_of(net), batch())


def gradients_per_sample_by_hand():
    net = model()

    def loss(w, x):
        return functional_call(net, w, (x[None],)).square().mean()

    return vmap(grad(loss), in_dims=(None, 0))(weights_of(net), batch())


def jacobian():
    return jacrev(lambda x: model()(x).sum(dim=(0, 2)))(batch())


def forward_mode():
    return jvp(model(), (batch(),), (batch(),))


def hessian_vector_product():
    net = model()
    loss = net(batch()).square().mean()
    first = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), list(net.parameters()))


def checked_gradients():
    net = model().double()
    return torch.autograd.gradcheck(net, (batch(1, 3, 16).double().requires_grad_(),))


# -- the functions themselves --


def identities():
    return [
        torch.matmul is torch._C._VariableFunctions.matmul, F.linear is torch._C._nn.linear,
        F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention,
        torch.Tensor.__matmul__ is torch._C.TensorBase.__matmul__, torch.nn.functional.softmax is F.softmax,
    ]  # fmt: skip


def namespaces():
    owners = (F, torch._C._nn, torch._C._VariableFunctions, torch.special, torch._VF)
    return [{name: id(value) for name, value in vars(owner).items()} for owner in owners if hasattr(owner, "__dict__")]  # fmt: skip


def kinds_and_names():
    return [
        (name, type(f).__name__, f.__name__, getattr(f, "__module__", 0), f.__doc__, repr(f))
        for name, f in FUNCTIONS.items()
    ]


def signatures():
    looked_at = (
        F.softmax, F.embedding, F.layer_norm, torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_,
        torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad, torch.amp.GradScaler.step, torch.compile,
    )  # fmt: skip
    return [(str(inspect.signature(f)), inspect.getsource(f), f.__qualname__, f.__module__) for f in looked_at]  # fmt: skip


def are_builtin():
    return [isinstance(f, types.BuiltinFunctionType) for f in FUNCTIONS.values()]


def overridable_functions():
    return sum(len(each) for each in get_overridable_functions().values()), [
        resolve_name(f) for f in FUNCTIONS.values()
    ]


def pickled_functions():
    keep = (
        torch.matmul,
        torch.bmm,
        F.linear,
        F.softmax,
        F.layer_norm,
        torch.nn.utils.clip_grad_norm_,
    )
    return [pickle.loads(pickle.dumps(f)) is f for f in keep], pickle.dumps((torch.matmul, F.linear))


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.product, self.act = torch.matmul, F.softmax
        self.lin = nn.Linear(16, 16)

    def forward(self, x):
        return self.product(self.act(self.product(self.lin(x), x.mT), dim=-1), x)


def pickled_module():
    file = io.BytesIO()
    net = model(Holder)
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(batch())


def deep_copied_module():
    net = model(Holder)
    twin = copy.deepcopy(net)
    return twin.product is torch.matmul, trained(twin), trained(net)


def functions_held_in_a_dict():
    table = {"softmax": torch.softmax, "sdpa": F.scaled_dot_product_attention, "mm": torch.matmul}
    x = batch().requires_grad_()
    out = table["mm"](table["softmax"](table["mm"](x, x.mT), -1), x) + table["sdpa"](x, x, x)
    out.sum().backward()
    return out, x.grad


# -- autograd and hooks --


def graph_of_autograd():
    names, ahead = [], [model()(batch()).sum().grad_fn]
    while ahead:
        node = ahead.pop()
        names.append(node.name())
        ahead += [each for each, _ in node.next_functions if each is not None]
    return names


def tensors_saved_for_backward():
    packed = []

    def pack(x):
        packed.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model()(batch()).sum().backward()
    return packed


def checkpointed():
    net, calls = model(), []
    net.qkv.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    x = batch().requires_grad_()
    checkpoint(net, x, use_reentrant=False).sum().backward()
    return calls, x.grad


def hooks_of_modules():
    net, calls = model(), []
    for name, module in net.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(("before", name)))
        module.register_full_backward_hook(lambda *_, name=name: calls.append(("backward", name)))
    net(batch().requires_grad_()).sum().backward()
    return calls


def detected_anomaly():
    with torch.autograd.detect_anomaly(check_nan=True), pytest.raises(RuntimeError) as caught:
        (model()(batch()).sum() * float("nan")).log().backward()
    return str(caught.value)


def versions_and_views():
    x = batch().requires_grad_()
    out = model()(x)
    w = torch.softmax(x, -1)
    return out._version, w._version, w._is_view(), w._base is None, out.is_leaf, out.requires_grad


def in_inference_mode():
    with torch.inference_mode():
        out = model()(batch())
        return out.is_inference(), out


def in_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        x = batch()
        q = model(lambda: nn.Linear(16, 16))(x)
        w = torch.softmax(q @ q.mT, -1)
        return q.dtype, w.dtype, (w @ q), model()(x).dtype


def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        return trained(model())
    finally:
        torch.use_deterministic_algorithms(False)


# -- what else a script may see --


def random_numbers():
    torch.manual_seed(3)
    trained(model())
    return torch.rand(3), torch.get_rng_state()


def dropout():
    torch.manual_seed(3)
    q = batch(2, 2, 5, 8).requires_grad_()
    F.scaled_dot_product_attention(q, q, q, dropout_p=0.5).sum().backward()
    return q.grad, F.dropout(torch.softmax(q @ q.mT, -1), 0.3) @ q


def errors():
    said = []
    for call in (
        lambda: F.linear(batch(), batch(3, 3)),
        lambda: torch.softmax(batch(), 7),
        lambda: batch() @ batch(),
        lambda: F.scaled_dot_product_attention(batch(), batch(2, 5, 3), batch()),
        lambda: torch.einsum("bij,bjk->bik", batch(), batch()),
        lambda: F.embedding(torch.tensor([9]), batch(3, 3)),
    ):
        try:
            call()
        except Exception as error:
            said.append((type(error).__name__, str(error)))
            traceback.clear_frames(error.__traceback__)
    return said


def warned():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        F.softmax(batch())
        nn.Softmax()(batch())
    return [(str(each.message), each.filename, each.lineno) for each in caught]


def frees_the_model():
    net = model()
    trained(net)
    out = net(batch())
    gone = weakref.ref(net), weakref.ref(out)
    del net, out
    gc.collect()
    return [each() is None for each in gone]


def callers_in_the_forward_pass():
    net, names = model(), []
    net.norm.register_forward_hook(lambda *_: names.extend(frame.function for frame in inspect.stack()[1:6]))  # fmt: skip
    net(batch())
    return names


def state_of_threads():
    return torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()


def swapped_tensors():
    net = model()
    other = model().double().float()
    net.load_state_dict(other.state_dict(), assign=True)
    return trained(net)


def parametrized():
    net = model()
    torch.nn.utils.parametrizations.weight_norm(net.qkv)
    torch.nn.utils.parametrizations.spectral_norm(net.out)
    return net(batch())


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.ao.quantization.quantize_dynamic(model(), {nn.Linear}, dtype=torch.qint8)
        return type(net.qkv).__module__, net(batch())


def own_operator():
    with torch.library._scoped_library("attnscope_test", "FRAGMENT") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: torch.softmax(x, -1) * 2, "CompositeImplicitAutograd")
        return torch.ops.attnscope_test.double(batch())


WAYS = [
    each
    for name, each in list(vars().items())
    if inspect.isfunction(each)
    and each.__module__ == __name__
    and name not in ("model", "batch", "trained", "weights_of")
    and not any(
        p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(each).parameters.values()
    )
]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, str) and isinstance(b, str):  # names that count up, addresses
        a, b = (re.sub(r"___torch_mangle_\d+|0x[0-9a-f]{6,}", "", text) for text in (a, b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_there_are_at_least_40_ways():
    assert len(WAYS) >= 40


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # fmt: skip
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_script_that_looks_at_pytorch_sees_the_same_watched_as_plain(way, tmp_path):
    with contextlib.suppress(Exception):
        way()  # caches of PyTorch are filled by the first time
    try:
        plain = way()
    except Exception as error:  # also what does not work is the same
        plain = type(error).__name__, str(error).splitlines()[:1]
    net = model()
    with watch_model(path=tmp_path / "run", every=1) as watcher:
        trained(net)
        try:
            watched = way()
        except Exception as error:
            watched = type(error).__name__, str(error).splitlines()[:1]
        trained(net)
    assert watcher.failure is None
    # PyTorch itself may put what does not depend on each other in another order the next time.
    assert equal(plain, watched) or equal(way(), watched)
    run = open_run(tmp_path / "run")
    assert "Attention" in run.events["fields"].map(lambda each: each.get("name")).tolist()
    assert run.heads["entropy"].notna().any()
    assert sys.modules["torch.nn.functional"] is F
