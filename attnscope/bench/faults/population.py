"""Which programs are trained, and training them: each into a run directory of its own, a line in a list when it is done.

What is in the list is not trained again.
"""

import json
import math
import multiprocessing
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from attnscope.bench.faults.kinds import BASES, FAULTS, RELATIVE, Changes
from attnscope.bench.faults.recipe import Recipe

LIST = "cases.jsonl"
HEALTHY = "healthy"
TUNED, REPORTED = "tuned", "reported"  # halves: thresholds may be chosen on the first, rates are told of the second
SEEDS = {TUNED: (0, 2, 4), REPORTED: (1, 3, 5)}
N_HEALTHY = 200
SMALL_SEEDS, SMALL_HEALTHY = 1, 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One program.

    Attributes:
        name: of its run directory.
        fault: of `kinds.FAULTS`; HEALTHY, or "twin" of those with the same base and seed.
        base: of `kinds.BASES`.
        strength: counted from 0, the weakest.
        half: TUNED or REPORTED.
        recipe: what is trained.
    """

    name: str
    fault: str
    base: str
    strength: int
    half: str
    recipe: Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A program that was trained. Losses as in `loop.Result`."""

    case: str
    fault: str
    base: str
    strength: int
    half: str
    seed: int
    final_loss: float
    held_out_loss: float
    error: str | None


def cases(*, n_seeds: int = 3, n_healthy: int = N_HEALTHY, strongest: bool = False) -> tuple[Program, ...]:
    """The population: twins, faults, and healthy programs of other shapes.

    Args:
        n_seeds: of each half.
        n_healthy: programs without a fault, beside the twins.
        strongest: each fault at its greatest strength only.
    """
    return (*_of_bases(n_seeds, strongest=strongest), *_healthy(n_healthy))


def _of_bases(n_seeds: int, *, strongest: bool) -> Iterator[Program]:
    for number, (base, recipe) in enumerate(BASES.items()):
        half = (TUNED, REPORTED)[number % 2]
        for seed in SEEDS[half][:n_seeds]:
            seeded = replace(recipe, seed=seed)
            yield _case("twin", base, 0, half, seeded)
            for fault in FAULTS:
                if not fault.fits(recipe):
                    continue
                for strength, changes in enumerate(fault.strengths):
                    if not strongest or strength == len(fault.strengths) - 1:
                        yield _case(fault.name, base, strength, half, changed(seeded, changes))


def _healthy(count: int) -> Iterator[Program]:
    """Widths, depths, lengths, batches, seeds and learning rates around those of the bases."""
    for number in range(count):
        draw = random.Random(number)
        base = list(BASES)[number % len(BASES)]
        half = (TUNED, REPORTED)[number % len(BASES) % 2]
        recipe = BASES[base]
        recipe = replace(
            recipe,
            seed=100 + number,
            d_model=draw.choice((32, 64, 96)),
            n_layers=draw.choice((2, 3, 4)),
            n_heads=draw.choice((2, 4)),
            seq_len=draw.choice((24, 32, 48)) if recipe.source != "recall" else recipe.seq_len,
            batch_size=draw.choice((4, 8, 16)),
            lr=recipe.lr * draw.choice((0.3, 0.6, 1.0, 1.5)),
            steps=draw.choice((100, 150, 250)),
        )
        yield replace(_case(HEALTHY, base, 0, half, recipe), name=f"healthy-{number:03d}")


def _case(fault: str, base: str, strength: int, half: str, recipe: Recipe) -> Program:
    words = f"{fault} {strength} {base} {recipe.seed}"
    name = "".join(letter if letter.isalnum() else "-" for letter in words)
    return Program(name=name, fault=fault, base=base, strength=strength, half=half, recipe=recipe)


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """A recipe with a fault; of RELATIVE fields, so many times what it had."""
    times = {name: getattr(recipe, name) * changes[name] for name in RELATIVE if name in changes}
    return replace(recipe, **{**changes, **times})


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
        ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=50) as pool,
        (folder / LIST).open("a") as log,
    ):
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

    from attnscope.bench.faults.loop import train

    torch.set_num_threads(1)
    path = folder / case.name
    shutil.rmtree(path, ignore_errors=True)  # of a process that was killed
    ended = train(case.recipe, path)
    return Done(
        case=case.name,
        fault=case.fault,
        base=case.base,
        strength=case.strength,
        half=case.half,
        seed=case.recipe.seed,
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
