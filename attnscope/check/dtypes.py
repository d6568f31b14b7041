"""Whether parts that stand for one another have one dtype, and whether the optimizer can know all parts."""

import re
from collections import Counter

from attnscope.check.attention import Observed
from attnscope.check.case import Case
from attnscope.check.masks import NO_ATTENTION
from attnscope.check.result import Checked, failed, listed, many, not_looked, passed, stated

NUMBER = re.compile(r"\.\d+(?=\.|$)|^\d+(?=\.|$)")


def dtypes(case: Case, observed: Observed) -> Checked:
    """Whether the same part of every layer has the same dtype, and computes attention in it."""
    name = "dtypes"
    kinds: dict[tuple[str, str], dict[str, str]] = {}
    for module_name, module in case.model.named_modules():
        for own_name, p in module.named_parameters(recurse=False):
            if p.is_floating_point():
                kind = (_without_numbers(module_name), f"{type(module).__name__}.{own_name}")
                kinds.setdefault(kind, {})[f"{module_name}.{own_name}"] = _short(str(p.dtype))
    attention: dict[tuple[str, str], dict[str, str]] = {}
    for call in observed.calls:
        kind = (_without_numbers(call.layer), f"q of {call.n_queries} x {call.n_keys}")
        attention.setdefault(kind, {})[call.layer] = call.dtype
    for held, what in ((kinds, "parameter"), (attention, "attention call")):
        odd = [row for dtype_of in held.values() for row in _odd(dtype_of)]
        if odd:
            n_kinds = sum(len(set(dtype_of.values())) > 1 for dtype_of in held.values())
            return failed(
                name,
                f"{many(len(odd), what)} {'has' if len(odd) == 1 else 'have'} another dtype than the same part of other layers: "
                f"{odd[0]['part']} is {odd[0]['dtype']}, {odd[0]['others']} is usual ({many(n_kinds, 'kind')} of parts, "
                f"{listed((str(row['part']) for row in odd), most=4)}).",
                odd,
                "Convert all layers: model.to(dtype) after the last one is made or loaded; autocast around all of the model.",
            )
    counts = Counter(dtype for dtype_of in kinds.values() for dtype in dtype_of.values())
    total = sum(counts.values())
    if len(counts) > 1:
        said = ", ".join(f"{n:,} {dtype}" for dtype, n in counts.most_common())
        return stated(name, f"Of {many(total, 'parameter')}, {said}; the same part of every layer has the same dtype.")
    if not counts:
        return stated(name, "The model has no floating parameters.")
    said = f"All of {many(total, 'parameter')} are {next(iter(counts))}"
    computed = sorted({call.dtype for call in observed.calls})
    return passed(name, f"{said}{', attention is computed in ' + ' and '.join(computed) if computed else ''}.")


def registered_layers(_: Case, observed: Observed) -> Checked:
    """Whether the model knows its layers."""
    name = "registered layers"
    if not observed.calls:
        return not_looked(name, f"No attention was seen: {observed.why}.", NO_ATTENTION)
    outside = [call for call in observed.calls if not call.is_registered]
    if not outside:
        return passed(
            name,
            f"The parameters of {many(len(observed.calls), 'attention call')} are among those of the model.",
        )
    return failed(
        name,
        f"The parameters of {len(outside)} of {many(len(observed.calls), 'attention call')} are not among those of the model "
        f"({listed(call.layer for call in outside)}): no optimizer is given them, and train(), eval() and to() do not reach them.",
        [{"layer": call.layer, "registered": call.is_registered} for call in observed.calls],
        "Keep layers in an nn.ModuleList or nn.ModuleDict, not in a list or a dict.",
    )


def _odd(dtype_of: dict[str, str]) -> list[dict[str, object]]:
    """Those of which there are fewer."""
    (usual, _), *others = Counter(dtype_of.values()).most_common()
    rows = [(part, dtype) for part, dtype in dtype_of.items() if dtype != usual]
    return [{"part": part, "dtype": dtype, "others": usual} for part, dtype in rows] if others else []


def _without_numbers(name: str) -> str:
    return NUMBER.sub(".*", name)


def _short(dtype: str) -> str:
    return dtype.removeprefix("torch.")
