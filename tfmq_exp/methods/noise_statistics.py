"""Quantization noise of each sampling step: sums over images, and what is estimated from them (PTQD, arXiv 2305.10657)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.sampling.sampler import Predict

SUMS = ("e", "d", "ee", "dd", "ed")
STATISTICS = ("k", "r2", "bias", "sigma")


@dataclass(frozen=True)
class NoiseMoments:
    """Sums over the pixels of one channel, per step and image, of e (float prediction) and d (quantized minus float)."""

    pixels: int
    e: Float[Tensor, "steps images channels"]
    d: Float[Tensor, "steps images channels"]
    ee: Float[Tensor, "steps images channels"]
    dd: Float[Tensor, "steps images channels"]
    ed: Float[Tensor, "steps images channels"]

    @classmethod
    def of(
        cls, e: Float[Tensor, "steps images channels *pixels"], d: Float[Tensor, "steps images channels *pixels"]
    ) -> "NoiseMoments":
        """The sums, in double precision."""
        e, d = e.double().flatten(3), d.double().flatten(3)
        return cls(e.shape[3], e.sum(3), d.sum(3), (e * e).sum(3), (d * d).sum(3), (e * d).sum(3))

    @classmethod
    def join(cls, batches: "Sequence[Sequence[NoiseMoments]]") -> "NoiseMoments":
        """Batches of images, each given step by step."""
        steps = ([torch.cat([getattr(step, name) for step in batch]) for batch in batches] for name in SUMS)
        return cls(batches[0][0].pixels, *(torch.cat(parts, dim=1) for parts in steps))

    def signal_to_noise(self) -> Float[Tensor, "steps"]:
        """E |e|^2 / E |d|^2."""
        return self.ee.sum((1, 2)) / self.dd.sum((1, 2))


@dataclass(frozen=True)
class NoiseStatistics:
    """Quantization noise of every sampling step: d = k e + bias + N(0, sigma^2), uncorrelated with e.

    `bits` is the activation bit-width of every step where there was a choice, else empty.
    """

    timesteps: tuple[int, ...]
    k: Float[Tensor, "steps"]
    r2: Float[Tensor, "steps"]
    bias: Float[Tensor, "steps channels"]
    sigma: Float[Tensor, "steps"]
    bits: tuple[int, ...] = ()

    def corrected(self, predict: Predict) -> Predict:
        """(prediction - bias) / (1 + k), with each row's own step."""
        context = TimestepContext(self.timesteps)

        def corrected_predict(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
            step = context.step_indices(t).cpu()
            k = self.k[step].to(x).reshape(-1, *(1,) * (x.dim() - 1))
            bias = self.bias[step].to(x).reshape(len(x), -1, *(1,) * (x.dim() - 2))
            return (predict(x, t, conditions) - bias) / (1 + k)

        return corrected_predict

    @property
    def residual(self) -> Float[Tensor, "steps"]:
        """Standard deviation of the noise that the corrected prediction still has."""
        return self.sigma / (1 + self.k)

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, as it is stored."""
        lists = {"timesteps": self.timesteps, "bits": self.bits}
        return {name: getattr(self, name) for name in STATISTICS} | {
            name: torch.tensor(values, dtype=torch.long) for name, values in lists.items()
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "NoiseStatistics":
        """The inverse of `tensors`."""
        timesteps, bits = (tuple(tensors[name].tolist()) for name in ("timesteps", "bits"))
        return cls(timesteps, tensors["k"], tensors["r2"], tensors["bias"], tensors["sigma"], bits)

    def rows(self) -> list[dict[str, Any]]:
        """One row per step, for a table."""
        bias = [float(x.square().mean().sqrt()) for x in self.bias]
        bits = self.bits or (None,) * len(self.timesteps)
        columns = (self.timesteps, self.k.tolist(), self.r2.tolist(), self.sigma.tolist(), bias, bits)
        names = ("step", "t", "k", "r2", "sigma", "bias_rms", "bits")
        return [dict(zip(names, (i, *row), strict=True)) for i, row in enumerate(zip(*columns, strict=True))]
