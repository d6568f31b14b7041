"""Puts a report in order: the sections of a document, from its contents and figures."""

from collections.abc import Iterable, Mapping, Sequence

from attnscope.comparison.member import Generation, Softmax
from attnscope.diagnose import Diagnosis, Evidence
from attnscope.findings import chain_in_words, confidence_in_words, evidence_columns, in_words, label
from attnscope.report.blocks import Figure, Heading, Lines, Notes, Paragraph, Section, SectionBlock, Table
from attnscope.report.comparison import comparison_tables
from attnscope.report.contents import Contents
from attnscope.report.numbers import number
from attnscope.runs.layout import COLUMNS

EVIDENCE = ("phase", "matrix", "loss_by_lr", "loss")  # figures that carry the verdict
DETAIL = ("attention", "max_logit", "logit_std", "activations")
GRADIENTS = ("gradients", "group_gradients", "update_ratio")
MOST_MEMBERS = 2000  # rows of a table of members

# The formulas behind the columns, beside the words that `attnscope.runs.layout` has for them.
FORMULAS = {
    "entropy": "mean over rows of -Σ p ln p",
    "entropy_ratio": "mean over rows of (-Σ p ln p) / ln n",
    "max_prob": "mean over rows of max p",
    "saturated": "share of rows with max p > 0.99",
    "logit_std": "√ mean over rows of var(s), s = scale · q·k",
    "max_logit": "max s, s = scale · q·k + bias",
    "max_logit_bound": "scale · max |q| · max |k|",
    "logits_over_5": "share of s with |s - mean(s)| > 5",
    "softmax_gain": "mean over rows of 1 - Σ p²",
    "sink": "mean over rows of p on the first visible key",
    "attn_form_update_ratio": "‖ΔW_q W_kᵀ + W_q ΔW_kᵀ‖ / ‖W_q W_kᵀ‖",
    "loss": "mean of -ln p(target)",
    "grad_norm": "‖g‖₂",
    "update_ratio": "‖Δw‖₂ / ‖w‖₂",
    "token_cosine": "mean over pairs of tokens of cos(h, h′)",
    "log_z": "mean of ln Σ exp(z)",
}


def document_of(contents: Contents, figures: Sequence[Figure]) -> tuple[Section, ...]:
    """The report, section by section, without those that would be empty."""
    named = {figure.name: figure for figure in figures}
    known = {*EVIDENCE, *DETAIL, *GRADIENTS}
    others = [figure.name for figure in figures if figure.name not in known]

    def drawn(names: Iterable[str]) -> list[SectionBlock]:
        return [named[name] for name in names if name in named]

    sections = (
        Section(key="evidence", title="What was seen", blocks=drawn(EVIDENCE)),
        Section(
            key="comparison",
            title="Which setting does what",
            blocks=comparison_tables(contents.comparison, contents.members) if contents.comparison else [],
        ),
        Section(key="findings", title="Findings", blocks=_findings(contents.diagnosis)),
        Section(key="layers", title="Attention that was seen", blocks=_layers(contents)),
        Section(key="differing", title="What differs", blocks=_differing(contents)),
        Section(key="members", title="Members", blocks=[_members(contents)]),
        Section(key="detail", title="Layers and heads", blocks=drawn([*DETAIL, *others])),
        Section(key="gradients", title="Gradients and clipping", blocks=drawn(GRADIENTS)),
        Section(key="events", title="Events", blocks=_happenings(contents)),
        Section(key="evaluations", title="Held-out loss at the end", blocks=_evaluations(contents)),
        Section(
            key="generations",
            title="What they write",
            blocks=[block for generation in contents.generations for block in _generation(generation)],
        ),
        Section(key="how", title="How it was made", blocks=[_how(contents)]),
        Section(
            key="lost",
            title="What could not be read",
            blocks=[Notes(items=contents.lost[:50])] if contents.lost else [],
        ),
        Section(key="definitions", title="Definitions", blocks=_definitions(contents)),
    )
    return tuple(section for section in sections if section.blocks)


