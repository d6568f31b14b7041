"""The learning rate of every member at every step.

Shape key: M member.
"""

import math

from torch import Tensor

COSINE_FLOOR = 0.1  # cosine decays to a tenth of the peak (Brown et al. 2020)
WSD_DECAY = 0.2  # warm-up, stable, decay: the last fifth falls linearly to 0 (Hägele et al. 2024)


def lr_at(step: int, *, lr_M: Tensor, warmup_M: Tensor, schedule: str, steps: int) -> Tensor:
    """Learning rate of update number `step` (0 is the first) out of `steps`, (M,).

    Warm-up is linear and already moves at step 0, so that no update is wasted: lr (step + 1) / warmup_steps.
    """
    warming_M = ((step + 1) / warmup_M.clamp(min=1)).clamp(max=1)
    if schedule == "constant":
        return lr_M * warming_M
    if schedule == "wsd":
        remaining = (steps - step) / (WSD_DECAY * steps)
        return lr_M * warming_M * min(1.0, remaining)
    progress_M = ((step - warmup_M) / (steps - warmup_M)).clamp(min=0, max=1)
    cosine_M = (1 + (math.pi * progress_M).cos()) / 2
    return lr_M * warming_M * (COSINE_FLOOR + (1 - COSINE_FLOOR) * cosine_M)
