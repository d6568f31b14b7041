"""Numbers of the step that goes on, which stay on the device until the host looks at a whole block of steps.

Shape key: N rows, C column.
"""

import torch
from torch import Tensor


class Kept:
    """Rows of numbers, in the order in which they came.

    They stand in one buffer for each device: small tensors that are kept between large ones that come and go would leave the
    allocator no hole of the size that the next one needs, which costs the script more than the numbers do.
    """

    def __init__(self, *, columns: int, most: int) -> None:
        """Rows of so many numbers, so many rows at most."""
        self._columns = columns
        self._most = most
        self._devices: list[torch.device] = []  # of each row
        self._buffers: dict[torch.device, Tensor] = {}

    @property
    def is_full(self) -> bool:
        """Whether no more rows may be added."""
        return len(self._devices) >= self._most

    def add(self, *row: Tensor) -> None:
        """One more row, of scalars on one device."""
        device = row[0].device
        if device not in self._buffers:
            self._buffers[device] = torch.zeros(self._most * self._columns, device=device)
        start = len(self._devices) * self._columns
        for column, number in enumerate(row):
            self._buffers[device][start + column] = number
        self._devices.append(device)

    def take(self) -> Tensor | None:
        """All rows, (N, C) on the device of the first, and none are left; None where there are none."""
        devices, self._devices = self._devices, []
        if not devices:
            return None
        rows = {device: buffer.view(-1, self._columns) for device, buffer in self._buffers.items()}
        first = devices[0]
        if all(device == first for device in devices):
            return rows[first][: len(devices)].clone()
        return torch.stack([rows[device][n].to(first) for n, device in enumerate(devices)])
