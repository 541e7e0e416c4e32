"""A network of diffusers whose weights stay in their files."""

from pathlib import Path
from typing import Any

from tfmq_exp.core.finite import require_finite
from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.denoisers.families.unet import CONDITIONAL_UNET, UNET
from tfmq_exp.denoisers.loading.network_folder import build_outline, safetensors_files
from tfmq_exp.denoisers.loading.sharded_weights import ShardedWeights


def open_stored_network(folder: Path, kind: str) -> tuple[Any, ShardedWeights]:
    """A transformer with its parameters on the meta device, and its weights; they are read once, tensor by tensor, to be checked.

    Args:
        folder: with config.json and safetensors, whole or in shards.
        kind: name of its class.

    Raises:
        FileNotFoundError: no config.json, no weights, or not all shards.
        ValueError: a UNet; weights that are not those of the architecture, no real numbers, or not finite.
    """
    network = build_outline(folder, {kind})
    if family_of(network) in (UNET, CONDITIONAL_UNET):
        raise ValueError(
            f"the weights of a {kind} cannot stay in their files: its blocks form no chain; load it into memory"
        )
    safetensors_files(folder)
    shards, expected = ShardedWeights.of(folder), dict(network.named_parameters())
    state = network.state_dict()
    buffers = state.keys() - expected.keys()
    if missing := expected.keys() - shards.files.keys():
        raise ValueError(f"{folder} cannot be loaded: {len(missing)} weights are missing, first {min(missing)}")
    if unknown := shards.files.keys() - expected.keys() - buffers:
        raise ValueError(
            f"{folder} cannot be loaded: {len(unknown)} weights are not in the architecture, first {min(unknown)}"
        )
    for name in shards.files:
        value, own = shards.read([name])[name], state[name]
        if value.shape != own.shape or not value.is_floating_point():
            found = f"{name} is {tuple(value.shape)} of {value.dtype} instead of {tuple(own.shape)} of real numbers"
            raise ValueError(f"{folder} cannot be loaded: {found}")
        require_finite(value, f"{folder}: the weights: {name}")
        if name in buffers:
            own.copy_(value)
    shards.reads.clear()
    return network, shards
