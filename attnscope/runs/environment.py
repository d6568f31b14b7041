"""Where a run is recorded: versions, machine, device."""

import os
import platform
from importlib.metadata import version

import torch


def environment(device: torch.device | None = None) -> dict[str, object]:
    """What a reader needs to know to train the same again.

    Args:
        device: that is trained on; None where others choose it, and only events say which.
    """
    known: dict[str, object] = {
        "attnscope": version("attnscope"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if device is not None:
        is_cuda = device.type == "cuda"
        known["device"] = torch.cuda.get_device_name(device) if is_cuda else device.type
    return known | {"threads": torch.get_num_threads(), "cpus": os.cpu_count()}
