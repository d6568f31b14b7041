"""The residual stream of foreign models, as it passes from block to block; nothing is attached to a module.

A block is a module with a number (transformer.h.3) of a class that attends. While one runs, its call is on the stack, with
what it was called with: that is what the block before it has put out. The last block has nobody after it but a final norm,
whose input is looked at where it can be told that it comes from the block. Where that cannot be told there is no row: the
input of a norm that nobody can see would pass for the stream itself.

Everything here is seen at operators inside of blocks, and only in training: with gradients, not in a backward pass, not in a
compiled graph.

Shape key: N calls, C column.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from attnscope.capture.dispatch import outside, why_unseen
from attnscope.capture.eager import in_backward
from attnscope.capture.names import ModuleCall, Modules, NumberedBlock, block_at, blocks_around, module_calls
from attnscope.capture.patches import Patches
from attnscope.capture.seen import Seen
from attnscope.runs.events import BlocksSeen
from attnscope.watch.carried import Carriers, place_in_graph
from attnscope.watch.kept import Kept
from attnscope.watch.layers import MOST_EVALUATED
from attnscope.watch.passed import Passed, measure_stream

NORMS = ("layer_norm", "rms_norm")
# What tells that a block has been entered or left, and which argument passes through; rsqrt is what norms written by hand
# have in common. None = it has no such argument.
OPERATORS = {"linear": 0, "layer_norm": 0, "rms_norm": 0, "addmm": None, "embedding": None, "rsqrt": None}
MOST = 4096  # calls of blocks in one step
MOST_STACKS = 100  # a script may make models at every step
MOST_BLOCKS = 1 << 15  # `layer` is an int16

NO_BLOCKS = "no attention was seen in a numbered block of a model (as transformer.h.3) that was called with gradients"
COMPILED = "the blocks are in compiled graphs, whose calls of modules are not seen"
REENTRANT = "the blocks were called without gradients, as reentrant checkpointing does"
NOTHING_PASSED = "no tensor with three axes was seen to pass from one block straight to the next, or to a final norm"
AXES = "which axis of the residual stream holds the tokens could not be told"


@dataclass(slots=True, kw_only=True)
class _Stack:
    """Blocks one after the other.

    Attributes:
        name: its path.
        model: class of the model.
        first: `layer` of its block 0.
        size: blocks it has.
        blocks: number to the block, as long as it is alive.
        classes: of those blocks that attend.
        batch_first: whether sequences come before tokens; None = not known yet.
        broken_at: the last step at which something was computed between two of its blocks: then they are parts of the model's
            layers, and what passes between them is no stream.
    """

    name: str
    model: str
    first: int
    size: int
    blocks: dict[int, Callable[[], nn.Module | None]] = field(default_factory=dict)
    classes: set[type] = field(default_factory=set)
    batch_first: bool | None = None
    broken_at: int = -1


@dataclass(slots=True, kw_only=True)
class _Entered:
    """The block that was entered last. Places in the autograd graph are sequence numbers, which hold nothing alive.

    Attributes:
        block: its module.
        stack: where it is.
        number: there.
        trains: whether the module was in training mode.
        shapes: of what it was called with.
        places: of these.
        begin: the newest of them; -1 where nothing has one.
        last: place of the newest output in it of an operator that is listened to.
        is_last: that is the output of the last of those operators.
        was_left: something was computed outside of it since.
        is_seen: what it put out was seen.
    """

    block: Callable[[], nn.Module | None]
    stack: _Stack
    number: int
    trains: bool
    shapes: tuple[torch.Size, ...]
    places: tuple[int, ...]
    begin: int
    last: int
    is_last: bool = False
    was_left: bool = False
    is_seen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """What `Passed` has of one call."""

    stack: _Stack
    layer: int
    trains: bool
    size: int
    n_compared: int


class Residual:
    """Follows the stream of the step that goes on.

    Invariant: no tensor, module or frame of the script is kept alive.
    """

    def __init__(self, modules: Modules, *, on_event: Callable[..., None]) -> None:
        self._modules = modules
        self._on_event = on_event
        self._carriers = Carriers(on_event)
        self._stacks: list[_Stack] = []
        self._stack_of = WeakIdKeyDictionary()  # block to its stack
        self._around = WeakIdKeyDictionary()  # what attends to the block that it is in, or None
        self._now: _Entered | None = None
        self._rows: list[_Row] = []
        self._kept = Kept(columns=2, most=MOST)
        self._n_evaluated: dict[int, int] = {}  # layer to calls in this step
        self._why = NO_BLOCKS
        self._has_passed = False

    def listen(self, patches: Patches, tell: Callable[[Callable[[int], None]], None]) -> None:
        """Look at operators; `tell` calls what it is given with the number of the step, if that is measured."""

        def heard(name: str, args: tuple[Any, ...], _kwargs: dict[str, Any], out: Any) -> None:
            if torch.is_grad_enabled() and why_unseen(out) is None and not in_backward():
                tell(lambda step: self._look(step, name, args, out))

        for name in OPERATORS:
            patches.listen(name, partial(heard, name))

    @property
    def why_empty(self) -> dict[str, str]:
        """Why nothing was recorded, to be said of what is empty."""
        return {
            "activation_rms_max": self._why,
            "token_cosine": AXES if self._has_passed else self._why,
            "table layers": self._why,
        }

    def over(self) -> None:
        """A forward pass is over."""
        self._now = None

    def forget(self) -> None:
        """What was seen of this step was another training."""
        self.take(-1)
        self._now = None

    def take(self, step: int) -> Passed | None:
        """What was seen of the step, which is over; None where nothing was."""
        rows, self._rows = self._rows, []
        self._n_evaluated.clear()
        values_NC = self._kept.take()
        whole = [n for n, row in enumerate(rows) if row.stack.broken_at != step]
        if values_NC is None or not whole:
            return None
        self._has_passed = True
        rows = [rows[n] for n in whole]
        return Passed(
            layers=tuple(row.layer for row in rows),
            trains=tuple(row.trains for row in rows),
            sizes=tuple(row.size for row in rows),
            n_compared=tuple(row.n_compared for row in rows),
            values_NC=values_NC if len(whole) == len(values_NC) else values_NC[whole],
        )

    def attend(self, step: int, module: nn.Module | None, seen: Seen) -> None:
        """An attention call: a block that it is in is one of a transformer."""
        if seen.backend.startswith("compiled"):
            self._unseen(COMPILED)
            return
        if module is None or getattr(module, "_is_replica", False):  # of DataParallel, for one call
            return
        place = self._block_around(module)
        if place is None:
            return
        if not torch.is_grad_enabled():
            if module.training:
                self._unseen(REENTRANT)
            return
        call = next((call for call in module_calls() if self._place_of(call.module) == place), None)
        if call is None:
            return
        stack = self._stack_of_block(call.module, place) or self._new_stack(step, call.module, place)
        if stack is not None:
            stack.classes.add(type(call.module))
            self._enter(step, call, stack, place.number)
            self._learn_axes(module, seen)

    def _unseen(self, why: str) -> None:
        """A block runs in which nothing is seen, so that what comes after it is not the output of the one before it."""
        self._now = None
        if why == COMPILED or self._why == NO_BLOCKS:
            self._why = why

    def _look(self, step: int, operator: str, args: tuple[Any, ...], out: Any) -> None:
        if not self._stacks:
            return
        calls = module_calls()
        for call in calls:
            place = self._place_of(call.module)
            stack = None if place is None else self._stack_of_block(call.module, place)
            if place is not None and stack is not None and type(call.module) in stack.classes:
                self._enter(step, call, stack, place.number)
                self._note(out)
                return
        self._leave(step, operator, args, calls)

    def _place_of(self, module: nn.Module) -> NumberedBlock | None:
        name = self._modules.known_name_of(module)
        return block_at(name) if name else None

    def _block_around(self, module: nn.Module) -> NumberedBlock | None:
        """The block that a module is in; of several in one another, the outermost that has a sister of its class.

        In a model whose first part is number 0 and whose second is a whole transformer, that is not the transformer.
        """
        if module in self._around:
            known: NumberedBlock | None = self._around[module]
            return known
        around = blocks_around(self._modules.name_of(module))
        if len(around) > 1:
            model = self._modules.model_of(module)
            around = [block for block in around if self._has_sister(block, model)]
        found = around[0] if around else None
        self._around[module] = found
        return found

    def _has_sister(self, block: NumberedBlock, model: str) -> bool:
        blocks = self._modules.blocks_in(block.stack, model)
        return sum(type(other) is type(blocks.get(block.number)) for other in blocks.values()) > 1

    def _stack_of_block(self, block: nn.Module, place: NumberedBlock) -> _Stack | None:
        """The stack that a block is in; None where none with its path has a place for it, as in another model's stack."""
        found: _Stack | None = self._stack_of.get(block)
        if found is not None:
            return found
        model = self._modules.model_of(block)
        for stack in self._stacks:
            if stack.name == place.stack and stack.model == model and place.number < stack.size:
                other = stack.blocks.get(place.number, _nobody)()
                if other is None:
                    self._put(block, place, stack)
                    return stack
        return None

    def _put(self, block: nn.Module, place: NumberedBlock, stack: _Stack) -> None:
        stack.blocks[place.number] = weakref.ref(block)
        self._stack_of[block] = stack

    def _new_stack(self, step: int, block: nn.Module, place: NumberedBlock) -> _Stack | None:
        """Layers have the numbers of the blocks in the first stack; those of the next stack follow. None = there are too many."""
        model = self._modules.model_of(block)
        first = sum(stack.size for stack in self._stacks)
        size = 1 + max(self._modules.blocks_in(place.stack, model), default=place.number)
        if len(self._stacks) >= MOST_STACKS or first + size > MOST_BLOCKS:
            return None
        stack = _Stack(name=place.stack, model=model, first=first, size=size)
        self._stacks.append(stack)
        self._put(block, place, stack)
        self._on_event(BlocksSeen(name=stack.name, model=model, first_layer=first, n_blocks=size), step=step)
        return stack

    def _enter(self, step: int, call: ModuleCall, stack: _Stack, number: int) -> None:
        """Something is computed in a block, perhaps for the first time in its call."""
        before = self._now
        if before is not None and before.block() is call.module and not before.was_left:
            return
        streams = [outside(x) for x in call.tensors if _may_be_stream(x)]
        if before is not None and before.stack is stack and before.number + 1 == number:
            if before.was_left:
                stack.broken_at = step
            elif not before.is_seen:
                x = _passed_on(before, streams)
                if x is not None:
                    self._add(step, before, x)
        places = tuple(map(place_in_graph, streams))
        begin = max(places, default=-1)
        self._why = COMPILED if self._why == COMPILED else NOTHING_PASSED
        self._now = _Entered(
            block=weakref.ref(call.module),
            stack=stack,
            number=number,
            trains=call.module.training,
            shapes=tuple(x.shape for x in streams),
            places=places,
            begin=begin,
            last=begin,
        )

    def _note(self, out: Any) -> None:
        """An operator in the block that was entered last has put this out."""
        now = self._now
        if now is not None:
            place = place_in_graph(outside(out))
            now.is_last = place > now.begin
            now.last = max(now.last, place)

    def _leave(self, step: int, operator: str, args: tuple[Any, ...], calls: Sequence[ModuleCall]) -> None:
        """Something is computed outside of blocks: the first time, its input may be what the block has put out."""
        now = self._now
        if now is None or now.was_left:
            return
        now.was_left = True
        x = _given(operator, args, calls)
        if x is None or not _may_be_stream(x):
            return
        x = outside(x)
        place = place_in_graph(x)
        is_norm = operator in (*NORMS, "rsqrt")
        # Made after all that was heard in the block; or what it was that was heard there last, whoever takes it.
        comes_from_it = place >= now.last if is_norm else now.is_last and place == now.last
        if x.shape in now.shapes and place > now.begin and comes_from_it:
            self._add(step, now, x)

    def _learn_axes(self, module: nn.Module, seen: Seen) -> None:
        """Which axis of the stream attention runs over; that of a batch as large as its sequences looks like either."""
        now = self._now
        if now is None:
            return
        n_batch, _, n_queries, _ = seen.shape
        leads = [tuple(shape[:2]) for shape in now.shapes if len(shape) == 3]
        if n_batch != n_queries:
            if (n_batch, n_queries) in leads:
                now.stack.batch_first = True
            elif (n_queries, n_batch) in leads:
                now.stack.batch_first = False
        elif (n_batch, n_queries) in leads:
            said = getattr(module, "batch_first", None)
            if isinstance(said, bool):
                now.stack.batch_first = said

    def _add(self, step: int, block: _Entered, x: Tensor) -> None:
        """A block has put this out."""
        block.is_seen = True
        layer = block.stack.first + block.number
        given = [place for shape, place in zip(block.shapes, block.places, strict=True) if shape == x.shape]
        self._carriers.look(step, layer, x, given)
        n_evaluated = self._n_evaluated.get(layer, 0)
        if self._kept.is_full or not x.numel() or (not block.trains and n_evaluated >= MOST_EVALUATED):
            return
        self._n_evaluated[layer] = n_evaluated + (not block.trains)
        rms, cosine, n_compared = measure_stream(x.detach(), batch_first=block.stack.batch_first)
        self._kept.add(rms, cosine)
        row = _Row(stack=block.stack, layer=layer, trains=block.trains, size=x.numel(), n_compared=n_compared)
        self._rows.append(row)


