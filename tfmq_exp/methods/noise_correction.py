"""Correction of the quantization noise that remains in the prediction (PTQD, arXiv 2305.10657)."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.batches import batches
from tfmq_exp.core.finite import require_finite
from tfmq_exp.core.seeds import Stream
from tfmq_exp.core.validate import COUNT, SWITCH, check_fields, one_of
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.methods.noise_statistics import STATISTICS, SUMS, NoiseMoments, NoiseStatistics
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.sampler import Predict, Sampler
from tfmq_exp.sampling.samplers.ddim import DDIM, VarianceCalibrated
from tfmq_exp.sampling.schedule import alphas_cumprod
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NoCorrection:
    """The prediction as the quantized network makes it."""

    measures: ClassVar[Literal[False]] = False  # statistics of the noise

    def check(self, sampler: Sampler) -> None: ...


@dataclass(frozen=True)
class NoiseCorrection:
    """Remove the predictable part of the noise, and let the sampler add less noise by the part that is not predictable.

    Args:
        images: float trajectories that the statistics are taken from.
        intercept: of the fit that gives k: one for each `channel`, as the noise model has it; or one `shared` by all, as
            in the release, where means that differ between channels leak into k.
        bias: `residual`, the mean of what k e leaves; or `total`, the mean of all noise, as the release has it.
        sigma: `pooled` over everything but the channel's mean; or `per_sample`, the mean of the samples' standard
            deviations, as the release has it.
        keep_drift: leave the sampler's deterministic part alone when its noise shrinks; False as in the release.
    """

    images: int
    intercept: Literal["channel", "shared"]
    bias: Literal["residual", "total"]
    sigma: Literal["pooled", "per_sample"]
    keep_drift: bool
    measures: ClassVar[Literal[True]] = True

    def __post_init__(self) -> None:
        check_fields(self, images=COUNT, keep_drift=SWITCH, intercept=one_of("channel", "shared"))
        check_fields(self, bias=one_of("residual", "total"), sigma=one_of("pooled", "per_sample"))

    def check(self, sampler: Sampler) -> None:
        """Raise ValueError for a sampler whose noise cannot be made less."""
        if sampler.eta and not isinstance(sampler, DDIM):
            name = getattr(sampler, "kind", type(sampler).__name__)
            raise ValueError(
                f"the noise of a {name} cannot be calibrated, only that of DDIM: choose sampler=ddim, or sampler.eta=0"
            )

    def estimate(self, moments: NoiseMoments, timesteps: tuple[int, ...]) -> NoiseStatistics:
        """Statistics of every step, from sums over its images.

        1. k: slope of the least-squares fit of d on e over a step's pixels, at least 0; r2: its share of d's variance.
        2. bias: mean of d - k e per channel.
        3. sigma: standard deviation of d - k e.

        Raises:
            NotFiniteError: the noise of a step is NaN or infinite; names its timestep.
        """
        for step, t in enumerate(timesteps):
            require_finite(moments.dd[step], f"the quantization noise at timestep {t}, squared,")
        tiny = torch.finfo(torch.float64).tiny
        per_channel = moments.pixels * moments.e.shape[1]
        # 1.
        mean = {name: getattr(moments, name).sum(1) / per_channel for name in SUMS}
        if self.intercept == "shared":
            mean = {name: value.mean(1, keepdim=True) for name, value in mean.items()}
        var_e, var_d = ((mean[x + x] - mean[x] ** 2).mean(1) for x in ("e", "d"))
        covariance = (mean["ed"] - mean["e"] * mean["d"]).mean(1)
        k = (covariance / var_e.clamp(min=tiny)).clamp(min=0)
        r2 = covariance**2 / (var_e * var_d).clamp(min=tiny)
        # 2.
        residual_mean = (moments.d.sum(1) - k[:, None] * moments.e.sum(1)) / per_channel
        bias = residual_mean if self.bias == "residual" else moments.d.sum(1) / per_channel
        # 3.
        slope = k[:, None, None]
        squares = moments.dd - 2 * slope * moments.ed + slope**2 * moments.ee
        if self.sigma == "pooled":
            sigma = (squares.sum(1) / per_channel - residual_mean**2).clamp(min=0).mean(1).sqrt()
        else:
            n = moments.pixels * moments.e.shape[2]
            sums = (moments.d - slope * moments.e).sum(2)
            sigma = ((squares.sum(2) - sums**2 / n).clamp(min=0) / (n - 1)).sqrt().mean(1)
        for name, value in zip(STATISTICS, (k, r2, bias, sigma), strict=True):
            require_finite(value, f"{name} of the quantization noise")
        return NoiseStatistics(timesteps, k.float(), r2.float(), bias.float(), sigma.float())

    def measure(
        self,
        model: QuantizedUNet,
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
        context, widths = model.context, model.activation_bits() or (0,)
        timesteps = sampling.calls(denoiser)
        calls = len(timesteps)
        predict, exact = sampling.predictor(model.for_timesteps(timesteps)), sampling.predictor(denoiser.unet)
        rows: dict[int, list[list[NoiseMoments]]] = {bits: [] for bits in widths}
        for number, indices in enumerate(batches(self.images, batch)):
            seen: set[int] = set()
            for bits in widths:
                rows[bits].append([])
            conditions = sampling.conditions(denoiser, seed, Stream.CORRECTION, indices)
            for step in sampling.trajectory(exact, denoiser, seed=seed, stream=Stream.CORRECTION, indices=indices):
                if step.t in seen:  # statistics are those of a timestep, however often it is visited
                    continue
                seen.add(step.t)
                t = torch.full((len(step.x),), step.t, device=step.x.device)
                for bits in widths:
                    if bits:
                        model.use_bits([bits] * context.num_steps)
                    with torch.no_grad():
                        noise = predict(step.x, t, conditions) - step.eps
                    rows[bits][-1].append(NoiseMoments.of(step.eps[None], noise[None]))
                each_step(number * calls + step.index + 1)
        moments = {bits: NoiseMoments.join(per_batch) for bits, per_batch in rows.items()}
        statistics = {bits: self.estimate(sums, context.timesteps) for bits, sums in moments.items()}
        if widths == (0,):
            return statistics[0]
        alphas = alphas_cumprod(denoiser.schedule)[list(context.timesteps)]
        chosen = choose_bits({bits: sums.signal_to_noise() for bits, sums in moments.items()}, alphas)
        picked = {
            name: torch.stack([getattr(statistics[bits], name)[step] for step, bits in enumerate(chosen)])
            for name in STATISTICS
        }
        return NoiseStatistics(context.timesteps, bits=chosen, **picked)

    def __call__(self, predict: Predict, sampling: Sampling, statistics: NoiseStatistics) -> tuple[Predict, Sampling]:
        """The corrected prediction, and the sampling with a calibrated variance where the sampler adds noise."""
        sampler = sampling.sampler
        if not sampler.eta:
            log.info("eta is 0: the sampler's noise stays as it is; only bias and correlation are corrected")
            return statistics.corrected(predict), sampling
        self.check(sampler)
        assert isinstance(sampler, DDIM)
        residual = dict(zip(statistics.timesteps, statistics.residual.tolist(), strict=True))
        calibrated = VarianceCalibrated(sampler, residual, self.keep_drift)
        return statistics.corrected(predict), replace(sampling, sampler=calibrated)


def choose_bits(
    signal_to_noise: Mapping[int, Float[Tensor, "steps"]], alphas_cumprod: Float[Tensor, "steps"]
) -> tuple[int, ...]:
    """Step-aware mixed precision (PTQD, section 3.4): the fewest bits whose SNR exceeds that of the diffusion process.

    The process has SNR alpha / (1 - alpha) at a step; where no width exceeds it, the largest is taken.
    """
    needed = (alphas_cumprod / (1 - alphas_cumprod)).tolist()
    widths = sorted(signal_to_noise)
    return tuple(
        next((bits for bits in widths if float(signal_to_noise[bits][step]) > snr), widths[-1])
        for step, snr in enumerate(needed)
    )
