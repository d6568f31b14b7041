"""A part of a run in memory: its members' weights, optimizer and data, and where training stands.

Shape key: M member.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnscope.config import Config
from attnscope.errors import ConfigError
from attnscope.model import forward, initial_parameters
from attnscope.runs.checkpoint import Checkpoint, save_checkpoint
from attnscope.runs.divergence import NOT_FINITE_IN_A_ROW
from attnscope.runs.part_writer import PartWriter
from attnscope.train.clipping import clip_state
from attnscope.train.optimizer import optimizer_state
from attnscope.train.step import Setup, all_finite, loss_scaling_state, set_up


class Part:
    """The members of one part that are still alive, and everything that moves from step to step.

    Invariant: every tensor in `parameters` and `state` has the members of `alive` along its first axis.
    """

    def __init__(self, configs: Sequence[Config], *, vocab_size: int, resume_from: Checkpoint | None = None) -> None:
        self.configs = configs
        self.device = device_of(configs[0])
        self._forward = _compiled() if configs[0].train.compile else forward
        self.alive = list(range(len(configs)))
        self.step = 0
        if resume_from is None:
            self.parameters = {
                name: value.to(self.device)
                for name, value in initial_parameters(configs, vocab_size=vocab_size).items()
            }
            self.state = self._initial_state()
        else:
            self._restore(resume_from)
        self._prepare()

    def _initial_state(self) -> dict[str, Tensor]:
        config, n_members = self.configs[0], len(self.alive)
        state = optimizer_state(config.optimizer.name, self.parameters)
        state |= clip_state(config.clip.mode, n_members, self.device)
        if config.precision.loss_scaling:
            state |= loss_scaling_state(n_members, self.device)
        return state | self._all_well()

    def _all_well(self) -> dict[str, Tensor]:
        """How many of the last steps, in a row, had a loss that is not finite, (M,)."""
        return {"broken_steps": torch.zeros(len(self.alive), dtype=torch.int64, device=self.device)}

    def _prepare(self) -> None:
        for value in self.parameters.values():
            value.requires_grad_()
        self.setup: Setup | None = None
        if self.alive:
            self.setup = set_up(
                [self.configs[index] for index in self.alive],
                self.parameters,
                device=self.device,
                forward=self._forward,
            )

    def lost(self) -> list[int]:
        """Positions along M of members whose weights are not finite, or whose losses are not for good; waits for the device.

        A few losses that are not finite are no reason: loss scaling skips such a step, and weights that are finite go on.
        """
        with torch.no_grad():
            lost_M = self.state["broken_steps"] >= NOT_FINITE_IN_A_ROW
            lost_M |= ~all_finite(self.parameters)
        return [position for position, lost in enumerate(lost_M.tolist()) if lost]

    def drop(self, positions: Sequence[int]) -> None:
        """Go on without these members."""
        keep = [p for p in range(len(self.alive)) if p not in set(positions)]
        index_M = torch.tensor(keep, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            self.parameters = {name: value.index_select(0, index_M) for name, value in self.parameters.items()}
            self.state = {name: value.index_select(0, index_M) for name, value in self.state.items()}
        self.alive = [self.alive[p] for p in keep]
        self._prepare()

    def save(self, writer: PartWriter) -> None:
        """Write a checkpoint of everything a resumed run needs to go on bit by bit."""
        save_checkpoint(
            writer.path,
            step=self.step,
            tensors={
                **{f"parameters/{name}": value.detach() for name, value in self.parameters.items()},
                **{f"state/{name}": value for name, value in self.state.items()},
            },
            # safetensors sorts names, but sums over parameters depend on their order.
            state={"alive": self.alive, "parameters": list(self.parameters)},
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        alive, names = checkpoint.state["alive"], checkpoint.state["parameters"]
        assert isinstance(alive, list) and isinstance(names, list)
        self.alive = [int(index) for index in alive]
        self.step = checkpoint.step
        tensors = {name: value.to(self.device) for name, value in checkpoint.tensors.items()}
        self.parameters = {name: tensors[f"parameters/{name}"] for name in names}
        self.state = self._all_well() | {
            name.removeprefix("state/"): value
            for name, value in tensors.items()
            if name.startswith("state/") and name != "state/finite"  # of versions before
        }


def _compiled() -> Callable[..., Tensor]:
    """The forward pass through torch.compile, which fails when it is first called."""
    from torch._dynamo.exc import TorchDynamoException  # heavy, and has no public name

    compiled = torch.compile(forward)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        try:
            return compiled(*args, **kwargs)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"train.compile: PyTorch cannot compile the model here: {reason}. Train without it, or put that right "
                "(on a CPU it needs a C++ compiler)."
            ) from error

    return run


def device_of(config: Config) -> torch.device:
    """The device that `train.device` names; auto = a GPU where there is one.

    Raises:
        ConfigError: it is not there.
    """
    wanted = config.train.device
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return torch.device("cuda" if available["cuda"] else "cpu")
    if not available.get(wanted, True):
        raise ConfigError(f"train.device is {wanted}, but PyTorch sees no such device here. Use cpu or auto.")
    return torch.device(wanted)
