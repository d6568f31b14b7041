"""Attention inside graphs of torch.compile: a probe stands before each softmax and each fused call that Inductor is given.

The probe is an operator without a result that declares to write into a buffer, so that it is not removed as dead code. It
takes what the graph holds in memory anyway: q, k and the mask. Logits that the graph computes are computed again from
them, outside of the graph and at measured steps only, so that what Inductor fuses stays fused. What is looked for in a
graph is in `sites`.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnscope.capture.graphs import is_number
from attnscope.capture.seen import Seen
from attnscope.capture.sites import Site, site_at
from attnscope.errors import error_in_words

SINK = "_attnscope_sink"
FOREIGN = ("flash_attn", "xformers")  # whose operators take what we cannot read
OPTIMIZERS = os.path.join("torch", "optim", "")  # noqa: PTH118 - a part of a path, as stack traces have it

# Called for each call of a probe, with the module, the backend, the tensors it was given, and how to see from them.
OnCompiledCall = Callable[[nn.Module | None, str, list[Tensor], Callable[[], Seen]], None]


class Probes:
    """Puts probes into every graph that is compiled while it is installed; one at a time.

    Invariant: graphs outlive us; their probes do nothing once `remove` was called.
    """

    def __init__(self, on_call: OnCompiledCall, on_failure: Callable[[str], object]) -> None:
        import torch._inductor.config as config  # heavy, and only scripts that compile need it

        self._config = config
        self._before = config.pre_grad_custom_pass
        self._log = logging.getLogger("torch._inductor.codecache")
        self._log.addFilter(_not_of_our_pass)
        _told.on_call, _told.on_failure = on_call, on_failure
        _told.passed_on = self._before if callable(self._before) else None
        config.pre_grad_custom_pass = _insert_probes

    def remove(self) -> None:
        """Leave Inductor as it was."""
        self._config.pre_grad_custom_pass = self._before
        self._log.removeFilter(_not_of_our_pass)
        _told.on_call = None


@dataclass(slots=True)
class _Told:
    """Who is told of calls, and the script's own pass over graphs. Inductor copies its settings: a pass is a plain function."""

    on_call: OnCompiledCall | None = None
    on_failure: Callable[[str], object] = lambda _reason: None
    passed_on: Callable[[fx.Graph], object] | None = None


_told = _Told()
_SITES: list[Site] = []


def _insert_probes(graph: fx.Graph) -> None:
    """What Inductor calls with each graph, before it is differentiated."""
    if _told.passed_on is not None:
        _told.passed_on(graph)
    for node in list(graph.nodes):
        if str(getattr(node.target, "namespace", "")).startswith(FOREIGN):
            _told.on_failure(f"{node.target} in a compiled graph: it can be watched in eager calls only")
        if OPTIMIZERS in str(node.meta.get("stack_trace")):
            _told.on_failure(
                "an optimizer that steps in a compiled graph: its updates are not seen, call it outside of torch.compile"
            )
        try:
            found = site_at(node)
            if found is not None:
                site, inputs = found
                _SITES.append(site)
                _insert(graph, node, len(_SITES) - 1, inputs)
        except Exception as error:
            # A graph that we do not understand must compile as it would without us.
            reason = error_in_words(error)[:200]
            _told.on_failure(f"a compiled graph with {node.format_node()}: {reason}"[:300])
    _say_where_sinks_come_from(graph.owning_module)


@torch.library.custom_op("attnscope::probe", mutates_args=("sink",))
def _probe(sink: Tensor, site: int, tensors: list[Tensor]) -> None:
    if _told.on_call is not None:
        at = _SITES[site]
        detached = [x.detach() for x in tensors]
        _told.on_call(at.module(), at.backend, detached, lambda: at.see(detached))


@_probe.register_fake
def _probe_fake(sink: Tensor, site: int, tensors: list[Tensor]) -> None:
    return None


def _insert(graph: fx.Graph, before: fx.Node, site: int, inputs: list[fx.Node]) -> None:
    owner = graph.owning_module
    assert owner is not None
    device = inputs[0].meta["example_value"].device
    if not hasattr(owner, SINK):
        owner.register_buffer(SINK, torch.zeros(1, device=device))
    with graph.inserting_before(before):
        sink = graph.get_attr(SINK)
        tensors = [_as_tensor(each, device) if is_number(each) else each for each in inputs]
        graph.call_function(torch.ops.attnscope.probe.default, (sink, site, tensors))


def _say_where_sinks_come_from(owner: fx.GraphModule | None) -> None:
    """As Dynamo does of each buffer, also of those in the graphs that a checkpoint has of its own."""
    sources = getattr(owner, "_param_name_to_source", None)
    if owner is None or sources is None:
        return
    from torch._dynamo.source import ConstantSource

    for name, _ in owner.named_buffers():
        if name.endswith(SINK):
            sources[name] = ConstantSource(name)


def _as_tensor(number: fx.Node, device: torch.device) -> fx.Node:
    is_whole = isinstance(number.meta["example_value"], torch.SymInt | int)
    how: dict[str, Any] = {"dtype": torch.int64 if is_whole else torch.float64, "device": device}
    return number.graph.call_function(torch.scalar_tensor, (number,), how)


def _not_of_our_pass(record: logging.LogRecord) -> bool:
    """Inductor warns that a pass without uuid() is run before its cache is asked, which is what we want."""
    return "pre_grad_custom_pass" not in str(record.msg)
