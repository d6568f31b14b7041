"""Which block a module is in, and which calls of modules go on."""

import gc
import weakref

import torch
from torch import nn

from attnscope.capture.names import Modules, NumberedBlock, block_at, blocks_around, module_calls


def test_a_path_that_ends_in_a_number_is_a_block():
    assert block_at("transformer.h.3") == NumberedBlock(stack="transformer.h", number=3)
    assert block_at("0") == NumberedBlock(stack="", number=0)
    assert block_at("transformer.h.3.attn") is None and block_at("GPT2") is None


def test_blocks_around_a_module_are_in_one_another_the_outermost_first():
    found = blocks_around("decoder.block.2.layer.0.SelfAttention")
    assert found == [
        NumberedBlock(stack="decoder.block", number=2),
        NumberedBlock(stack="decoder.block.2.layer", number=0),
    ]
    assert blocks_around("transformer.attn") == []


def test_the_blocks_of_a_stack_are_those_of_its_model_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Tanh()))
    other = nn.ModuleList([nn.Linear(2, 2)])
    modules = Modules()
    for each in (model, other):
        modules.add(each)
    assert modules.blocks_in("", "Sequential") == dict(enumerate(model))
    assert modules.blocks_in("1", "Sequential") == dict(enumerate(model[1]))
    assert modules.known_name_of(model[1][0]) == "1.0"
    assert modules.known_name_of(nn.Linear(2, 2)) is None


def test_calls_that_go_on_have_what_they_were_called_with_whatever_the_names_mean_since():
    seen = []

    class Inner(nn.Module):
        def forward(self, x, *, scale, mode="none"):
            x = x + scale
            seen.extend(module_calls())
            return x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(2 * x, scale=torch.tensor(3.0))

    model = Outer()
    model(torch.tensor(1.0))
    assert [call.module for call in seen] == [model.inner, model]
    assert [[x.item() for x in call.tensors] for call in seen] == [[2.0, 3.0], [1.0]]


def test_looking_at_calls_keeps_no_argument_alive():
    class Looks(nn.Module):
        def forward(self, x):
            module_calls()
            return 2 * x

    gc.disable()
    try:
        x = torch.ones(3)
        alive = weakref.ref(x)
        Looks()(x)
        del x
        assert alive() is None
    finally:
        gc.enable()
