"""Statistics of the quantization noise in a prediction, and the prediction without what they foresee (PTQD, arXiv 2305.10657)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.sampling.prediction import ImpliedNoise
from tfmq_exp.sampling.trajectory import Predict

Predictions = Float[Tensor, "steps images channels *pixels"]
STATISTICS = ("k", "r2", "bias", "sigma")


def channel_axis(x: Float[Tensor, "batch ..."]) -> int:
    """The axis of a sample's channels: the last of packed samples [batch, tokens, channels], else the second."""
    return 2 if x.dim() == 3 else 1


@dataclass(frozen=True)
class NoiseMoments:
    """Sums over a channel's pixels, per step and image, of e (float prediction), d (quantized minus float), e², d² and e d."""

    pixels: int
    sums: Float[Tensor, "5 steps images channels"]

    @classmethod
    def of(cls, e: Predictions, d: Predictions) -> "NoiseMoments":
        """The sums, in double precision."""
        e, d = e.double().flatten(3), d.double().flatten(3)
        return cls(e.shape[3], torch.stack([x.sum(3) for x in (e, d, e * e, d * d, e * d)]))

    @classmethod
    def join(cls, batches: "Sequence[Sequence[NoiseMoments]]") -> "NoiseMoments":
        """Batches of images, each given step by step."""
        parts = [torch.cat([step.sums for step in batch], dim=1) for batch in batches]
        return cls(batches[0][0].pixels, torch.cat(parts, dim=2))

    def signal_to_noise(self) -> Float[Tensor, "steps"]:
        """E |e|^2 / E |d|^2."""
        return self.sums[2].sum((1, 2)) / self.sums[3].sum((1, 2))


@dataclass(frozen=True)
class NoiseStatistics:
    """Quantization noise of every sampling step: d = k e + bias + N(0, sigma^2), uncorrelated with e."""

    timesteps: tuple[float | int, ...]
    k: Float[Tensor, "steps"]
    r2: Float[Tensor, "steps"]
    bias: Float[Tensor, "steps channels"]
    sigma: Float[Tensor, "steps"]
    bits: tuple[int, ...] = ()  # of activations at every step, where there was a choice

    def corrected(self, predict: Predict, implied: ImpliedNoise) -> Predict:
        """The prediction whose implied noise is (noise - bias) / (1 + k), with each row's own step.

        Where the network's input is nothing but noise, no prediction changes that: it is left as it is.
        """
        context = TimestepContext(self.timesteps)
        known = implied.of_prediction != 0
        divisor = torch.where(known, implied.of_prediction, 1)
        # written so that what is divided by a small number is small itself
        of_x = torch.where(known, self.k * implied.of_x / divisor, 0)
        shift = torch.where(known[:, None], self.bias / divisor[:, None], 0)
        scale = torch.where(known, 1 + self.k, 1)

        def corrected_predict(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
            step = context.step_indices(t).cpu()
            away, by = (v[step].to(x).reshape(-1, *(1,) * (x.dim() - 1)) for v in (of_x, scale))
            shape = [len(x), *(1,) * (x.dim() - 1)]
            shape[channel_axis(x)] = -1
            bias = shift[step].to(x).reshape(shape)
            return (predict(x, t, conditions) - bias - away * x) / by

        return corrected_predict

    @property
    def residual(self) -> Float[Tensor, "steps"]:
        """Standard deviation of the noise that the corrected prediction still has."""
        return self.sigma / (1 + self.k)

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, as it is stored; timesteps in int64, or in float32, which holds real ones exactly."""
        lists = {"timesteps": torch.tensor(self.timesteps), "bits": torch.tensor(self.bits, dtype=torch.long)}
        return {name: getattr(self, name) for name in STATISTICS} | lists

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "NoiseStatistics":
        """The inverse of `tensors`."""
        timesteps, bits = (tuple(tensors[name].tolist()) for name in ("timesteps", "bits"))
        return cls(timesteps, bits=bits, **{name: tensors[name] for name in STATISTICS})

    def rows(self) -> list[dict[str, Any]]:
        """One row per step, for a table."""
        columns = {"step": range(len(self.timesteps)), "t": self.timesteps}
        columns |= {name: getattr(self, name).tolist() for name in ("k", "r2", "sigma")}
        columns["bias_rms"] = [float(x.square().mean().sqrt()) for x in self.bias]
        columns["bits"] = self.bits or (None,) * len(self.timesteps)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
