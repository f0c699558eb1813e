"""Where a run computes. Needs torch alone, so that a missing device is refused before a run begins."""

import torch

from pipeline.config import Config
from pipeline.errors import UserError

DEVICELESS = ("compare", "predict", "publish")
"""Steps that never use `device`."""


def device_of(config: Config) -> torch.device:
    """The device that `device` names. Raises UserError if it is missing."""
    if config.device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    device = torch.device(config.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={config.device}: {torch.cuda.device_count()} CUDA devices here; use device=cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device={config.device}: Apple's GPU is not available here; use device=cpu")
    return device
