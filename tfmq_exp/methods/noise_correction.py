"""What is done about the quantization noise that remains in the prediction (PTQD, arXiv 2305.10657)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.finite import require_finite
from tfmq_exp.core.validate import COUNT, SWITCH, check_fields
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.sampler import DDIM, Predict, Sampler, VarianceCalibrated
from tfmq_exp.sampling.schedule import alphas_cumprod
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

STREAM = "correction"
log = logging.getLogger(__name__)


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
    def join(cls, rows: "Sequence[Sequence[NoiseMoments]]") -> "NoiseMoments":
        """Batches of images, each given step by step."""
        sums = (
            torch.cat([torch.cat([getattr(step, name) for step in batch]) for batch in rows], dim=1)
            for name in ("e", "d", "ee", "dd", "ed")
        )
        return cls(rows[0][0].pixels, *sums)

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
        """(prediction - bias) / (1 + k), at each row's own step."""
        context = TimestepContext(self.timesteps)

        def corrected_predict(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
            step = context.step_indices(t).cpu()
            shape = (len(x), *(1,) * (x.dim() - 1))
            k = self.k[step].to(x).reshape(shape)
            bias = self.bias[step].to(x).reshape(len(x), -1, *(1,) * (x.dim() - 2))
            return (predict(x, t, conditions) - bias) / (1 + k)

        return corrected_predict

    @property
    def residual(self) -> Float[Tensor, "steps"]:
        """Standard deviation of the noise that the corrected prediction still has."""
        return self.sigma / (1 + self.k)

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, as it is stored."""
        named = {"k": self.k, "r2": self.r2, "bias": self.bias, "sigma": self.sigma}
        return named | {"timesteps": torch.tensor(self.timesteps), "bits": torch.tensor(self.bits, dtype=torch.long)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "NoiseStatistics":
        """The inverse of `tensors`."""
        lists = [tuple(tensors[name].tolist()) for name in ("timesteps", "bits")]
        return cls(lists[0], tensors["k"], tensors["r2"], tensors["bias"], tensors["sigma"], lists[1])

    def rows(self) -> list[dict[str, Any]]:
        """One row per step, for a table."""
        columns = zip(self.timesteps, self.k.tolist(), self.r2.tolist(), self.sigma.tolist(), self.bias, strict=True)
        bits = self.bits or (None,) * len(self.timesteps)
        return [
            {
                "step": i,
                "t": t,
                "k": k,
                "r2": r2,
                "sigma": sigma,
                "bias_rms": float(bias.square().mean().sqrt()),
                "bits": b,
            }
            for i, ((t, k, r2, sigma, bias), b) in enumerate(zip(columns, bits, strict=True))
        ]


@dataclass(frozen=True)
class NoCorrection:
    """The prediction as the quantized network makes it."""

    measures: ClassVar[bool] = False

    def check(self, sampler: Sampler) -> None:
        """Every sampler will do."""

    def __call__(self, predict: Predict, sampling: Sampling, statistics: None) -> tuple[Predict, Sampling]:
        """What is sampled with."""
        return predict, sampling


@dataclass(frozen=True)
class NoiseCorrection:
    """Remove what of the noise can be predicted, and let the sampler add less noise by what cannot.

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
    measures: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, images=COUNT, keep_drift=SWITCH)
        if self.intercept not in ("channel", "shared"):
            raise ValueError(f"intercept must be channel or shared, got {self.intercept!r}")
        if self.bias not in ("residual", "total"):
            raise ValueError(f"bias must be residual or total, got {self.bias!r}")
        if self.sigma not in ("pooled", "per_sample"):
            raise ValueError(f"sigma must be pooled or per_sample, got {self.sigma!r}")

    def check(self, sampler: Sampler) -> None:
        """ValueError for a sampler whose noise cannot be made less."""
        if sampler.eta and not isinstance(sampler, DDIM):
            raise ValueError(
                f"the noise of a {getattr(sampler, 'kind', type(sampler).__name__)} cannot be calibrated, only that of DDIM: "
                "choose sampler=ddim, or sampler.eta=0"
            )

    def estimate(self, moments: NoiseMoments, timesteps: tuple[int, ...]) -> NoiseStatistics:
        """k: slope of the least-squares fit of d on e over a step's pixels, at least 0; r2: its share of d's variance.

        Raises:
            NotFiniteError: the noise of a step is NaN or infinite; names its timestep.
        """
        for step, t in enumerate(timesteps):
            require_finite(moments.dd[step], f"the quantization noise at timestep {t}, squared,")
        per_channel = moments.pixels * moments.e.shape[1]
        mean = {name: getattr(moments, name).sum(1) / per_channel for name in ("e", "d", "ee", "dd", "ed")}
        if self.intercept == "shared":
            mean = {name: value.mean(1, keepdim=True) for name, value in mean.items()}
        var_e, var_d = ((mean[x + x] - mean[x] ** 2).mean(1) for x in ("e", "d"))
        covariance = (mean["ed"] - mean["e"] * mean["d"]).mean(1)
        tiny = torch.finfo(torch.float64).tiny
        k = (covariance / var_e.clamp(min=tiny)).clamp(min=0)
        r2 = covariance**2 / (var_e * var_d).clamp(min=tiny)
        slope = k[:, None]
        residual_mean = (moments.d.sum(1) - slope * moments.e.sum(1)) / per_channel
        bias = residual_mean if self.bias == "residual" else moments.d.sum(1) / per_channel
        squares = moments.dd - 2 * k[:, None, None] * moments.ed + k[:, None, None] ** 2 * moments.ee
        if self.sigma == "pooled":
            sigma = (squares.sum(1) / per_channel - residual_mean**2).clamp(min=0).mean(1).sqrt()
        else:
            n = moments.pixels * moments.e.shape[2]
            sums = (moments.d - k[:, None, None] * moments.e).sum(2)
            sigma = ((squares.sum(2) - sums**2 / n).clamp(min=0) / (n - 1)).sqrt().mean(1)
        for name, value in (("k", k), ("r2", r2), ("bias", bias), ("sigma", sigma)):
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
        """Statistics on the float trajectory, after guidance; where a step can choose between bit-widths, the choice too."""
        steps, widths = model.context.num_steps, model.activation_bits() or (0,)
        visited = sampling.calls(denoiser)
        calls, exact = len(visited), sampling.predictor(denoiser.unet)
        predict = sampling.predictor(model.for_timesteps(visited))
        rows: dict[int, list[list[NoiseMoments]]] = {bits: [] for bits in widths}
        for start in range(0, self.images, batch):
            indices = range(start, min(start + batch, self.images))
            seen: set[int] = set()
            for bits in widths:
                rows[bits].append([])
            conditions = sampling.conditions(denoiser, seed, STREAM, indices)
            for step in sampling.trajectory(exact, denoiser, seed=seed, stream=STREAM, indices=indices):
                if step.t in seen:  # statistics are those of a timestep, however often it is visited
                    continue
                seen.add(step.t)
                t = torch.full((len(step.x),), step.t, device=step.x.device)
                for bits in widths:
                    if bits:
                        model.use_bits([bits] * steps)
                    with torch.no_grad():
                        noise = predict(step.x, t, conditions) - step.eps
                    rows[bits][-1].append(NoiseMoments.of(step.eps[None], noise[None]))
                each_step(start // batch * calls + step.index + 1)
        moments = {bits: NoiseMoments.join(batches) for bits, batches in rows.items()}
        statistics = {bits: self.estimate(m, model.context.timesteps) for bits, m in moments.items()}
        if widths == (0,):
            return statistics[0]
        alphas = alphas_cumprod(denoiser.schedule)[list(model.context.timesteps)]
        chosen = choose_bits({bits: m.signal_to_noise() for bits, m in moments.items()}, alphas)
        picked = {
            name: torch.stack([getattr(statistics[bits], name)[step] for step, bits in enumerate(chosen)])
            for name in ("k", "r2", "bias", "sigma")
        }
        return NoiseStatistics(model.context.timesteps, bits=chosen, **picked)

    def __call__(self, predict: Predict, sampling: Sampling, statistics: NoiseStatistics) -> tuple[Predict, Sampling]:
        """What is sampled with."""
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
