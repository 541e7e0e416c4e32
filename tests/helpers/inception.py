"""An Inception network with random weights: no published score can be had without the real file, but every formula can."""

from unittest.mock import patch

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def random_weights(seed: int) -> dict[str, Tensor]:
    """Weights under which activations neither vanish nor grow, and images get different classes."""
    without_file = patch.object(FeatureExtractorInceptionV3, "load_state_dict"), patch("torch.load")
    with torch.device("meta"), without_file[0], without_file[1]:
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], "no file")
    shapes = {name: value.shape for name, value in network.state_dict().items()}
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
