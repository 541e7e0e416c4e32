"""Images from a denoiser, in shards of fixed seed ranges."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.sampling.sampler import Predict, Sampler, trajectory
from tfmq_exp.sampling.seeds import image_generators, initial_noise

STREAM = "images"


def to_uint8(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """[-1, 1] to 0 .. 255, rounded: the only place where images change their range (diffusers' rule)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@dataclass(frozen=True)
class ImagePlan:
    """How many images, from which seed, and how many go through the network together."""

    count: int
    seed: int
    batch: int

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch < 1:
            raise ValueError(f"images and batch must be at least 1, got {self.count} and {self.batch}")

    def shards(self) -> Iterator[range]:
        """Ranges of image indices, one batch each. The last may be short."""
        for start in range(0, self.count, self.batch):
            yield range(start, min(start + self.batch, self.count))


def sample_shard(
    predict: Predict,
    denoiser: Denoiser,
    sampler: Sampler,
    seed: int,
    indices: range,
    each_step: Callable[[int], None] = lambda _: None,
) -> UInt8[Tensor, "batch channels height width"]:
    """Images `indices` of the run with `seed`."""
    device = next(denoiser.unet.parameters()).device
    generators = image_generators(seed, STREAM, indices)
    x = initial_noise(generators, denoiser.sample_shape, device)
    for step in trajectory(predict, sampler, denoiser.schedule, x, generators):
        each_step(step.index)
        x = step.x_next
    return to_uint8(x).cpu()
