"""Correction of the quantization noise that remains in the prediction (PTQD, arXiv 2305.10657)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.batches import batches
from tfmq_exp.core.finite import require_finite
from tfmq_exp.core.seeds import Stream
from tfmq_exp.core.validate import COUNT, SWITCH, check_fields, one_of
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.samplers import DDIM, VarianceCalibrated
from tfmq_exp.sampling.trajectory import Predict, Sampler, alphas_cumprod, require_noise_prediction
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

Predictions = Float[Tensor, "steps images channels *pixels"]
STATISTICS = ("k", "r2", "bias", "sigma")
log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class NoCorrection:
    """The prediction as the quantized network makes it."""

    measures: ClassVar[Literal[False]] = False  # statistics of the noise

    def check(self, sampler: Sampler) -> None: ...

    def check_training(self, schedule: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class NoiseCorrection:
    """Remove the predictable part of the noise, and let the sampler add less noise by the part that is not predictable."""

    images: int  # float trajectories that the statistics are taken from
    # of the fit that gives k: one for each `channel`, as the noise model has it; or one `shared` by all, as in the
    # release, where means that differ between channels leak into k
    intercept: Literal["channel", "shared"]
    # `residual`, the mean of what k e leaves; or `total`, the mean of all noise, as the release has it
    bias: Literal["residual", "total"]
    # `pooled` over everything but the channel's mean; or `per_sample`, the mean of the samples' standard deviations,
    # as the release has it
    sigma: Literal["pooled", "per_sample"]
    keep_drift: bool  # leave the sampler's deterministic part alone when its noise shrinks; False as in the release
    measures: ClassVar[Literal[True]] = True

    def __post_init__(self) -> None:
        check_fields(self, images=COUNT, keep_drift=SWITCH, intercept=one_of("channel", "shared"))
        check_fields(self, bias=one_of("residual", "total"), sigma=one_of("pooled", "per_sample"))

    def check(self, sampler: Sampler) -> None:
        """Raise ValueError for a sampler whose noise cannot be made less."""
        if sampler.eta and not isinstance(sampler, DDIM):
            name = getattr(sampler, "kind", type(sampler).__name__)
            raise ValueError(f"the noise of a {name} cannot be calibrated: choose sampler=ddim, or sampler.eta=0")

    def check_training(self, schedule: Mapping[str, Any]) -> None:
        """Raise ValueError for a network that predicts anything but noise, which the method's formulas are for."""
        require_noise_prediction(schedule, "PTQD's correction (method/correction)")

    def estimate(self, moments: NoiseMoments, timesteps: tuple[float | int, ...]) -> NoiseStatistics:
        """Statistics of every step, from sums over its images.

        1. k: slope of the least-squares fit of d on e over a step's pixels, at least 0; r2: its share of d's variance.
        2. bias: mean of d - k e per channel.
        3. sigma: standard deviation of d - k e.

        Raises:
            NotFiniteError: the noise of a step is NaN or infinite; names its timestep.
        """
        e, d, ee, dd, ed = moments.sums
        for step, t in enumerate(timesteps):
            require_finite(dd[step], f"the quantization noise at timestep {t}, squared,")
        tiny, per_channel = torch.finfo(torch.float64).tiny, moments.pixels * e.shape[1]
        # 1.
        means = [x.sum(1) / per_channel for x in moments.sums]
        if self.intercept == "shared":
            means = [mean.mean(1, keepdim=True) for mean in means]
        mean_e, mean_d, mean_ee, mean_dd, mean_ed = means
        var_e, var_d = (mean_ee - mean_e**2).mean(1), (mean_dd - mean_d**2).mean(1)
        covariance = (mean_ed - mean_e * mean_d).mean(1)
        k = (covariance / var_e.clamp(min=tiny)).clamp(min=0)
        r2 = covariance**2 / (var_e * var_d).clamp(min=tiny)
        # 2.
        residual_mean = (d.sum(1) - k[:, None] * e.sum(1)) / per_channel
        bias = residual_mean if self.bias == "residual" else d.sum(1) / per_channel
        # 3.
        slope = k[:, None, None]
        squares = dd - 2 * slope * ed + slope**2 * ee
        if self.sigma == "pooled":
            sigma = (squares.sum(1) / per_channel - residual_mean**2).clamp(min=0).mean(1).sqrt()
        else:
            n = moments.pixels * e.shape[2]
            sums = (d - slope * e).sum(2)
            sigma = ((squares.sum(2) - sums**2 / n).clamp(min=0) / (n - 1)).sqrt().mean(1)
        pairs = zip(STATISTICS, (k, r2, bias, sigma), strict=True)
        found = {name: require_finite(x, f"{name} of the quantization noise").float() for name, x in pairs}
        return NoiseStatistics(timesteps, bits=(), **found)

    def measure(
        self,
        model: QuantizedNetwork,
        denoiser: Denoiser,
        sampling: Sampling,
        *,
        seed: int,
        batch: int,
        each_step: Callable[[int], None] = lambda _: None,
    ) -> NoiseStatistics:
        """Statistics along the float trajectories, after guidance; with the bit-width of each step where there is a choice.

        Args:
            model: the quantized network.
            denoiser: the float model.
            sampling: sampler, conditions and guidance.
            seed: of the run.
            batch: images that go through the networks together.
            each_step: called with the number of finished steps of all batches.
        """
        self.check_training(denoiser.schedule)
        context, widths, timesteps = model.context, model.activation_bits() or (0,), sampling.calls(denoiser)
        predict, exact = sampling.predictor(model.for_timesteps(timesteps)), sampling.predictor(denoiser.network)
        rows: dict[int, list[list[NoiseMoments]]] = {bits: [] for bits in widths}
        for number, indices in enumerate(batches(self.images, batch)):
            seen: dict[float, list[NoiseMoments]] = {}  # of every width; of a timestep once, even if visited twice
            conditions = sampling.conditions(denoiser, seed, Stream.CORRECTION, indices)
            for step in sampling.trajectory(exact, denoiser, seed=seed, stream=Stream.CORRECTION, indices=indices):
                if step.t in seen:
                    continue
                seen[step.t], t = [], torch.full((len(step.x),), step.t, device=step.x.device)
                for bits in widths:
                    if bits:
                        model.use_bits([bits] * context.num_steps)
                    with torch.no_grad():
                        noise = predict(step.x, t, conditions) - step.eps
                    seen[step.t].append(NoiseMoments.of(step.eps[None], noise[None]))
                each_step(number * len(timesteps) + step.index + 1)
            for per_batch, steps in zip(rows.values(), zip(*seen.values(), strict=True), strict=True):
                per_batch.append(list(steps))
        moments = {bits: NoiseMoments.join(per_batch) for bits, per_batch in rows.items()}
        statistics = {bits: self.estimate(sums, context.timesteps) for bits, sums in moments.items()}
        if widths == (0,):
            return statistics[0]
        alphas = alphas_cumprod(denoiser.schedule)[[round(t) for t in context.timesteps]]
        chosen = choose_bits({bits: sums.signal_to_noise() for bits, sums in moments.items()}, alphas)
        every = {n: torch.stack([getattr(statistics[b], n)[i] for i, b in enumerate(chosen)]) for n in STATISTICS}
        return NoiseStatistics(context.timesteps, bits=chosen, **every)

    def __call__(self, predict: Predict, sampling: Sampling, statistics: NoiseStatistics) -> tuple[Predict, Sampling]:
        """The corrected prediction, and the sampling with a calibrated variance where the sampler adds noise."""
        if not sampling.sampler.eta:
            log.info("eta is 0: the sampler's noise stays as it is; only bias and correlation are corrected")
            return statistics.corrected(predict), sampling
        self.check(sampling.sampler)
        assert isinstance(sampling.sampler, DDIM)
        residual = dict(zip(statistics.timesteps, statistics.residual.tolist(), strict=True))
        calibrated = VarianceCalibrated(sampling.sampler, residual, self.keep_drift)
        return statistics.corrected(predict), replace(sampling, sampler=calibrated)


def choose_bits(
    signal_to_noise: Mapping[int, Float[Tensor, "steps"]], alphas_cumprod: Float[Tensor, "steps"]
) -> tuple[int, ...]:
    """Step-aware mixed precision (PTQD, section 3.4): the fewest bits whose SNR exceeds that of the diffusion process.

    The process has SNR alpha / (1 - alpha) at a step; where no width exceeds it, the largest is taken.
    """
    widths, snr = sorted(signal_to_noise), alphas_cumprod / (1 - alphas_cumprod)
    steps = enumerate(snr.tolist())
    return tuple(next((b for b in widths if float(signal_to_noise[b][i]) > least), widths[-1]) for i, least in steps)
