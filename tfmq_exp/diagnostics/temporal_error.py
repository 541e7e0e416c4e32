"""How far the temporal features of a quantized network are from the float ones, timestep by timestep."""

from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.finite import relative
from tfmq_exp.denoisers.structure import Role, UNetStructure
from tfmq_exp.denoisers.temporal import TemporalInformationBlock
from tfmq_exp.denoisers.unet import time_embedding
from tfmq_exp.surgery.quantized_unet import QuantizedUNet
from tfmq_exp.surgery.temporal_cache import Unneeded

EMBEDDING = "time_embedding"
Row = dict[str, Any]


@torch.no_grad()
def feature_errors(model: QuantizedUNet, float_unet: nn.Module, structure: UNetStructure) -> list[Row]:
    """For every temporal feature and timestep of the finite set: how far the quantized feature is from the float one.

    The time embedding comes first (after its activation, as every projection reads it), then the projections' features in
    execution order. The embedding is left out where all features are stored and nothing computes it.

    Returns:
        rows with `cosine_distance` = 1 - cosine similarity, `mse`, and `relative_mse`, the mse over the float feature's mean
        square.
    """
    t = torch.tensor(model.context.timesteps, device=next(float_unet.parameters()).device)
    with model.context.at(t):
        found = _features(model.unet, structure, t)
    wanted = _features(float_unet, structure, t)
    if any(isinstance(model.unet.get_submodule(s.name), Unneeded) for s in structure.by_role(Role.TIME_EMBED)):
        del wanted[EMBEDDING]
    return [row for name, feature in wanted.items() for row in _distances(name, t, found[name], feature)]


def temporal_feature_error(model: QuantizedUNet, float_unet: nn.Module, structure: UNetStructure) -> list[Row]:
    """For every timestep: the errors of the projections' features, averaged over them (TFMQ-DM, arXiv 2311.16503, figure 2).

    Returns:
        rows with `cosine` similarity, `mse`, and `relative_mse`.
    """
    steps: dict[int, list[Row]] = {}
    for row in feature_errors(model, float_unet, structure):
        if row["layer"] != EMBEDDING:
            steps.setdefault(row["step"], []).append(row)
    return [
        {
            "step": step,
            "t": rows[0]["t"],
            "cosine": 1 - fmean(row["cosine_distance"] for row in rows),
            "mse": fmean(row["mse"] for row in rows),
            "relative_mse": fmean(row["relative_mse"] for row in rows),
        }
        for step, rows in steps.items()
    ]


def _features(unet: nn.Module, structure: UNetStructure, t: Tensor) -> dict[str, Tensor]:
    block = TemporalInformationBlock(unet, structure)
    found = dict(zip(block.names, block(t), strict=True))
    in_order = [site for part in structure.blocks for site in part.sites if site in found]
    return {EMBEDDING: time_embedding(unet, t), **{site: found[site] for site in in_order}}


def _distances(
    name: str, t: Tensor, found: Float[Tensor, "steps channels"], wanted: Float[Tensor, "steps channels"]
) -> list[Row]:
    """One row per timestep."""
    a, b = found.double(), wanted.double()
    mse = (a - b).square().mean(1)
    columns = {
        "cosine_distance": 1 - torch.cosine_similarity(a, b, dim=1),
        "mse": mse,
        "relative_mse": relative(mse, b.square().mean(1), f"the temporal feature {name}"),
    }
    values = {key: column.tolist() for key, column in columns.items()}
    return [
        {"layer": name, "step": step, "t": when, **{key: column[step] for key, column in values.items()}}
        for step, when in enumerate(t.tolist())
    ]
