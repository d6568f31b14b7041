"""Which programs are trained, and training them: each into a run directory of its own, a line in a list when it is done.

What is in the list is not trained again.
"""

import itertools
import json
import math
import multiprocessing
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from attnscope.bench.faults.bases import BASES, available
from attnscope.bench.faults.kinds import FAULTS, Changes, changed
from attnscope.bench.faults.lab import LAB_BASES, config_of
from attnscope.bench.faults.recipe import Recipe
from attnscope.config import Config

LIST = "cases.jsonl"
HEALTHY, TWIN = "healthy", "twin"
WATCH, LAB = "watch", "lab"
TUNED, REPORTED = "tuned", "reported"  # halves: thresholds may be chosen on the first, rates are told of the second
SEEDS = {TUNED: (0, 2, 4), REPORTED: (1, 3, 5)}
N_HEALTHY = 240
SMALL_SEEDS, SMALL_HEALTHY = 1, 32
SMALL_BASES = 2  # of each half, watched and in the lab
# Of healthy programs, times that of the base. Each base trains with all of them; with ten times its own most do not.
LR_TIMES = (0.3, 0.6, 1.0, 1.5, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One program.

    Attributes:
        name: of its run directory.
        fault: of `kinds.FAULTS`; HEALTHY, or TWIN of those with the same base and seed.
        base: of `bases.BASES` or `lab.LAB_BASES`.
        strength: counted from 0, the weakest.
        half: TUNED or REPORTED.
        seed: of weights and batches.
        where: WATCH, a loop in plain PyTorch, or LAB, a config.
        recipe: what is trained.
    """

    name: str
    fault: str
    base: str
    strength: int
    half: str
    seed: int
    where: str = WATCH
    recipe: Recipe | Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A program that was trained. Losses as in `loop.Result`, the rest as in `Program`."""

    case: str
    fault: str
    base: str
    strength: int
    half: str
    seed: int
    final_loss: float
    held_out_loss: float
    error: str | None
    where: str = WATCH  # lists of before there were others do not say


def cases(*, n_seeds: int = 3, n_healthy: int = N_HEALTHY, strongest: bool = False) -> tuple[Program, ...]:
    """The population: twins, faults, and healthy programs of other shapes.

    Args:
        n_seeds: of each half.
        n_healthy: programs without a fault, beside the twins.
        strongest: each fault at its greatest strength only, in SMALL_BASES bases, but slow ones.
    """
    watched = (*_watched(n_seeds, strongest=strongest), *_healthy_watched(n_healthy - n_healthy // 3))
    return (*watched, *_in_lab(n_seeds, strongest=strongest), *_healthy_in_lab(n_healthy // 3))


def _watched(n_seeds: int, *, strongest: bool) -> Iterator[Program]:
    here = available()
    for half, names in _halves(BASES).items():
        kept = [name for name in names if name in here]
        chosen = {
            fault.name: _some(
                [name for name in kept if fault.fits(BASES[name])], number, all_of_them=fault.is_slow or not strongest
            )
            for number, fault in enumerate(FAULTS)
        }
        for base, seed in itertools.product(kept, SEEDS[half][:n_seeds]):
            seeded = replace(BASES[base], seed=seed)
            yield _program(TWIN, base, 0, half, seeded, seed)
            for fault in FAULTS:
                for strength, changes in _strengths(fault.strengths, strongest=strongest and not fault.is_slow):
                    if base in chosen[fault.name]:
                        yield _program(fault.name, base, strength, half, changed(seeded, changes), seed)


def _in_lab(n_seeds: int, *, strongest: bool) -> Iterator[Program]:
    for half, names in _halves(LAB_BASES).items():
        chosen = {
            fault.name: _some(
                [name for name in names if fault.fits_lab(config_of(name, {}, seed=0))],
                number,
                all_of_them=fault.is_slow or not strongest,
            )
            for number, fault in enumerate(FAULTS)
        }
        for base, seed in itertools.product(names, SEEDS[half][:n_seeds]):
            yield _program(TWIN, base, 0, half, config_of(base, {}, seed=seed), seed)
            for fault in FAULTS:
                for strength, changes in _strengths(fault.lab, strongest=strongest and not fault.is_slow):
                    if base in chosen[fault.name]:
                        config = config_of(base, changes, seed=seed)
                        yield _program(fault.name, base, strength, half, config, seed)


def _healthy_watched(count: int) -> Iterator[Program]:
    """Widths, depths, lengths, batches, seeds and learning rates around those of the bases."""
    here = available()
    half_of = {name: half for half, names in _halves(BASES).items() for name in names}
    for number in range(count):
        draw = random.Random(number)
        base = list(here)[number % len(here)]
        recipe = here[base]
        seed = 100 + number
        recipe = replace(
            recipe,
            seed=seed,
            d_model=draw.choice((32, 64, 96) if recipe.optimizer != "muon" else (32, 48)),
            n_layers=draw.choice((2, 3, 4)),
            n_heads=draw.choice((2, 4)),
            seq_len=draw.choice((24, 32, 48)) if recipe.source != "recall" else recipe.seq_len,
            batch_size=draw.choice((4, 8, 16)),
            lr=recipe.lr * draw.choice(LR_TIMES),
            steps=draw.choice((100, 150, 250)),
        )
        yield replace(_program(HEALTHY, base, 0, half_of[base], recipe, seed), name=f"healthy-{number:03d}")


def _healthy_in_lab(count: int) -> Iterator[Program]:
    half_of = {name: half for half, names in _halves(LAB_BASES).items() for name in names}
    for number in range(count):
        draw = random.Random(1000 + number)
        base = list(LAB_BASES)[number % len(LAB_BASES)]
        seed = 1000 + number
        changes: dict[str, object] = {
            "model.d_model": draw.choice((32, 64, 96)),
            "model.n_layers": draw.choice((2, 3, 4)),
            "model.n_heads": draw.choice((2, 4)),
            "data.batch_size": draw.choice((4, 8, 16)),
            "optimizer.lr": draw.choice(LR_TIMES),
            "train.steps": draw.choice((100, 150, 250)),
        }
        if LAB_BASES[base].get("data.source") != "recall":
            changes["model.seq_len"] = draw.choice((24, 32, 48))
        config = config_of(base, changes, seed=seed)
        yield replace(_program(HEALTHY, base, 0, half_of[base], config, seed), name=f"lab-healthy-{number:03d}")


def _halves(bases: Mapping[str, object]) -> dict[str, list[str]]:
    names = list(bases)
    return {TUNED: names[::2], REPORTED: names[1::2]}


def _some(names: Sequence[str], number: int, *, all_of_them: bool) -> list[str]:
    """SMALL_BASES of them, others for the next number, so that all come up."""
    if all_of_them or len(names) <= SMALL_BASES:
        return list(names)
    return [names[(number * SMALL_BASES + one) % len(names)] for one in range(SMALL_BASES)]


def _strengths(strengths: Sequence[Changes], *, strongest: bool) -> list[tuple[int, Changes]]:
    numbered = list(enumerate(strengths))
    return numbered[-1:] if strongest else numbered


def _program(fault: str, base: str, strength: int, half: str, recipe: Recipe | Config, seed: int) -> Program:
    words = f"{fault} {strength} {base} {seed}"
    name = "".join(letter if letter.isalnum() else "-" for letter in words)
    where = WATCH if isinstance(recipe, Recipe) else LAB
    return Program(
        name=name, fault=fault, base=base, strength=strength, half=half, seed=seed, where=where, recipe=recipe
    )


def train_all(
    population: Sequence[Program], folder: Path, *, jobs: int, on_done: Callable[[Done, int], None]
) -> list[Done]:
    """Train what is not in the list yet, in so many processes of one thread each; everything that is in it then.

    Args:
        population: programs.
        folder: a run directory for each is made in it, and the list.
        jobs: processes.
        on_done: told of each that is done, and how many are left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {case.name for case in population}
    known = {done.case: done for done in read_list(folder) if done.case in names}
    left = [case for case in population if case.name not in known]
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, mp_context=context) as pool,
        (folder / LIST).open("a") as log,
    ):
        log.write("\n")  # ends a line that a kill cut short
        futures = [pool.submit(train_one, case, folder) for case in left]
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                done = future.result()
                log.write(json.dumps(asdict(done)) + "\n")
                log.flush()
                known[done.case] = done
                on_done(done, len(left) - number)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [known[case.name] for case in population]


def train_one(case: Program, folder: Path) -> Done:
    """Train one program, from the beginning."""
    import torch

    from attnscope.bench.faults.lab import train_lab
    from attnscope.bench.faults.loop import train

    torch.set_num_threads(1)
    path = folder / case.name
    shutil.rmtree(path, ignore_errors=True)  # of a process that was killed
    recipe = case.recipe
    ended = train(recipe, path) if isinstance(recipe, Recipe) else train_lab(recipe, path)
    return Done(
        case=case.name,
        fault=case.fault,
        base=case.base,
        strength=case.strength,
        half=case.half,
        seed=case.seed,
        where=case.where,
        final_loss=ended.final_loss,
        held_out_loss=ended.held_out_loss,
        error=ended.error,
    )


def read_list(folder: Path) -> list[Done]:
    """What was trained; a line that was cut short is none."""
    try:
        lines = (folder / LIST).read_text().splitlines()
    except FileNotFoundError:
        return []
    done = []
    for line in lines:
        try:
            done.append(Done(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return done


def worth(done: Done) -> float:
    """The loss that counts: held-out; infinite where it is none."""
    return done.held_out_loss if math.isfinite(done.held_out_loss) and math.isfinite(done.final_loss) else math.inf