def _nobody() -> None:
    return None


def _may_be_stream(x: Tensor) -> bool:
    return x.dim() >= 3 and x.is_floating_point() and why_unseen(x) is None


def _passed_on(before: _Entered, streams: Sequence[Tensor]) -> Tensor | None:
    """What the block before has put out, among what the next one was called with; None where that could be several.

    A stream is made at the end of a block, after the operators in it. Masks, positions and the states of an encoder are older;
    of two that are as large, one may be the stream without what the block adds to it.
    """
    if before.last < 0:  # nothing there is differentiated
        return streams[0] if len(streams) == 1 else None
    late = [x for x in streams if place_in_graph(x) >= before.last and place_in_graph(x) > before.begin]
    if len(late) != 1:
        return None
    fresh = [x for x in streams if place_in_graph(x) > before.begin and x.shape == late[0].shape]
    return late[0] if len(fresh) == 1 else None


def _given(operator: str, args: tuple[Any, ...], calls: Sequence[ModuleCall]) -> Tensor | None:
    """What an operator that stands for a module was given: by itself, or in the call of a norm that is written by hand."""
    at = OPERATORS[operator]
    if at is not None:
        return args[at]
    if operator != "rsqrt" or not calls or next(calls[0].module.children(), None) is not None:
        return None
    statistics = args[0]
    normed = [x for x in calls[0].tensors if x.shape[:-1] == statistics.shape[:-1]]
    return normed[0] if len(normed) == 1 and statistics.shape[-1:] == (1,) else None
