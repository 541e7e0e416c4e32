"""Predictions of networks as mixtures of clean sample and noise, by the training; and the noise that follows from one."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from tfmq_exp.denoisers.loading.scheduler_config import FLOW
from tfmq_exp.sampling.network_convention import PipelineSampler
from tfmq_exp.sampling.trajectory import PREDICTED, Sampler, alphas_cumprod


class ImpliedNoise(NamedTuple):
    """Noise that a prediction implies: of_x x + of_prediction prediction, with x the network's input."""

    of_x: Float64[Tensor, "steps"]
    of_prediction: Float64[Tensor, "steps"]  # 0 where the input is nothing but noise


class Mixtures(NamedTuple):
    """Factors of timesteps: the network is given signal x_0 + noise eps, and predicts of_clean x_0 + of_noise eps."""

    signal: Float64[Tensor, "steps"]
    noise: Float64[Tensor, "steps"]
    of_clean: Float64[Tensor, "steps"]
    of_noise: Float64[Tensor, "steps"]

    @classmethod
    def at(
        cls,
        schedule: Mapping[str, Any],
        timesteps: Sequence[float | int],
        alphas: Float64[Tensor, "training"] | None = None,
    ) -> "Mixtures":
        """The factors at timesteps of the training; between two with betas, the logarithm of noise / signal is linear.

        Velocities are those of arXiv 2202.00512, section 4 (`v_prediction`), and arXiv 2209.03003, equation 1 (`flow_prediction`).

        Args:
            schedule: of the training.
            timesteps: in the training's units; real ones, too.
            alphas: alpha-bar of the training; by default that of the schedule.

        Raises:
            ValueError: a timestep outside the training, or a prediction whose mixture the schedule does not tell.
        """
        check_mixture(schedule)
        kind, count = schedule.get("prediction_type", "epsilon"), int(schedule["num_train_timesteps"])
        t = torch.tensor(timesteps, dtype=torch.float64)
        one, last = torch.ones_like(t), count if kind == FLOW else count - 1
        if len(outside := t[~((t >= 0) & (t <= last))]):
            raise ValueError(f"timestep {float(outside[0]):.10g} is none of the training: expected 0 .. {last}")
        if kind == FLOW:
            return cls(1 - t / count, t / count, -one, one)
        table = alphas_cumprod(schedule) if alphas is None else alphas
        low, high = table[t.floor().long()], table[t.ceil().long()]
        kept = torch.where(t == t.floor(), low, low.logit().lerp(high.logit(), t.frac()).sigmoid())
        signal, noise = kept.sqrt(), (1 - kept).sqrt()
        predicted = {"epsilon": (0 * one, one), "sample": (one, 0 * one), "v_prediction": (-noise, signal)}
        return cls(signal, noise, *predicted[kind])

    @classmethod
    def of(cls, sampler: Sampler, schedule: Mapping[str, Any], timesteps: Sequence[float | int]) -> "Mixtures":
        """The factors at timesteps as the network is given them by a sampler; a negative prediction has negative ones.

        Raises:
            ValueError: see `at`; or timesteps that are none of the training's.
        """
        of_training = dict(
            zip(sampler.calls(schedule), sampler.start(schedule).t_train or sampler.calls(schedule), strict=True)
        )
        piped = isinstance(sampler, PipelineSampler)
        inner: Any = sampler.sampler if piped else sampler
        settings = getattr(inner, "settings", {})
        if schedule.get("prediction_type") == "v_prediction" and settings.get("timestep_type") == "continuous":
            raise ValueError("timestep_type=continuous counts in logarithms of sigma, not in timesteps of the training")
        # a folder's scheduler knows what the schedule does not tell: betas rescaled to end without signal
        known = getattr(inner.scheduler(), "alphas_cumprod", None) if settings else None
        found = cls.at(schedule, [of_training[t] for t in timesteps], None if known is None else known.double())
        if not (piped and sampler.convention.negated):
            return found
        return found._replace(of_clean=-found.of_clean, of_noise=-found.of_noise)

    def implied_noise(self) -> ImpliedNoise:
        """The noise as a sum of input and prediction, from the two equations that have noise and clean sample as unknowns."""
        whole = self.signal * self.of_noise - self.noise * self.of_clean
        of_prediction = torch.where(self.of_clean == 0, 1 / self.of_noise, self.signal / whole)
        return ImpliedNoise(torch.where(self.of_clean == 0, 0, -self.of_clean / whole), of_prediction)

    def signal_share(self) -> Float64[Tensor, "steps"]:
        """Share of the signal's power in the input; alpha-bar where there is one."""
        return self.signal**2 / (self.signal**2 + self.noise**2)


def check_mixture(schedule: Mapping[str, Any]) -> None:
    """Raise ValueError for a prediction whose mixture the schedule does not tell."""
    if (kind := schedule.get("prediction_type", "epsilon")) not in ("epsilon", "sample", "v_prediction", FLOW):
        raise ValueError(f"prediction_type={kind} is not supported: the network predicts {PREDICTED.get(kind, kind)}")