def _findings(diagnosis: Diagnosis) -> list[SectionBlock]:
    blocks: list[SectionBlock] = [Paragraph(text=chain_in_words(chain)) for chain in diagnosis.chains]
    for finding in diagnosis.findings:
        title = f"{label(finding).capitalize()}: {finding.title}"
        blocks += [Heading(text=title), Paragraph(text=finding.summary)]
        if finding.evidence:
            blocks.append(_evidence(finding.evidence, finding.evidence_left_out))
        confidence = confidence_in_words(finding.confidence)
        blocks.append(Notes(items=(f"Try: {finding.remedy}", f"Source: {finding.source}", confidence)))
    if diagnosis.not_looked:
        blocks += [Heading(text="Could not look"), Notes(items=in_words(diagnosis.not_looked))]
    return blocks


def _layers(contents: Contents) -> list[SectionBlock]:
    """Of a watched run: each attention layer once, as its first member saw it."""
    first = {layer.layer: layer for layer in reversed(contents.layers)}
    blocks: list[SectionBlock] = []
    if first:
        blocks.append(
            Table(
                titles=("layer", "name", "backend", "mask", "dtype", "heads", "d_head", "scale", "1/√d_head"),
                rows=tuple(
                    (
                        str(number),
                        layer.name,
                        layer.backend,
                        layer.mask,
                        layer.dtype,
                        str(layer.n_heads),
                        str(layer.d_head),
                        _value(layer.scale),
                        _value(layer.d_head**-0.5),
                    )
                    for number, layer in sorted(first.items())
                ),
                words=5,
                caption="scale: what q·k was multiplied by, factors of q and k before the call included; - where no single "
                "number does. Where the code computes its logits itself, it was fitted to them.",
            )
        )
    if contents.not_measured:
        said = dict.fromkeys(f"{x.name} ({x.backend}): {x.reason}" for x in contents.not_measured)
        blocks += [Heading(text="Seen, but not measured"), Notes(items=tuple(said)[:50])]
    return blocks


def _evidence(evidence: Sequence[Evidence], left_out: int) -> Table:
    columns = evidence_columns(evidence)
    words = {title: columns.pop(title) for title in ("member", "quantity")}
    columns = words | columns
    return Table(
        titles=tuple(columns),
        rows=tuple(zip(*columns.values(), strict=True)),
        words=len(words),
        caption=f"and {left_out} more" if left_out else "",
    )


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _members(contents: Contents) -> Table:
    columns = ("entropy", "entropy_ratio", "max_prob", "max_logit")
    rows = tuple(
        (
            member.name,
            member.status,
            "-" if member.step is None else str(member.step),
            number(member.first_loss),
            number(member.best_loss),
            number(member.final_loss),
            number(member.val_loss),
            *(_from_to(member.start, member.end, column) for column in columns),
        )
        for member in contents.members[:MOST_MEMBERS]
    )
    return Table(
        titles=(*("member", "status", "step", "first loss", "best loss", "final loss", "val_loss"), *columns),
        rows=rows,
        words=2,
        caption=_more_members(contents)
        + "Losses in nats per token; the final loss is the mean over the last 20 steps. The step is where a member diverged, "
        "else its last. Attention: first step measured → last step at which it was still finite, mean over layers and heads "
        "(max_logit: the largest).",
    )


def _more_members(contents: Contents) -> str:
    more = len(contents.members) - MOST_MEMBERS
    return f"{more} more members are in the tables of the run. " if more > 0 else ""


def _from_to(start: Softmax, end: Softmax, column: str) -> str:
    return f"{number(getattr(start, column))} → {number(getattr(end, column))}"


