"""Errors of a quantized network's temporal features against the float ones, timestep by timestep."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.finite import relative
from tfmq_exp.denoisers.structure import NetworkStructure, Role
from tfmq_exp.denoisers.temporal import TemporalInformationBlock, temporal_pairs
from tfmq_exp.diagnostics.rows import Row, grouped
from tfmq_exp.quant.stored_features import Unneeded
from tfmq_exp.quant.timestep_context import Timestep, exact_timesteps, network_timesteps
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

EMBEDDING = "time_embedding"
DISTANCES = ("cosine_distance", "mse", "relative_mse")


@torch.no_grad()
def feature_errors(
    model: QuantizedNetwork,
    float_network: nn.Module,
    structure: NetworkStructure,
    timesteps: Sequence[Timestep] | None = None,
    conditions: Mapping[str, Tensor] | None = None,
) -> list[Row]:
    """Distances of every temporal feature to the float one, for each timestep that is sampled; None for the finite set.

    The time embedding comes first (after its activation, as every projection reads it; left out where all features are stored
    and nothing computes it), then the projections' features in execution order. Rows have `cosine_distance` = 1 - cosine
    similarity, `mse`, and `relative_mse`, the mse over the float feature's mean square.

    Args:
        model: the quantized network.
        float_network: the float one.
        structure: of both.
        timesteps: at which the features are compared.
        conditions: rows of the arguments that features depend on beside the timestep; distances are means over them.
    """
    device, steps = model.context.visited.device, timesteps or model.context.timesteps
    t, given = temporal_pairs(network_timesteps(exact_timesteps(steps)).to(device), conditions or {})
    with model.context.at(t, model.plan.outside_timesteps, conditions=given):
        features = _features(model.network, structure, t, given)
    exact = _features(float_network, structure, t, given)
    if any(isinstance(model.network.get_submodule(s.name), Unneeded) for s in structure.by_role(Role.TIME_EMBED)):
        del exact[EMBEDDING]
    return [row for name, feature in exact.items() for row in _distances(name, steps, features[name], feature)]


def temporal_feature_error(
    model: QuantizedNetwork,
    float_network: nn.Module,
    structure: NetworkStructure,
    timesteps: Sequence[Timestep] | None = None,
    conditions: Mapping[str, Tensor] | None = None,
) -> list[Row]:
    """`cosine` similarity, `mse` and `relative_mse` at every timestep, averaged over layers (arXiv 2311.16503, figure 2).

    Args:
        model: the quantized network.
        float_network: the float one.
        structure: of both.
        timesteps: see `feature_errors`.
        conditions: see `feature_errors`.
    """
    every = feature_errors(model, float_network, structure, timesteps, conditions)
    rows = [row for row in every if row["layer"] != EMBEDDING]
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


def _features(
    network: nn.Module, structure: NetworkStructure, t: Tensor, conditions: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    embedding: list[Tensor] = []
    first = network.get_submodule(structure.by_role(Role.TIME_PROJ)[0].name)
    hook = first.register_forward_pre_hook(lambda _, args: embedding.append(args[0]))
    features = TemporalInformationBlock(network, structure).features(t, conditions)
    hook.remove()
    in_order = [layer for part in structure.blocks for layer in part.layers if layer in features]
    return {EMBEDDING: embedding[0], **{layer: features[layer] for layer in in_order}}


def _distances(
    name: str, steps: Sequence[Timestep], feature: Float[Tensor, "rows ..."], exact: Float[Tensor, "rows ..."]
) -> list[Row]:
    a, b = feature.double().flatten(1), exact.double().flatten(1)
    mse = (a - b).square().mean(1)
    relative_mse = relative(mse, b.square().mean(1), f"the temporal feature {name}")
    columns = torch.stack([1 - torch.cosine_similarity(a, b, dim=1), mse, relative_mse], dim=1)
    means = columns.unflatten(0, (len(steps), -1)).mean(1).tolist()
    return [
        {"layer": name, "step": step, "t": at, **dict(zip(DISTANCES, values, strict=True))}
        for step, (at, values) in enumerate(zip(steps, means, strict=True))
    ]
