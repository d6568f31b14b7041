"""The report as one Markdown file. Texts of a run are escaped: they show themselves and mark nothing up."""

import re
from collections.abc import Iterable, Mapping, Sequence

from attnscope.report.contents import Contents, Generation
from attnscope.report.figures import Figure
from attnscope.report.numbers import number
from attnscope.report.verdict import Softmax
from attnscope.runs.layout import COLUMNS, Column

MOST_MEMBERS = 500  # rows of the members table


def to_markdown(found: Contents, figures: Sequence[Figure], *, folder: str) -> str:
    """Lay out a report; `folder` is where the figures stand beside it."""
    sections = [
        f"# {escaped(found.name)}",
        "\n\n".join(escaped(sentence) for sentence in found.verdict),
        _members(found),
        *_differing(found),
        *(
            f"## {figure.title}\n\n![{figure.alt}]({folder}/{figure.name}.png)\n\n{figure.caption}"
            for figure in figures
        ),
        *_happenings(found),
        *_evaluations(found),
        *(_generation(each) for each in found.generations),
        _how(found),
        *_lost(found),
        _definitions(found),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def escaped(text: str) -> str:
    """A line of text that Markdown, and HTML made of it, shows as it is."""
    text = re.sub(r"([\\`*_\[\]<>#|~&@])", r"\\\1", text)
    return re.sub(r"(?i)(:)(//)|\b(www)(\.)", lambda m: f"{m[1] or m[3]}\\{m[2] or m[4]}", text)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, right: int) -> str:
    """A table whose last `right` columns are numbers."""
    left = len(titles) - right
    lines = [titles, ["---"] * left + ["---:"] * right, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _members(found: Contents) -> str:
    titles = ["member", "status", "step", "first loss", "best loss", "final loss", "val_loss"]
    columns = ("entropy", "entropy_ratio", "max_prob", "max_logit")
    rows = [
        [
            escaped(member.name),
            member.status,
            "-" if member.step is None else str(member.step),
            number(member.first_loss),
            number(member.best_loss),
            number(member.final_loss),
            number(member.val_loss),
            *(_from_to(member.start, member.end, column) for column in columns),
        ]
        for member in found.members[:MOST_MEMBERS]
    ]
    more = len(found.members) - MOST_MEMBERS
    return "\n\n".join(
        [
            "## Members",
            _table([*titles, *columns], rows, right=9),
            *([f"{more} more members are in the tables of the run."] if more > 0 else []),
            "Losses in nats per token; the final loss is the mean over the last 20 steps. The step is where a member "
            "diverged, else its last. Attention: first step measured → last step at which it was still finite, mean over "
            "layers and heads (max_logit: the largest).",
        ]
    )


def _from_to(start: Softmax, end: Softmax, column: str) -> str:
    return f"{number(getattr(start, column))} → {number(getattr(end, column))}"


def _differing(found: Contents) -> list[str]:
    if not found.differing:
        return []
    keys = list(found.differing)
    rows = [
        [escaped(member.name), *(escaped(member.settings[key]) for key in keys)]
        for member in found.members[:MOST_MEMBERS]
    ]
    return ["## What differs", _table(["member", *map(escaped, keys)], rows, right=0)]


def _happenings(found: Contents) -> list[str]:
    if not found.events:
        return []
    rows = [
        [str(each.step), escaped(each.member), escaped(each.kind), escaped(each.what)]
        for each in found.events
    ]
    more = (
        [f"{found.events_left_out} more events are left out here."] if found.events_left_out else []
    )
    return ["## Events", _table(["step", "member", "kind", "what"], rows, right=0), *more]


def _evaluations(found: Contents) -> list[str]:
    if not found.evaluations:
        return []
    lengths = sorted({each.seq_len for each in found.evaluations})[:20]
    val_loss = {(each.member, each.seq_len): each.val_loss for each in found.evaluations}
    names = dict.fromkeys(each.member for each in found.evaluations)
    rows = [
        [escaped(name), *(number(val_loss.get((name, length))) for length in lengths)]
        for name in list(names)[:MOST_MEMBERS]
    ]
    return [
        "## Held-out loss at the end",
        _table(["member", *(f"{length} tokens" for length in lengths)], rows, right=len(lengths)),
        "Nats per token, over sequences of that length.",
    ]


def _generation(each: Generation) -> str:
    prefixes = ""
    if each.loss_from_prefixes is not None:
        prefixes = (
            f"Loss from prefixes: {number(each.loss_from_prefixes)} nats per token. It is measured as generation works, "
            "one token after the other, and sees no token that it has to predict.\n\n"
        )

    def block(lines: Sequence[str]) -> str:
        return "\n".join(f"    {line}" for line in lines) or "    "

    return (
        f"## What {escaped(each.member)} writes\n\n{prefixes}After the held-out prompt\n\n{block(each.prompt)}\n\n"
        f"it goes on with\n\n{block(each.text)}"
    )


def _how(found: Contents) -> str:
    rows = [
        ["run", f"{escaped(found.name)}, {found.status}, created {escaped(found.created)}"],
        ["command", escaped(found.command) or "-"],
    ]
    rows += [
        [f"{name} loss", f"{number(value)} nats per token"]
        for name, value in found.reference.items()
    ]
    rows += [[f"data: {escaped(key)}", escaped(value)] for key, value in found.data.items()]
    rows += [[escaped(key), escaped(value)] for key, value in found.environment.items()]
    if found.rows:
        least, most = found.rows
        measured = str(most) if least == most else f"{least} to {most}"
        rows.append(["query rows measured", f"{measured} per head and step"])
    return "## How it was made\n\n" + _table(["", ""], rows, right=0)


def _lost(found: Contents) -> list[str]:
    if not found.lost:
        return []
    return [
        "## What could not be read",
        "\n".join(f"- {escaped(note)}" for note in found.lost[:50]),
    ]


def _definitions(found: Contents) -> str:
    sampled = (
        "Attention is measured on a sample of query rows, drawn anew every step (`record.rows`); max_logit_bound is over "
        "all rows.\n\n"
        if found.rows
        else ""
    )
    return f"## Definitions\n\n{sampled}" + "\n\n".join(
        f"{title}\n\n{_columns(COLUMNS[table])}"
        for table, title in (
            ("heads", "Per head (`Run.heads`):"),
            ("steps", "Per step (`Run.steps`):"),
            ("params", "Per parameter group (`Run.params`):"),
        )
    )


def _columns(columns: Mapping[str, Column]) -> str:
    rows = [
        [f"`{name}`", escaped(column.meaning), escaped(column.unit), escaped(column.source)]
        for name, column in columns.items()
    ]
    return _table(["column", "what", "unit", "source"], rows, right=0)
