"""Errors of a quantized network's temporal features against the float ones, timestep by timestep."""

from collections.abc import Sequence
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.finite import relative
from tfmq_exp.denoisers.structure import Role, UNetStructure
from tfmq_exp.denoisers.temporal import TemporalInformationBlock
from tfmq_exp.denoisers.unet import time_embedding
from tfmq_exp.diagnostics.rows import Row, grouped
from tfmq_exp.quant.layers import Unneeded
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

EMBEDDING = "time_embedding"
DISTANCES = ("cosine_distance", "mse", "relative_mse")


@torch.no_grad()
def feature_errors(
    model: QuantizedUNet, float_unet: nn.Module, structure: UNetStructure, timesteps: Sequence[int] | None = None
) -> list[Row]:
    """Distances of every temporal feature to the float one, for each timestep that is sampled; None for the finite set.

    The time embedding comes first (after its activation, as every projection reads it; left out where all features are stored
    and nothing computes it), then the projections' features in execution order. Rows have `cosine_distance` = 1 - cosine
    similarity, `mse`, and `relative_mse`, the mse over the float feature's mean square.
    """
    t = torch.tensor(timesteps or model.context.timesteps, device=next(float_unet.parameters()).device)
    with model.context.at(t, model.plan.outside_timesteps):
        features = _features(model.unet, structure, t)
    exact = _features(float_unet, structure, t)
    if any(isinstance(model.unet.get_submodule(s.name), Unneeded) for s in structure.by_role(Role.TIME_EMBED)):
        del exact[EMBEDDING]
    return [row for name, feature in exact.items() for row in _distances(name, t, features[name], feature)]


def temporal_feature_error(
    model: QuantizedUNet, float_unet: nn.Module, structure: UNetStructure, timesteps: Sequence[int] | None = None
) -> list[Row]:
    """`cosine` similarity, `mse` and `relative_mse` at every timestep, averaged over layers (arXiv 2311.16503, figure 2)."""
    rows = [row for row in feature_errors(model, float_unet, structure, timesteps) if row["layer"] != EMBEDDING]
    steps = ((step, group[0]["t"], _means(group)) for step, group in grouped(rows, "step").items())
    return [{"step": step, "t": t, "cosine": 1 - means.pop("cosine_distance"), **means} for step, t, means in steps]


def features_by_layer(rows: list[Row]) -> list[Row]:
    """Rows of `feature_errors` averaged over the timesteps, and `at_t`, where the relative error is largest."""
    return [
        {"layer": layer, **_means(group), "at_t": max(group, key=lambda row: row["relative_mse"])["t"]}
        for layer, group in grouped(rows, "layer").items()
    ]


def _means(rows: list[Row]) -> Row:
    return {key: fmean(row[key] for row in rows) for key in DISTANCES}


def _features(unet: nn.Module, structure: UNetStructure, t: Tensor) -> dict[str, Tensor]:
    block = TemporalInformationBlock(unet, structure)
    features = dict(zip(block.names, block(t), strict=True))
    in_order = [layer for part in structure.blocks for layer in part.layers if layer in features]
    return {EMBEDDING: time_embedding(unet, t), **{layer: features[layer] for layer in in_order}}


def _distances(
    name: str, t: Tensor, feature: Float[Tensor, "steps channels"], exact: Float[Tensor, "steps channels"]
) -> list[Row]:
    a, b = feature.double(), exact.double()
    mse = (a - b).square().mean(1)
    relative_mse = relative(mse, b.square().mean(1), f"the temporal feature {name}")
    columns = torch.stack([1 - torch.cosine_similarity(a, b, dim=1), mse, relative_mse], dim=1).tolist()
    return [
        {"layer": name, "step": step, "t": at, **dict(zip(DISTANCES, values, strict=True))}
        for step, (at, values) in enumerate(zip(t.tolist(), columns, strict=True))
    ]
