"""attnscope: why transformer training becomes unstable, and how to see it before it does.

The public API; everything is imported when it is first used, so `import attnscope` costs nothing.

    run = attnscope.train_model({"attention": {"scale": "none"}})    # trains, records, returns the run
    run = attnscope.open_run("runs/unscaled-001")                    # tables as pandas DataFrames
    stats = attnscope.attention_stats(q, k, scale=1.0, mask=mask)    # what happens inside one softmax
    with attnscope.watch_model(model, optimizer, "runs/mine"): ...   # records training that is not attnscope's
    step = attnscope.load_snapshot("runs/mine/part-0000/snapshot-00000041.safetensors")  # what led to a break
    for checked in attnscope.check_model(model, batch): ...          # leaks, masks, scale of any model

Reading order of the package: config, model, metrics, train, runs, sweep, watch, check, diagnose, preflight,
report, export, cli.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnscope.check.model import check_model
    from attnscope.config import Config
    from attnscope.metrics.attention import attention_stats
    from attnscope.runs.reader import Run, open_run
    from attnscope.runs.snapshot import load_snapshot
    from attnscope.train.loop import Progress
    from attnscope.watch.attach import watch_model

__all__ = ["attention_stats", "check_model", "load_snapshot", "open_run", "train_model", "watch_model"]


def train_model(
    config: "Config | Mapping[str, object] | str | Path | None" = None,
    *,
    path: str | Path | None = None,
    on_progress: "Callable[[int, Progress], None] | None" = None,
) -> "Run":
    """Train every member of a config and return the run.

    Args:
        config: a `Config`, nested dictionaries as in TOML ({"model": {"d_model": 64}}), the path of a TOML file, or
            None for the defaults.
        path: of the run directory, which must not exist; None makes the next free one below `runs/`.
        on_progress: called with the part's number and an `attnscope.train.loop.Progress` after every block of steps.

    Raises:
        AttnscopeError: the config, the data or the directory cannot be used.
    """
    from attnscope.config import Config, load_config, parse_table
    from attnscope.runs.reader import open_run
    from attnscope.runs.writer import next_run_path
    from attnscope.train.run import train_run

    if config is None:
        config = Config()
    elif isinstance(config, Mapping):
        config = parse_table(config)
    elif not isinstance(config, Config):
        config = load_config(config)
    where = Path(path) if path is not None else next_run_path(Path("runs"), "run")
    train_run(
        config,
        where,
        command=("attnscope.train_model",),
        on_progress=on_progress or (lambda _part, _progress: None),
    )
    return open_run(where)


def __getattr__(name: str) -> object:
    if name == "open_run":
        from attnscope.runs.reader import open_run

        return open_run
    if name == "load_snapshot":
        from attnscope.runs.snapshot import load_snapshot

        return load_snapshot
    if name == "attention_stats":
        from attnscope.metrics.attention import attention_stats

        return attention_stats
    if name == "check_model":
        from attnscope.check.model import check_model

        return check_model
    if name == "watch_model":
        from attnscope.watch.attach import watch_model

        return watch_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
