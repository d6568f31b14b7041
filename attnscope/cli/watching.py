"""`attnscope watch`: runs a script, then says on stderr what was seen of it."""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from attnscope.cli.app import INTERRUPTED, MOST_TEXT, note
from attnscope.cli.resolve import run_path
from attnscope.errors import ConfigError
from attnscope.runs.foreign import printable

if TYPE_CHECKING:
    from attnscope.watch.script import Ended, Program

MOST_NAMES = 8


def watch_program(
    words: Sequence[str],
    *,
    is_module: bool,
    name: str | None,
    out: Path,
    every: int,
    rows: str,
    layers: Sequence[str],
    stop_on: Sequence[str],
    snapshot: int,
    log_to: str | None,
    command: Sequence[str],
) -> int:
    """Run what `words` name, watched; the exit code that plain Python would have given.

    Raises:
        AttnscopeError: there is no such script, or the run directory cannot be made.
    """
    from attnscope.watch.script import find_program, watch_script
    from attnscope.watch.settings import Settings

    settings = Settings(every=every, rows=_rows(rows), layers=layers, stop_on=stop_on, snapshot=snapshot, log_to=log_to)
    settings.checked()
    target, *arguments = words
    program = find_program(target, is_module=is_module)
    stem = target.replace(".", "-") if is_module else Path(target).resolve().stem
    where = run_path(out, name, stem)
    speaks = os.environ.get("RANK", "0") == "0"  # under torchrun, one for all

    def begin() -> None:
        if speaks:
            typer.echo(f"attnscope: watching {target} into {where}", err=True)

    ended = watch_script(program, arguments, where, settings, command=command, on_start=begin)
    code = _exit_code(ended, program)
    if speaks:
        _say_what_was_seen(ended, where)
    if isinstance(ended.error, KeyboardInterrupt) and os.name == "posix":
        _die_of_interrupt()
    return code


def _die_of_interrupt() -> None:
    """As the interpreter does, so that a shell knows."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _rows(text: str) -> int | str:
    if text == "all":
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ConfigError(f'--rows is {text!r}, but must be a whole number, at least 1, or "all".')


def _exit_code(ended: "Ended", program: "Program") -> int:
    """As the interpreter has it, and its traceback where there is one."""
    from attnscope.watch.script import without_our_frames
    from attnscope.watch.stopping import StoppedError

    error = ended.error
    if error is None:
        return 0
    if isinstance(error, StoppedError):
        for line in error.__notes__:
            note(line)
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    error = without_our_frames(error, program)
    hook = sys.excepthook if sys.excepthook is not sys.__excepthook__ else traceback.print_exception
    hook(type(error), error, error.__traceback__)
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def _say_what_was_seen(ended: "Ended", where: Path) -> None:
    """On stderr: stdout is the script's."""
    watcher = ended.watcher
    if ended.error is not None and not (watcher.layers or watcher.updates):
        typer.echo("attnscope: the script ended before anything was seen", err=True)
        return
    lines = []
    if watcher.layers:
        first, last = watcher.layers[0], watcher.layers[-1]
        names = first if len(watcher.layers) == 1 else f"{first} to {last}"
        lines.append(f"{len(watcher.layers)} attention layers ({names}), {watcher.updates} optimizer updates")
    elif watcher.left_out:
        lines.append(f"NO ATTENTION LAYER MATCHES --layers. Seen: {', '.join(watcher.left_out[:MOST_NAMES])}")
    elif watcher.unmeasured:
        lines.append("NO ATTENTION WAS MEASURED, though some was seen:")
    else:
        lines.append(
            "NO ATTENTION WAS SEEN. Looked for: F.scaled_dot_product_attention, nn.MultiheadAttention, and matmul, bmm or "
            "einsum followed by a softmax. Did the script train a transformer in this process, in PyTorch?"
        )
    if watcher.took_losses_for_steps:
        lines.append(
            "NO OPTIMIZER WAS SEEN: each loss that was differentiated counts as a step, without gradients and updates"
        )
    elif not watcher.updates and watcher.steps_without_gradient:
        lines.append(
            f"NO OPTIMIZER STEP HAD A GRADIENT: {watcher.steps_without_gradient} steps changed nothing. Are gradients zeroed "
            "between backward() and step()? Has the optimizer the parameters of the model that is trained?"
        )
    elif not watcher.updates:
        lines.append(
            "NO OPTIMIZER STEP WAS SEEN. Looked for: step() of any torch.optim.Optimizer. Did training begin, and in this "
            "process?"
        )
    if watcher.losses_not_seen:
        lines.append(
            f"THE LOSS OF {watcher.losses_not_seen} STEPS WAS NOT SEEN: their gradients were there without a scalar that was "
            "given to backward()"
        )
    if watcher.failure is not None:
        lines.append(f"error: {watcher.failure}")
    for reason, of in list(watcher.reasons.items())[:MOST_NAMES]:
        more = f" and {len(of) - 1} more" if len(of) > 1 else ""
        lines.append(f"calls not measured, of {of[0]}{more}: {reason}")
    lines += [f"not measured: {said}" for said in watcher.failed[:MOST_NAMES]]
    for line in lines:
        note(f"attnscope: {printable(line, MOST_TEXT)}")
    if watcher.snapshots:
        files = ", ".join(f"{path.parent.name}/{path.name}" for path in watcher.snapshots)
        typer.echo(f"attnscope: what led to the break: {files}", err=True)
    typer.echo(f"attnscope: next: attnscope report {where}", err=True)
