"""Parts as Ray tasks: on this machine or on a cluster whose nodes all see the run directory under the same path."""

from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from attnscope.errors import AttnscopeError
from attnscope.sweep.workers import train_here

WAITING = 2  # parts handed to Ray for each one that could be trained now, so that no node is idle


class RayWorkers:
    """Hands parts to Ray, which chooses the node.

    Invariant: a task runs at most once; what to do about one that dies is decided by whoever submitted it.
    """

    def __init__(self, address: str | None, *, cpus: int, memory_bytes: int, gpus: int) -> None:
        """Connect to a cluster, or start one on this machine where `address` is None.

        Args:
            address: as in `ray.init`; "auto" = the cluster that runs here.
            cpus: cores of each task.
            memory_bytes: of each task; Ray keeps a node from taking more tasks than fit.
            gpus: of each task.

        Raises:
            AttnscopeError: ray is not installed or the cluster does not answer.
        """
        try:
            import ray
        except ImportError:
            raise AttnscopeError(
                'ray is not installed. Install it: pip install "attnscope[ray]"'
            ) from None
        try:
            if not ray.is_initialized():
                ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise AttnscopeError(
                f"--ray-address {address}: {str(error).splitlines()[0]} Start the cluster first: ray start --head"
            ) from None
        self._ray: Any = ray
        # What a task needs is here: its node may have another working directory, and no copy of this module's state.
        self._task = ray.remote(max_retries=0, num_cpus=cpus, num_gpus=gpus, memory=memory_bytes)(
            _train_there
        )
        self._cpus = cpus
        self._references: dict[Future[str], Any] = {}

    def submit(self, path: Path, part: int) -> "Future[str] | None":
        """Hand a part to Ray; None while as many are queued as the cluster can use."""
        active = sum(not future.done() for future in self._references)
        if active >= WAITING * max(
            1, int(self._ray.cluster_resources().get("CPU", 1) // self._cpus)
        ):
            return None
        reference = self._task.remote(str(path.resolve()), part, self._cpus)
        future: Future[str] = reference.future()
        self._references[future] = reference
        return future

    def stop(self) -> None:
        """End every task: what it recorded is kept, and a resumed sweep goes on from its last checkpoint."""
        for future, reference in self._references.items():
            if not future.done():
                self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """Let go of the cluster."""
        self.stop()
        self._ray.shutdown()


def _train_there(path: str, part: int, cpus: int) -> str:
    return train_here(Path(path), part, threads=cpus)
