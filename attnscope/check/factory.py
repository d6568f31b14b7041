"""`module:factory` and `file.py:factory`: the model and the batch that a function of the user's makes."""

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from attnscope.check.case import raised
from attnscope.errors import AttnscopeError, ConfigError

FORM = "Write module:factory or file.py:factory, where factory() returns (model, batch)."


def made_by(target: str) -> tuple[nn.Module, object]:
    """Import what `target` names, call it, and return its model and batch.

    The current folder, or that of the file, is searched for imports first, as `python` would.

    Raises:
        ConfigError: it names nothing that can be called, or what it returned is not (model, batch).
        AttnscopeError: importing or calling it raised an exception.
    """
    module_name, colon, name = target.rpartition(":")
    if not (colon and module_name and name):
        raise ConfigError(f"{target}: names no factory. {FORM}")
    module = _from_file(Path(module_name)) if module_name.endswith(".py") else _from_name(module_name)
    factory: Any = module
    for word in name.split("."):
        names = [public for public in dir(factory) if not public.startswith("_")]
        try:
            factory = getattr(factory, word)
        except AttributeError:
            near = difflib.get_close_matches(word, names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{target}: {module_name} has no {name}.{hint} {FORM}") from None
    if not callable(factory):
        raise ConfigError(f"{target}: is a {type(factory).__name__}, not a function. {FORM}")
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise AttnscopeError(
            f"{target}: the factory raised {raised(error)}. Make {name}() work by itself first."
        ) from error
    if not isinstance(made, tuple | list) or len(made) != 2:
        held = f" of {len(made)}" if isinstance(made, tuple | list) else ""
        raise ConfigError(f"{target}: returned a {type(made).__name__}{held}, but must return (model, batch).")
    model, batch = made
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{target}: returned ({type(model).__name__}, {type(batch).__name__}), but must return (model, batch), the model a "
            "torch.nn.Module."
        )
    return model, batch


def _from_name(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{name}: no such module in {here} or among installed packages. Give a file by its path: file.py:factory."
            ) from None
        raise _import_failed(name, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failed(name, error) from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file. {FORM}")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = path.stem if path.stem not in sys.modules else f"checked_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise _import_failed(str(path), error) from error
    return module


def _import_failed(what: str, error: BaseException) -> AttnscopeError:
    return AttnscopeError(f"{what}: importing it raised {raised(error)}. Make it importable by itself first.")