def _differing(contents: Contents) -> list[SectionBlock]:
    """Values per member where members are few or unlike each other; the axes where they are a grid."""
    if not contents.differing:
        return []
    if contents.comparison is not None:
        rows = [(key, ", ".join(values)) for key, values in contents.comparison.axes.items()]
        seeds = dict.fromkeys(contents.differing.get("train.seed", ()))
        rows += [("train.seed", ", ".join(seeds))] if seeds else []
        return [Table(titles=("setting", "values"), rows=tuple(rows), words=2)]
    keys = list(contents.differing)
    return [
        Table(
            titles=("member", *keys),
            rows=tuple(
                (member.name, *(member.settings[key] for key in keys)) for member in contents.members[:MOST_MEMBERS]
            ),
            words=1 + len(keys),
        )
    ]


def _happenings(contents: Contents) -> list[SectionBlock]:
    if not contents.events:
        return []
    more = f"{contents.events_left_out} more events are left out here." if contents.events_left_out else ""
    rows = tuple((str(event.step), event.member, event.kind, event.what) for event in contents.events)
    return [Table(titles=("step", "member", "kind", "what"), rows=rows, words=4, caption=more)]


def _evaluations(contents: Contents) -> list[SectionBlock]:
    if not contents.evaluations:
        return []
    lengths = sorted({evaluation.seq_len for evaluation in contents.evaluations})[:20]
    val_loss = {(evaluation.member, evaluation.seq_len): evaluation.val_loss for evaluation in contents.evaluations}
    names = dict.fromkeys(evaluation.member for evaluation in contents.evaluations)
    return [
        Table(
            titles=("member", *(f"{length} tokens" for length in lengths)),
            rows=tuple(
                (name, *(number(val_loss.get((name, length))) for length in lengths))
                for name in list(names)[:MOST_MEMBERS]
            ),
            words=1,
            caption="Nats per token, over sequences of that length.",
        )
    ]


def _generation(generation: Generation) -> list[SectionBlock]:
    blocks: list[SectionBlock] = [Heading(text=f"What {generation.member} writes")]
    if generation.loss_from_prefixes is not None:
        blocks.append(
            Paragraph(
                text=f"Loss from prefixes: {number(generation.loss_from_prefixes)} nats per token. It is measured as generation "
                "works, one token after the other, and sees no token that it has to predict."
            )
        )
    return [
        *blocks,
        Paragraph(text="After the held-out prompt"),
        Lines(lines=generation.prompt),
        Paragraph(text="it goes on with"),
        Lines(lines=generation.text),
    ]


def _how(contents: Contents) -> Table:
    rows = [
        ("run", f"{contents.name}, {contents.status}, created {contents.created}"),
        ("command", contents.command or "-"),
    ]
    rows += [(f"{name} loss", f"{number(value)} nats per token") for name, value in contents.reference.items()]
    rows += [(f"data: {key}", value) for key, value in contents.data.items()]
    rows += list(contents.environment.items())
    if contents.rows:
        least, most = contents.rows
        measured = str(most) if least == most else f"{least} to {most}"
        rows.append(("query rows measured", f"{measured} per head and step"))
    return Table(titles=("what", "value"), rows=tuple(rows), words=2)


def _definitions(contents: Contents) -> list[SectionBlock]:
    blocks: list[SectionBlock] = []
    if contents.rows:
        blocks.append(
            Paragraph(
                text="Attention is measured on a sample of query rows, drawn anew every step (record.rows); max_logit_bound is "
                "over all rows. s are the attention logits after scale, bias and mask, p their softmax, n the number of "
                "visible keys."
            )
        )
    titles = {
        "heads": "Per head (Run.heads)",
        "steps": "Per step (Run.steps)",
        "layers": "Per layer (Run.layers)",
        "params": "Per parameter group (Run.params)",
    }
    for table, title in titles.items():
        blocks += [Heading(text=title), _columns_of(table, FORMULAS)]
    return blocks


def _columns_of(table: str, formulas: Mapping[str, str]) -> Table:
    return Table(
        titles=("column", "what", "formula", "unit", "source"),
        rows=tuple(
            (name, column.meaning, formulas.get(name, ""), column.unit, column.source)
            for name, column in COLUMNS[table].items()
        ),
        words=5,
    )
