"""Correction of the quantization noise that remains in the prediction (PTQD, arXiv 2305.10657)."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.batches import batches
from tfmq_exp.core.finite import require_finite
from tfmq_exp.core.seeds import Stream
from tfmq_exp.core.validate import COUNT, SWITCH, check_fields, one_of
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.methods.noise_statistics import STATISTICS, NoiseMoments, NoiseStatistics, channel_axis
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.prediction import Mixtures, check_mixture
from tfmq_exp.sampling.samplers import DDIM, VarianceCalibrated
from tfmq_exp.sampling.trajectory import Predict, Sampler
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

log = logging.getLogger(__name__)


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
        """Raise ValueError for a network whose noise is not known."""
        try:
            check_mixture(schedule)
        except ValueError as error:
            raise ValueError(f"PTQD's correction (method/correction) is of predicted noise: {error}") from error

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
        mixtures = Mixtures.of(sampling.sampler, denoiser.schedule, context.timesteps)
        factors = dict(zip(context.timesteps, torch.stack(mixtures.implied_noise(), dim=1).tolist(), strict=True))
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
                        error = predict(step.x, t, conditions) - step.eps
                    of_x, of_prediction = factors[step.t]
                    pair = of_x * step.x + of_prediction * step.eps, of_prediction * error
                    seen[step.t].append(NoiseMoments.of(*(x.movedim(channel_axis(x), 1)[None] for x in pair)))
                each_step(number * len(timesteps) + step.index + 1)
            for per_batch, steps in zip(rows.values(), zip(*seen.values(), strict=True), strict=True):
                per_batch.append(list(steps))
        moments = {bits: NoiseMoments.join(per_batch) for bits, per_batch in rows.items()}
        statistics = {bits: self.estimate(sums, context.timesteps) for bits, sums in moments.items()}
        if widths == (0,):
            return statistics[0]
        ratios = {bits: sums.signal_to_noise() for bits, sums in moments.items()}
        chosen = choose_bits(ratios, mixtures.signal_share())
        every = {n: torch.stack([getattr(statistics[b], n)[i] for i, b in enumerate(chosen)]) for n in STATISTICS}
        return NoiseStatistics(context.timesteps, bits=chosen, **every)

    def __call__(
        self, predict: Predict, sampling: Sampling, statistics: NoiseStatistics, schedule: Mapping[str, Any]
    ) -> tuple[Predict, Sampling]:
        """The corrected prediction, and the sampling with a calibrated variance where the sampler adds noise.

        Args:
            predict: of the quantized network.
            sampling: that the statistics were measured with.
            statistics: of its noise.
            schedule: of the network's training.
        """
        mixtures = Mixtures.of(sampling.sampler, schedule, statistics.timesteps)
        corrected = statistics.corrected(predict, mixtures.implied_noise())
        if not sampling.sampler.eta:
            log.info("eta is 0: the sampler's noise stays as it is; only bias and correlation are corrected")
            return corrected, sampling
        self.check(sampling.sampler)
        assert isinstance(sampling.sampler, DDIM)
        residual = dict(zip(statistics.timesteps, statistics.residual.tolist(), strict=True))
        calibrated = VarianceCalibrated(sampling.sampler, residual, self.keep_drift)
        return corrected, replace(sampling, sampler=calibrated)


def choose_bits(
    signal_to_noise: Mapping[int, Float[Tensor, "steps"]], signal_share: Float[Tensor, "steps"]
) -> tuple[int, ...]:
    """Step-aware mixed precision (PTQD, section 3.4): the fewest bits whose SNR exceeds that of the diffusion process.

    The process has SNR share / (1 - share) at a step; where no width exceeds it, the largest is taken.
    """
    widths, snr = sorted(signal_to_noise), signal_share / (1 - signal_share)
    steps = enumerate(snr.tolist())
    return tuple(next((b for b in widths if float(signal_to_noise[b][i]) > least), widths[-1]) for i, least in steps)
