"""Parts as Ray tasks: on this machine or on a cluster whose nodes all see the run directory under the same path."""

import logging
import socket
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from attnscope.errors import AttnscopeError
from attnscope.sweep.workers import train_here

ANSWER_S = 5.0  # for a cluster to accept a connection
WAITING = 2  # parts handed to Ray for each one that could be trained now, so that no node is idle


class RayWorkers:
    """Hands parts to Ray, which chooses the node.

    Invariant: a task runs at most once; what to do about one that dies is decided by whoever submitted it.
    """

    def __init__(self, address: str | None, *, cpus: int, use_gpus: bool = True, stop_on: Sequence[str] = ()) -> None:
        """Connect to a cluster, or start one on this machine where `address` is None.

        Args:
            address: as in `ray.init`; "auto" = the cluster that runs here.
            cpus: cores of each task.
            use_gpus: each task gets one, where the cluster has any.
            stop_on: conditions at which a part is stopped.

        Raises:
            AttnscopeError: ray is not installed or the cluster does not answer.
        """
        try:
            import ray
        except ImportError:
            raise AttnscopeError('ray is not installed. Install it: pip install "attnscope[ray]"') from None
        self._ray: Any = ray
        if address is not None:
            _check_answer(address)
        self._is_ours = not ray.is_initialized()
        try:
            if self._is_ours:
                ray.init(
                    address=address or "local",
                    log_to_driver=False,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise AttnscopeError(
                f"--ray-address {address}: {str(error).splitlines()[0]} Start the cluster first: ray start --head"
            ) from None
        gpus = int(use_gpus and self._ray.cluster_resources().get("GPU", 0) >= 1)
        self._task = ray.remote(max_retries=0, num_cpus=cpus, num_gpus=gpus)(_train_there)
        self._cpus = cpus
        self._stop_on = tuple(stop_on)
        self._memory_bytes = 0
        self._references: dict[Future[str], Any] = {}

    @property
    def machines(self) -> int:
        """Nodes that can train a part."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        return max(1, sum(node["Resources"].get("CPU", 0) >= self._cpus for node in nodes))

    def reserve(self, memory_bytes: int) -> None:
        """Memory that each further task needs: Ray keeps a node from taking more of them than fit."""
        self._memory_bytes = memory_bytes

    def submit(self, path: Path, part: int) -> "Future[str] | None":
        """Hand a part to Ray; None while as many are queued as the cluster can use."""
        active = sum(not future.done() for future in self._references)
        room = self._ray.cluster_resources().get("CPU", 0) // self._cpus
        if active >= WAITING * max(1, int(room)):
            return None
        task = self._task.options(memory=self._memory_bytes)
        reference = task.remote(str(path.resolve()), part, self._cpus, self._stop_on)
        future: Future[str] = reference.future()
        self._references[future] = reference
        return future

    def stop(self) -> None:
        """End every task: what it recorded is kept, and a resumed sweep goes on from its last checkpoint."""
        for future, reference in self._references.items():
            if not future.done():
                self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """Let go of the cluster, unless somebody else connected to it."""
        self.stop()
        if self._is_ours:
            self._ray.shutdown()


def _check_answer(address: str) -> None:
    """Ray itself waits for minutes where nobody answers."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise AttnscopeError(f"--ray-address {address}: {error}. Start the cluster first: ray start --head") from None


def _train_there(path: str, part: int, cpus: int, stop_on: Sequence[str]) -> str:
    return train_here(Path(path), part, threads=cpus, stop_on=stop_on)
