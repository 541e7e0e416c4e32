"""An Inception network with random weights: no published score can be had without the real file, but every formula can."""

import torch
from torch import Tensor

from tfmq_exp.evaluation.features.inception import Inception


def random_weights(seed: int) -> dict[str, Tensor]:
    """Weights under which activations neither vanish nor grow, and images get different classes."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Inception().state_dict().items()}
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator)

    state: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name == "fc.weight":
            state[name] = 0.02 * normal(shape)
        elif len(shape) > 1:
            state[name] = normal(shape) * (2 / shape[1:].numel()) ** 0.5
        elif name.endswith("running_var") or name.endswith("bn.weight"):
            state[name] = 1 + 0.2 * torch.rand(shape, generator=generator)
        else:
            state[name] = 0.1 * normal(shape)
    return state
