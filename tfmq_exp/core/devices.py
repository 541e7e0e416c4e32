"""The device that a module is on."""

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """Device of the parameters; the meta device only where all of them are there, not those alone that are not loaded."""
    found = torch.device("meta")
    for parameter in module.parameters():
        if not parameter.is_meta:
            return parameter.device
    return found
