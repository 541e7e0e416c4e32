"""Inputs that the Temporal Information Block learns from: timesteps, or pairs of timestep and condition."""

import torch
from torch import nn

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.quant.timestep_context import TimestepContext, exact_timesteps, network_timesteps
from tfmq_exp.reconstruction.activation_cache import TensorTree


def temporal_inputs(network: nn.Module, data: CalibrationSet, context: TimestepContext) -> TensorTree:
    """Inputs of the Temporal Information Block of a network: every timestep of the finite set, a row each.

    Where its features depend on conditions, too: every different pair of timestep and condition of the calibration set.
    """
    names = family_of(network).conditions_of(data.conditions)
    if not names:
        t = network_timesteps(exact_timesteps(context.timesteps))
        return TensorTree((t, (t,), {}))
    rows = torch.cat([data.conditions[name].double().reshape(len(data.conditions[name]), -1) for name in names], dim=1)
    kind = rows.unique(dim=0, return_inverse=True)[1]  # the same prompt may stand in the table more than once
    pairs = torch.stack([data.t.double(), kind[data.condition].double()], dim=1)
    _, of_pair = pairs.unique(dim=0, return_inverse=True)
    first = torch.full((int(of_pair.max()) + 1,), len(data)).scatter_reduce(0, of_pair, torch.arange(len(data)), "amin")
    chosen = data[first.sort().values]
    t = network_timesteps(chosen.t)
    return TensorTree((t, (t, {name: data.conditions[name][chosen.condition] for name in names}), {}))
