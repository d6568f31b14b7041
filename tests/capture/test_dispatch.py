"""Operators are heard however they are called, and nothing is left when nobody listens any more."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F

from attnscope.capture.dispatch import listen, outside, why_unseen
from attnscope.capture.patches import Patches

OPERATORS = (
    "scaled_dot_product_attention", "softmax.int", "matmul", "bmm", "baddbmm", "einsum", "linear", "embedding", "layer_norm",
    "rms_norm", "addmm", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
)  # fmt: skip


@pytest.fixture
def heard():
    """Names of operators in the order in which they are heard, those inside of others too."""
    names = []

    def hear(name):
        def look(original, args, kwargs):
            names.append(name)
            return original(*args, **kwargs)

        return listen(name, look)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stops = [hear(name) for name in OPERATORS]
    yield names
    for stop in stops:
        stop()


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_an_operator_is_heard_by_all_its_names(heard, grad):
    with grad():
        x, w = torch.randn(2, 5, 5), torch.randn(5, 5)
        for call, name in (
            (lambda: x @ x, "matmul"),
            (lambda: torch.matmul(input=x, other=x), "matmul"),
            (lambda: x.__matmul__(x), "matmul"),
            (lambda: torch.bmm(x, x), "bmm"),
            (lambda: x.baddbmm(batch1=x, batch2=x), "baddbmm"),
            (lambda: torch.einsum("bij,bjk->bik", [x, x]), "einsum"),
            (lambda: torch.special.softmax(x, -1), "softmax.int"),
            (lambda: x.softmax(dim=-1), "softmax.int"),
            (lambda: torch.nn.Softmax(-1)(x), "softmax.int"),
            (lambda: F.softmax(x, dim=-1, dtype=torch.float64), "softmax.int"),
            (lambda: F.scaled_dot_product_attention(x, x, x), "scaled_dot_product_attention"),
            (lambda: F.linear(x, w), "linear"),
            (lambda: F.layer_norm(x, (5,)), "layer_norm"),
            (lambda: F.rms_norm(x, (5,)), "rms_norm"),
            (lambda: F.embedding(torch.tensor([1]), w), "embedding"),
            (lambda: torch.addmm(w, w, w), "addmm"),
        ):
            heard.clear()
            call()
            assert heard[0] == name


def test_results_and_gradients_are_those_of_the_operator():
    x = torch.randn(2, 4, 6, 8, requires_grad=True)

    def numbers():
        x.grad = None
        out = F.linear(torch.softmax(x @ x.mT, -1) @ x, torch.eye(8)) + F.layer_norm(x, (8,))
        out = out + torch.einsum("bhij,bhjk->bhik", x @ x.mT, x)
        out.square().sum().backward()
        return out.detach(), x.grad.clone(), out.grad_fn.name()

    plain = numbers()
    stops = [listen(name, lambda original, args, kwargs: original(*args, **kwargs)) for name in OPERATORS]  # fmt: skip
    try:
        watched = numbers()
    finally:
        for stop in stops:
            stop()
    assert torch.equal(plain[0], watched[0]) and torch.equal(plain[1], watched[1])
    assert plain[2] == watched[2]


def test_what_an_operator_is_given_is_what_the_script_gave():
    weight = torch.nn.Parameter(torch.randn(3, 3))
    x, given = torch.randn(2, 3), []

    def look(original, args, kwargs):
        given.extend(args)
        return original(*args, **kwargs)

    stop = listen("linear", look)
    F.linear(x, weight)
    stop()
    assert given[0] is x and given[1] is weight


def test_two_listeners_hear_the_same_call_and_stop_apart():
    heard, x = [], torch.randn(2, 3, 3)

    def look(name):
        def looking(original, args, kwargs):
            heard.append(name)
            return original(*args, **kwargs)

        return looking

    one, two = listen("softmax.int", look("one")), listen("softmax.int", look("two"))
    x.softmax(-1)
    assert sorted(heard) == ["one", "two"]
    one()
    x.softmax(-1)
    two()
    x.softmax(-1)
    assert sorted(heard) == ["one", "two", "two"]


def test_nothing_stays_registered():
    def registered():
        return [torch._C._dispatch_dump(f"aten::{name}") for name in OPERATORS]

    before, errors = registered(), []
    patches = Patches(lambda: True, errors.append)
    for name in OPERATORS:
        patches.listen(name, lambda args, kwargs, out: None)
    assert registered() != before
    patches.restore()
    assert registered() == before


def test_an_error_of_the_operator_is_its_own():
    x = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError) as plain:
        F.linear(x, torch.randn(3, 3))
    stop = listen("linear", lambda original, args, kwargs: original(*args, **kwargs))
    with pytest.raises(RuntimeError) as watched:
        F.linear(x, torch.randn(3, 3))
    stop()
    assert str(watched.value) == str(plain.value)


def test_other_threads_are_heard_too(heard):
    x = torch.randn(2, 3, 3)
    thread = threading.Thread(target=lambda: x.softmax(-1))
    thread.start()
    thread.join()
    assert heard == ["softmax.int"]


def test_a_script_may_override_the_same_operator():
    """torch.library lets one override of a kernel stand, and ours must not be it."""
    x, calls = torch.randn(2, 3, 3), []

    def own(x, dim, dtype=None):
        calls.append(dim)
        return x

    stop = listen("softmax.int", lambda original, args, kwargs: original(*args, **kwargs))
    try:
        with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library.impl("softmax.int", own, "AutogradCPU")
            assert x.softmax(-1) is not None and calls == [-1]
        calls.clear()
        x.softmax(-1)
    finally:
        stop()
    assert calls == []


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_scripted_code_is_heard(heard):
    @torch.jit.script
    def weights(z: torch.Tensor) -> torch.Tensor:
        return torch.softmax(z, dim=-1)

    weights(torch.randn(2, 3, 3))
    assert heard == ["softmax.int"]


def test_which_tensors_are_left_alone():
    x = torch.randn(2, 3)
    assert why_unseen(x) is None and why_unseen(torch.nn.Parameter(x)) is None
    assert why_unseen(x.to("meta")) == ""
    assert why_unseen(torch.nested.nested_tensor([x, x], layout=torch.jagged)) == "nested tensors"
    assert why_unseen("x") == "no tensor"
    said = []
    torch.func.vmap(lambda y: said.append(why_unseen(y)) or y)(x)
    assert said == ["torch.vmap runs over it: its calls are not those of single examples"]
    torch.func.grad(lambda y: said.append((why_unseen(y), type(outside(y)))) or y.sum())(x)
    assert said[1] == (None, torch.Tensor)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert why_unseen(torch.randn(3)) == ""


def test_what_an_observer_raises_does_not_reach_the_script():
    errors, x = [], torch.randn(2, 3, 3)
    patches = Patches(lambda: True, errors.append)
    patches.listen("softmax.int", lambda args, kwargs, out: 1 / 0)
    try:
        watched = x.softmax(-1)
    finally:
        patches.restore()
    assert [type(error) for error in errors] == [ZeroDivisionError]
    assert torch.equal(watched, x.softmax(-1))
