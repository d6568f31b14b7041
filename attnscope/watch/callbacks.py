"""One line for scripts that train with the Trainer of Hugging Face or of Lightning.

    transformers.Trainer(..., callbacks=[HuggingFaceCallback("runs/mine")])
    lightning.Trainer(..., callbacks=[LightningCallback("runs/mine")])

Both watch from the beginning of a training to its end, also where that is an exception. Under distributed training every
rank writes its own part of the run directory.
"""

import functools
import sys
import weakref
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from torch import nn

from attnscope.errors import AttnscopeError
from attnscope.watch.attach import next_path, open_watcher
from attnscope.watch.settings import Settings
from attnscope.watch.stopping import StoppedError
from attnscope.watch.watcher import Watcher

LIGHTNING = ("lightning.pytorch", "pytorch_lightning")  # the same, under its new and its old name


class Trainings:
    """The trainings of one trainer, one after another.

    Invariant: at most one is watched; the watcher of an earlier one is stopped before the next begins, and before this
    process ends or the trainer is freed.
    """

    def __init__(self, path: str | Path | None, settings: Settings) -> None:
        settings.checked()
        self._place = path
        self._settings = settings
        self._watcher: Watcher | None = None
        self._ender: weakref.finalize[[Watcher, int], Trainings] | None = None
        self._begun = 0

    @property
    def watcher(self) -> Watcher | None:
        """Of the training that goes on, else of the last one."""
        return self._watcher

    def begin(self, model: nn.Module | None) -> Watcher:
        """Watch the training that begins now.

        Raises:
            RunError: the run exists, or somebody else watches already.
            RunWriteError: the place cannot be written.
        """
        self.end(SystemExit())
        self._begun += 1
        self._watcher = open_watcher(
            _path(self._place, self._begun), self._settings, command=("attnscope.watch_model",)
        )
        if model is not None:
            self._watcher.add_model(model)
        reported = id(getattr(sys, "last_value", None))
        self._ender = weakref.finalize(self, _abandon, self._watcher, reported)
        return self._watcher

    def end(self, error: BaseException | None = None) -> None:
        """The training is over; said twice, the first one counts."""
        if self._watcher is None or self._ender is None:
            return
        self._ender.detach()
        asked_to = isinstance(error, StoppedError)
        if isinstance(error, SystemExit) and not asked_to:  # a signal, or somebody in the middle
            self._watcher.stop("interrupted")
        else:
            self._watcher.stop_after(error)


class HuggingFaceCallback:
    """Watches what a `transformers.Trainer` trains.

    It is a `transformers.TrainerCallback`. Hugging Face tells no callback of an exception, so `train` of the trainer that is
    made with it is wrapped. A trainer that got it later, by `add_callback`, has the record of an exception when it trains
    again, when it is freed, or when the process ends.
    """

    def __new__(cls, *_args: object, **_kwargs: object) -> Self:
        """An instance that transformers knows as its own.

        Raises:
            AttnscopeError: transformers is not installed.
        """
        return _made(cls, [_imported("transformers", extra="hf").TrainerCallback])

    def __init__(self, path: str | Path | None = None, **settings: Any) -> None:
        """The arguments of `watch_model`; a second training of the same trainer goes to PATH-002, and so on.

        Raises:
            ConfigError: the settings cannot be followed.
        """
        self._trainings = Trainings(path, Settings(**settings))

    @property
    def watcher(self) -> Watcher | None:
        """Of the training that goes on, else of the last one."""
        return self._trainings.watcher

    def on_init_end(self, *_about: object, **_more: object) -> None:
        """The trainer is being made, and is on the stack."""
        trainer_type = import_module("transformers").Trainer
        frame = sys._getframe(1)
        while frame is not None and not isinstance(frame.f_locals.get("self"), trainer_type):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            trainer = frame.f_locals["self"]
            trainer.train = _told_of_errors(trainer.train, self._trainings)

    def on_train_begin(self, *_about: object, model: nn.Module | None = None, **_more: object) -> None:
        """Start to watch."""
        self._trainings.begin(model)

    def on_train_end(self, *_about: object, **_more: object) -> None:
        """Stop."""
        self._trainings.end()


class LightningCallback:
    """Watches what a Lightning `Trainer` fits; it is a `Callback` of `lightning.pytorch` and of `pytorch_lightning`."""

    def __new__(cls, *_args: object, **_kwargs: object) -> Self:
        """An instance that Lightning knows as its own, under the name that the script has imported.

        Raises:
            AttnscopeError: Lightning is not installed.
        """
        names = [name for name in LIGHTNING if name in sys.modules]
        if not names:
            found = [name for name in LIGHTNING if find_spec(name.partition(".")[0])]
            names = [*found, LIGHTNING[0]][:1]
        return _made(cls, [_imported(name, extra="lightning").Callback for name in names])

    def __init__(self, path: str | Path | None = None, **settings: Any) -> None:
        """The arguments of `watch_model`; a second training of the same trainer goes to PATH-002, and so on.

        Raises:
            ConfigError: the settings cannot be followed.
        """
        self._made_with = path, settings
        self._trainings = Trainings(path, Settings(**settings))

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        """Strategies that spawn send it to their processes."""
        path, settings = self._made_with
        made = functools.partial(LightningCallback, path, **settings)
        return made, ()

    @property
    def watcher(self) -> Watcher | None:
        """Of the training that goes on, else of the last one."""
        return self._trainings.watcher

    def on_train_start(self, _trainer: object, pl_module: nn.Module) -> None:
        """Start to watch; sanity checks and tuners are over."""
        self._trainings.begin(pl_module)

    def on_train_end(self, _trainer: object, _module: object) -> None:
        """Stop."""
        self._trainings.end()

    def on_exception(self, _trainer: object, _module: object, exception: BaseException) -> None:
        """Stop, and keep what happened."""
        self._trainings.end(exception)

    def teardown(self, _trainer: object, _module: object, stage: str) -> None:
        """Stop where a training was left in another way."""
        if stage == "fit":
            self._trainings.end(SystemExit())


def _made(cls: type, bases: Sequence[type]) -> Any:
    """An instance of a class that also inherits from what a trainer asks of its callbacks."""
    if any(issubclass(cls, base) for base in bases):
        return object.__new__(cls)
    kind = type(cls.__name__, (cls, *bases), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    return object.__new__(kind)


def _imported(name: str, *, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        missing = (error.name or name).partition(".")[0]
        raise AttnscopeError(f'{missing} is not installed. Install it: pip install "attnscope[{extra}]"') from None


def _told_of_errors(train: Callable[..., Any], trainings: Trainings) -> Callable[..., Any]:
    @functools.wraps(train)
    def train_watched(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        except BaseException as error:
            trainings.end(error)
            raise

    return train_watched


def _abandon(watcher: Watcher, reported: int) -> None:
    """Nobody said how the training ended: by what Python has reported since, if anything."""
    error = getattr(sys, "last_value", None)
    if error is None or id(error) == reported:
        watcher.stop("interrupted")
    else:
        watcher.stop_after(error)


def _path(path: str | Path | None, number: int) -> Path:
    """Of the run directory of a callback's n-th training; all ranks come to the same one."""
    if path is None:
        return next_path()
    return Path(path) if number == 1 else Path(f"{path}-{number:03d}")
