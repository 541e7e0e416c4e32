"""Denoisers of published architectures with random weights: timing, memory and arithmetic need no checkpoint."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tfmq_exp.denoisers.denoiser import ConditionEncoder, Conditions, Denoiser, NoConditions
from tfmq_exp.denoisers.loading import autoencoder
from tfmq_exp.denoisers.originals import compvis_checkpoint, compvis_unet


@dataclass(frozen=True)
class RandomContext:
    """Any choice of a condition is some random sequence, made on the CPU."""

    shape: tuple[int, int]

    def __call__(self, choices: Sequence[Any]) -> Conditions:
        """Another sequence for each number of choices; the same one stands for no condition."""
        generator = torch.Generator().manual_seed(len(choices))
        given, null = (torch.randn(n, *self.shape, generator=generator) for n in (len(choices), 1))
        return Conditions({"encoder_hidden_states": given}, {"encoder_hidden_states": null})

    def example(self) -> Conditions:
        return self([0])

    def to(self, device: torch.device) -> None:
        pass


def generic(network: nn.Module) -> nn.Module:
    """Replace special values: parameters that start as zero or as the identity would hide what they multiply."""
    for parameter in network.requires_grad_(False).parameters():
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    return network.eval()


@functools.cache
def random_denoiser(name: str, architecture: str, device: str = "cpu") -> Denoiser:
    """The networks of a model, weights from a seed and made on a device; the architecture is JSON as in `conf/model`."""
    config = json.loads(architecture)
    params = config["model"]["params"]
    arguments, scale = params["unet_config"]["params"], float(params.get("scale_factor", 1.0))
    torch.manual_seed(0)
    with torch.device(device):
        network = generic(compvis_unet.openai_unet(arguments))
        vae = autoencoder.build_autoencoder(params["first_stage_config"], scale)
        generic(vae)
    encoder: ConditionEncoder = NoConditions()
    if arguments.get("use_spatial_transformer"):
        encoder = RandomContext((1 if name == "ldm_imagenet" else 77, arguments["context_dim"]))
    decoder, shape = autoencoder.LatentDecoder(vae, scale), compvis_checkpoint.sample_shape(config)
    return Denoiser(name, network, shape, compvis_checkpoint.training_schedule(config), "random", encoder, decoder)
