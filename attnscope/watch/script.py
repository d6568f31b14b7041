"""Runs an unmodified script as `python` would, watched.

The script sees its own argv, `__name__`, path and working directory; its output, exit code, traceback, random numbers and
losses are those of plain Python. Whatever ends it, the record is written first.
"""

import builtins
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from attnscope.errors import ConfigError
from attnscope.watch.attach import open_watcher
from attnscope.watch.settings import Settings
from attnscope.watch.watcher import Watcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What is to be run.

    Attributes:
        target: as it was typed: a script, a folder, or a module.
        file: its absolute path, as Python makes it of what was typed.
        module: its name, where it was asked for as one.
        code: of the file.
    """

    target: str
    file: str
    module: str | None
    code: types.CodeType


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a script ended.

    Attributes:
        watcher: stopped.
        error: what came out of the script; None = it ran to its end.
    """

    watcher: Watcher
    error: BaseException | None


def find_program(target: str, *, is_module: bool) -> Program:
    """Read and compile a script, or the main program of a module as `python -m` finds it.

    Raises:
        ConfigError: there is none, or it is not Python.
    """
    if is_module:
        path = _main_file(target)
    else:
        path = Path(target)
        if path.is_dir():
            path = path / "__main__.py"
        if not path.is_file():
            raise ConfigError(
                f"{target}: there is no such script. Give the path of a Python file, or a module with -m."
            )
    file = str(path) if path.is_absolute() else f"{Path.cwd()}{os.sep}{target}"
    if path.name != Path(target).name and not is_module:  # a folder
        file = f"{file.rstrip(os.sep)}{os.sep}{path.name}"
    try:
        source = path.read_bytes()
        code = compile(source, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        place = f"{path}:{line}" if line else str(path)
        said = getattr(error, "msg", None) or error
        raise ConfigError(f"{place}: this is not Python: {said}. Give the script that trains.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    return Program(target=target, file=file, module=target if is_module else None, code=code)


def watch_script(
    program: Program,
    arguments: Sequence[str],
    path: Path,
    settings: Settings,
    *,
    command: Sequence[str],
    on_start: Callable[[], None],
) -> Ended:
    """Run a program with these arguments, watched into `path`; `on_start` is called when that stands.

    Raises:
        ConfigError: the settings cannot be followed.
        RunError: the run exists.
        RunWriteError: the place cannot be written, or the disk is full at the end.
    """
    watcher = open_watcher(path, settings, command=command)
    on_start()
    error: BaseException | None = None
    try:
        _run(program, arguments)
    except BaseException as raised:
        error = raised
    watcher.stop_after(error)
    return Ended(watcher=watcher, error=error)


def without_our_frames(error: BaseException, program: Program) -> BaseException:
    """The error with the traceback that plain Python would show: from the script's first line on, and nothing of ours."""
    kept = []
    trace = error.__traceback__
    is_inside = False
    while trace is not None:
        code = trace.tb_frame.f_code
        is_inside = is_inside or code is program.code
        if is_inside and not code.co_filename.startswith(_OURS):
            kept.append(trace)
        trace = trace.tb_next
    shown: types.TracebackType | None = None
    for each in reversed(kept):
        shown = types.TracebackType(shown, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return error.with_traceback(shown or error.__traceback__)


def _run(program: Program, arguments: Sequence[str]) -> None:
    """Like `python SCRIPT` or `python -m MODULE`."""
    main = types.ModuleType("__main__")
    names: dict[str, Any] = main.__dict__
    names["__file__"] = program.file
    names["__builtins__"] = builtins
    names["__annotations__"] = {}
    path = Path(program.file)
    if program.module is None and path.name == Path(program.target).name:
        names["__cached__"] = None
        names["__loader__"] = SourceFileLoader("__main__", program.file)
        sys.path[0] = str(path.resolve().parent)
    else:
        spec = (
            importlib.util.spec_from_file_location("__main__", path)
            if program.module is None  # a folder with a __main__.py
            else importlib.util.find_spec(_main_name(program.module))
        )
        names["__spec__"] = spec
        names["__package__"] = spec.parent if spec else ""
        names["__loader__"] = spec.loader if spec else None
        sys.path[0] = str(path.parent if program.module is None else Path.cwd())
    first = program.target if program.module is None else program.file
    sys.argv[:] = [first, *arguments]
    sys.modules["__main__"] = main
    exec(program.code, names)


def _main_file(module: str) -> Path:
    where = str(Path.cwd())
    if sys.path[0] != where:
        sys.path.insert(0, where)
    try:
        spec = importlib.util.find_spec(_main_name(module))
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"-m {module}: no such module: {error}. Is it installed, or below this folder?") from None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ConfigError(
            f"-m {module}: no such module, or it has no main program in Python. Is it installed, or below this folder?"
        )
    return Path(spec.origin)


def _main_name(module: str) -> str:
    """A package is run by its __main__."""
    spec = importlib.util.find_spec(module)
    return f"{module}.__main__" if spec is not None and spec.submodule_search_locations else module


_OURS = str(Path(__file__).parent.parent / "_")[:-1]  # of the package, with the separator at its end
