"""Sampling settings: sampler, conditions, guidance and precision, which networks must share to be compared."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tfmq_exp.core.finite import NotFiniteError, require_finite
from tfmq_exp.core.precision import PRECISIONS, Precision, products_in
from tfmq_exp.core.seeds import Stream, image_generators, initial_noise
from tfmq_exp.core.validate import AMOUNT, check_fields, one_of
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser, nested, noise_of
from tfmq_exp.denoisers.loading.forward_check import check_timesteps
from tfmq_exp.sampling.ancestral import DDPM
from tfmq_exp.sampling.conditioning import Conditioning, Unconditional
from tfmq_exp.sampling.network_convention import with_steps
from tfmq_exp.sampling.trajectory import Predict, Sampler, Step, finite_set, trajectory


@dataclass(frozen=True)
class Sampling:
    """Sampler, conditions of the images, and how the noise is predicted.

    `guidance` is the scale of classifier-free guidance (arXiv 2207.12598) as LDM and Stable Diffusion count it, 1 for none;
    `precision` that of the network's products, see `products_in`: the sampler itself works in float32.
    """

    sampler: Sampler
    conditioning: Conditioning = field(default_factory=Unconditional)
    guidance: float = 1.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        check_fields(self, guidance=AMOUNT, precision=one_of(*PRECISIONS))

    @property
    def guided(self) -> bool:
        """Whether every step predicts twice, with and without condition."""
        return self.guidance != 1.0

    def calls(self, denoiser: Denoiser) -> tuple[float | int, ...]:
        """The timestep of every call of the network."""
        return self.sampler.calls(denoiser.schedule)

    def finite_set(self, denoiser: Denoiser) -> tuple[float | int, ...]:
        """The distinct timesteps, in the order in which they are first visited."""
        return finite_set(self.sampler, denoiser.schedule)

    def with_steps(self, num_inference_steps: int) -> "Sampling":
        """The same with another number of steps; ValueError for a sampler without such a setting."""
        return replace(self, sampler=with_steps(self.sampler, num_inference_steps))

    def conditions(self, denoiser: Denoiser, seed: int, stream: str, indices: Sequence[int]) -> Conditions:
        """Conditions of images `indices` of a random stream, on the network's device; streams are independent.

        Raises:
            ValueError: guidance of a network that knows no unconditional mode, or a condition that is not finite.
        """
        found = denoiser.encoder(self.conditioning.choose(seed, stream, indices)).to(denoiser.device)
        if self.guided and not found.null:
            raise ValueError(f"{denoiser.name} has no unconditional mode: guidance must be 1, got {self.guidance}")
        for name, value in (*found.given.items(), *found.null.items()):
            require_finite(value, f"the condition {name}")
        return found

    def check(self, denoiser: Denoiser) -> None:
        """Raise ValueError for a network that this cannot sample: see `conditions`, and `check_timesteps`."""
        self.conditions(denoiser, 0, Stream.IMAGES, [0])
        check_timesteps(denoiser.network, self.finite_set(denoiser))

    def predictor(self, network: Callable[..., Any]) -> Predict:
        """A network as a function (x, t, conditions) -> prediction, after guidance (eq. 6): e_null + s (e_given - e_null).

        The weights of a learned variance come after it where the sampler takes them; they are those with the condition.
        """
        scale, whole = self.guidance, isinstance(self.sampler, DDPM) and self.sampler.variance == "learned"

        def predict(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
            given = conditions.given
            if self.guided:  # both halves in one pass, the unconditional first
                null = {name: value.expand(len(x), *value.shape[1:]) for name, value in conditions.null.items()}
                given = {name: torch.cat([null[name], value]) for name, value in given.items()}
                x, t = torch.cat([x, x]), torch.cat([t, t])
            with products_in(self.precision, x.device):
                arguments = nested({**given, **conditions.constants})
                output = network(x, timestep=t, **arguments).sample
            eps = (output if whole else noise_of(output, x)).to(x.dtype)
            if self.guided:
                without, with_condition = eps.chunk(2)
                guided = without + scale * (with_condition - without)
                if (count := conditions.guided_channels or x.shape[1]) < guided.shape[1]:
                    guided = torch.cat([guided[:, :count], with_condition[:, count:]], dim=1)
                if not conditions.normalised:
                    return guided
                return guided * (with_condition.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
            return eps

        return predict

    def trajectory(
        self, predict: Predict, denoiser: Denoiser, *, seed: int, stream: str, indices: Sequence[int]
    ) -> Iterator[Step]:
        """Denoise images of a stream, step by step, see `tfmq_exp.sampling.trajectory.trajectory`.

        Args:
            predict: the network's prediction after guidance.
            denoiser: shape of a sample, schedule, and encoder of conditions.
            seed: of the run.
            stream: name of the random stream.
            indices: of the images.
        """
        generators = image_generators(seed, stream, indices)
        x = initial_noise(generators, denoiser.sample_shape, denoiser.device)
        conditions = self.conditions(denoiser, seed, stream, indices)
        try:
            yield from trajectory(predict, self.sampler, denoiser.schedule, x, generators, conditions)
        except NotFiniteError as error:
            if self.precision != "float16":
                raise
            advice = "float16 overflows early: set model.sampling.precision to bfloat16 or float32"
            raise NotFiniteError(f"{error}; {advice}") from error
