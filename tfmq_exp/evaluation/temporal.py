"""How far a quantized network is from its float one, step by step: in its temporal features, and along the trajectory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tfmq_exp.denoisers.anatomy import Anatomy
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.denoisers.temporal import TemporalInformationBlock
from tfmq_exp.sampling.sampler import Predict, Step
from tfmq_exp.sampling.sampling import Sampling
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

STREAM = "diagnostics"
Row = dict[str, float | int]


@torch.no_grad()
def temporal_feature_error(model: QuantizedUNet, float_unet: nn.Module, anatomy: Anatomy) -> list[Row]:
    """For every timestep: cosine similarity and mean squared error of the temporal features, averaged over blocks.

    `relative_mse` divides by the mean square of the float feature (TFMQ-DM, arXiv 2311.16503, figure 2 shows the cosine).
    """
    t = torch.tensor(model.clock.timesteps, device=next(float_unet.parameters()).device)
    with model.clock.at(t):
        quantized = TemporalInformationBlock(model.unet, anatomy)(t)
    wanted = TemporalInformationBlock(float_unet, anatomy)(t)
    pairs = list(zip(quantized, wanted, strict=True))
    cosine = torch.stack([torch.cosine_similarity(a, b, dim=1) for a, b in pairs]).mean(0)
    mse = torch.stack([(a - b).square().mean(1) for a, b in pairs]).mean(0)
    relative = torch.stack([(a - b).square().mean(1) / b.square().mean(1) for a, b in pairs]).mean(0)
    columns = zip(t.tolist(), cosine.tolist(), mse.tolist(), relative.tolist(), strict=True)
    return [
        {"step": step, "t": when, "cosine": c, "mse": m, "relative_mse": r}
        for step, (when, c, m, r) in enumerate(columns)
    ]


def trajectory_error(
    predict: Predict,
    quantized: Sampling,
    denoiser: Denoiser,
    sampling: Sampling,
    *,
    images: int,
    seed: int,
    each_step: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """Float and quantized sampling (`predict`, `quantized`) from the same noise, side by side, for every step.

    `eps_error`: error of the predicted noise on the float trajectory (what one step does); `x_error`: distance of the two
    trajectories (what has accumulated). Both are mean squared errors over the variance of the float quantity.
    """
    start: dict[str, Any] = {"seed": seed, "stream": STREAM, "indices": range(images)}
    conditions = sampling.conditions(denoiser, *start.values())
    walk = quantized.trajectory(predict, denoiser, **start)
    rows: list[Row] = []
    for step in sampling.trajectory(sampling.predictor(denoiser.unet), denoiser, **start):
        other = next(walk)
        # at the first step both are at x_T, where the quantized prediction is at hand
        on_path = other.eps if step.index == 0 else _predict(predict, step, conditions)
        rows.append(
            {
                "step": step.index,
                "t": step.t,
                "eps_error": _relative(on_path, step.eps),
                "x_error": _relative(other.x_next, step.x_next),
            }
        )
        each_step(step.index)
    return rows


@torch.no_grad()
def _predict(predict: Predict, step: Step, conditions: Conditions) -> Tensor:
    return predict(step.x, torch.full((len(step.x),), step.t, device=step.x.device), conditions)


def _relative(value: Tensor, wanted: Tensor) -> float:
    return float((value - wanted).square().mean() / wanted.var())
